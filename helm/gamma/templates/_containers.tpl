{{/* The containers of an allocation's pod. Each takes dict root allocation. */}}

{{- define "gamma.prepareContainer" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $values := .root.Values -}}
{{- /* A catalogue of auto reads the device, so this container must see it: init containers and containers share. */}}
{{- $hubCache := ternary "/cache/huggingface" "/model/.huggingface" (not (empty $values.nodeCache.volume)) -}}
{{- $device := and (not $a.profile.gpuMemory) (eq (default "auto" $a.profile.catalogue) "auto") -}}
name: prepare
{{ include "gamma.servingImage" (dict "root" .root "image" $a.image) }}
command: [gamma, prepare]
args:
  - {{ $a.model }}
  {{- include "gamma.requestArgs" . | nindent 2 }}
  {{- if $values.nodeCache.volume }}
  - --cache-limit={{ $values.nodeCache.size }}
  {{- end }}
env:
  {{- include "gamma.env" (dict "root" .root "hubCache" $hubCache) | nindent 2 }}
  {{- with $values.prepare.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- include "gamma.resources" (dict "resources" $values.prepare.resources "count" $a.count "profile" (ternary $a.profile dict $device)) | nindent 2 }}
volumeMounts:
  - name: model
    mountPath: /model
  {{- include "gamma.storeMounts" .root | nindent 2 }}
  {{- with $a.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "gamma.sidecarContainer" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $values := .root.Values -}}
{{- $native := eq $a.mode "native" -}}
name: sidecar
{{- if $native }}
{{ include "gamma.servingImage" (dict "root" .root "image" $a.image) }}
restartPolicy: Always
{{- else }}
{{ include "gamma.sidecarImage" .root }}
{{- end }}
command: [gamma, sidecar]
args:
  {{- if $native }}
  - --node={{ $a.model }}
  {{- include "gamma.requestArgs" . | nindent 2 }}
  {{- else }}
  - --store={{ $values.store.url }}
  - --prepared={{ include "gamma.outFolder" . }}
  {{- end }}
  - --host=0.0.0.0
  - --port={{ int64 $values.sidecar.port }}
  - --read-only
  {{- if $values.sidecar.tokenSecret }}
  - --token-file=/var/run/gamma/tokens/tokens
  {{- end }}
  {{- range $values.sidecar.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- include "gamma.env" (dict "root" .root "hubCache" (ternary "/model/.huggingface" "/cache/huggingface" $native)) | nindent 2 }}
  {{- with concat (ternary $values.prepare.extraEnv list $native) $values.sidecar.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: sidecar
    containerPort: {{ int64 $values.sidecar.port }}
{{- if $native }}
startupProbe:
  httpGet: {path: /readyz, port: sidecar}
  periodSeconds: 5
  failureThreshold: {{ div (add (int64 $values.prepare.timeoutSeconds) 4) 5 }}
{{- end }}
livenessProbe:
  httpGet: {path: /healthz, port: sidecar}
  periodSeconds: 10
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: sidecar}
  periodSeconds: 10
resources:
  {{- toYaml (ternary $values.prepare.resources $values.sidecar.resources $native) | nindent 2 }}
volumeMounts:
  - name: model
    mountPath: /model
    {{- if not $native }}
    readOnly: true
    {{- end }}
  {{- include "gamma.storeMounts" .root | nindent 2 }}
  {{- with $a.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if $values.sidecar.tokenSecret }}
  - name: sidecar-tokens
    mountPath: /var/run/gamma/tokens
    readOnly: true
  {{- end }}
{{- end -}}

{{- define "gamma.vllmContainer" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $values := .root.Values -}}
{{- /* Of several nodes the first answers for all. */}}
{{- $answers := ne (default "" .role) "worker" -}}
name: vllm
{{ include "gamma.servingImage" (dict "root" .root "image" $a.image) }}
{{- $cached := and (not (empty $values.nodeCache.volume)) (eq $a.mode "init") }}
{{- if $cached }}
command: [gamma, cache, run]
args:
  - --entry={{ include "gamma.outFolder" . }}
  - --compiled={{ $a.name }}-compiled-{{ include "gamma.servingImage" (dict "root" .root "image" $a.image) | sha256sum | trunc 8 }}
  - --
  - vllm
  - serve
{{- else }}
command: [vllm, serve]
args:
{{- end }}
  {{- if $a.checkpoint }}
  {{- include "gamma.servedArgs" (dict "allocation" $a) | nindent 2 }}
  {{- else }}
  - --config
  - {{ include "gamma.outFolder" . }}/vllm.yaml
  {{- end }}
  {{- if gt (int64 $a.nodes) 1 }}
  - --nnodes=$(LWS_GROUP_SIZE)
  - --node-rank=$(LWS_WORKER_INDEX)
  - --master-addr=$(LWS_LEADER_ADDRESS)
  {{- end }}
  {{- if $answers }}
  - --host=0.0.0.0
  - --port={{ int64 $values.vllm.port }}
  {{- else }}
  - --headless
  {{- end }}
  {{- range concat $values.vllm.extraArgs $a.vllmArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- $fromHub := hasPrefix "hf://" $a.checkpoint }}
  {{- include "gamma.env" (dict "root" .root "hubCache" (ternary "/model/.huggingface" "/cache/huggingface" $fromHub)) | nindent 2 }}
  {{- if not $cached }}
  - name: VLLM_CACHE_ROOT
    value: /cache/vllm
  {{- end }}
  - name: VLLM_NO_USAGE_STATS
    value: "1"
  {{- if not $cached }}
  - name: TRITON_CACHE_DIR
    value: /cache/triton
  - name: TORCHINDUCTOR_CACHE_DIR
    value: /cache/inductor
  {{- end }}
  {{- if gt (int64 $a.nodes) 1 }}
  - name: VLLM_HOST_IP
    valueFrom:
      fieldRef: {fieldPath: status.podIP}
  {{- end }}
  {{- if $values.vllm.apiKeySecret }}
  - name: VLLM_API_KEY
    valueFrom:
      secretKeyRef: {name: {{ $values.vllm.apiKeySecret }}, key: {{ $values.vllm.apiKeyKey }}}
  {{- end }}
  {{- range $name, $value := $a.profile.env }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
  {{- with concat $values.vllm.extraEnv $a.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.vllm.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $answers }}
ports:
  - name: http
    containerPort: {{ int64 $values.vllm.port }}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int64 $values.vllm.startupTimeoutSeconds) 9) 10 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: {{ $values.vllm.liveness.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $values.vllm.liveness.failureThreshold }}
readinessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: {{ $values.vllm.readiness.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ $values.vllm.readiness.failureThreshold }}
{{- end }}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ $values.vllm.preStopSeconds | toString | quote }}]
resources:
  {{- include "gamma.resources" (dict "resources" (default (default $values.vllm.resources $a.profile.resources) $a.resources) "profile" $a.profile "count" $a.count) | nindent 2 }}
volumeMounts:
  - name: model
    mountPath: /model
    {{- if not (or $fromHub $cached) }}
    readOnly: true
    {{- end }}
  - name: shm
    mountPath: /dev/shm
  - name: cache
    mountPath: /cache
  - name: tmp
    mountPath: /tmp
  {{- if $values.hub.tokenSecret }}
  - name: hub-token
    mountPath: /var/run/gamma/hub
    readOnly: true
  {{- end }}
  {{- with concat $values.extraVolumeMounts $values.vllm.extraVolumeMounts $a.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "gamma.modelVolume" -}}
{{- $volume := .root.Values.modelVolume -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
name: model
{{- if hasPrefix "oci://" $a.checkpoint }}
image:
  reference: {{ trimPrefix "oci://" $a.checkpoint }}
  pullPolicy: {{ .root.Values.images.vllm.pullPolicy }}
{{- else if and .root.Values.nodeCache.volume (eq $a.mode "init") }}
{{- toYaml .root.Values.nodeCache.volume | nindent 0 }}
{{- else if eq $volume.type "emptyDir" }}
emptyDir:
  sizeLimit: {{ $volume.size }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ ternary (include "gamma.allocationName" .) $volume.existingClaim (eq $volume.type "pvc") }}
  {{- if $volume.readOnly }}
  readOnly: true
  {{- end }}
{{- end }}
{{- end -}}
