{{/* Parts of pods that all components share. */}}

{{/* dict root [serviceAccountName] [profile] [nodeSelector] [tolerations] [priorityClassName] [claimant count]: identity, security and place of a pod */}}
{{- define "gamma.podBase" -}}
{{- $values := .root.Values -}}
{{- $profile := default dict .profile -}}
serviceAccountName: {{ default (include "gamma.serviceAccountName" .root) .serviceAccountName }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with default $values.priorityClassName .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- if $profile.deviceClass }}
resourceClaims:
  - {name: gpu, resourceClaimTemplateName: {{ include "gamma.claimTemplateName" (dict "name" .claimant "profile" $profile "count" .count) }}}
{{- end }}
{{- with $profile.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with mergeOverwrite dict $values.nodeSelector (default dict $profile.nodeSelector) (default dict .nodeSelector) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $gpuTolerations := ternary $values.gpuTolerations list (not (and (empty $profile.resource) (empty $profile.deviceClass))) }}
{{- with concat $gpuTolerations (default list $profile.tolerations) $values.tolerations (default list .tolerations) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* dict affinity profile -> affinity that also asks for the profile's GPU memory */}}
{{- define "gamma.affinity" -}}
{{- $affinity := deepCopy (default dict .affinity) -}}
{{- if .profile.minMemoryMiB -}}
{{- $wanted := dict "key" "nvidia.com/gpu.memory" "operator" "Gt" "values" (list (sub (int64 .profile.minMemoryMiB) 1 | toString)) -}}
{{- $node := default dict $affinity.nodeAffinity -}}
{{- $required := default dict $node.requiredDuringSchedulingIgnoredDuringExecution -}}
{{- $terms := list -}}
{{- range default (list dict) $required.nodeSelectorTerms -}}
{{- $terms = append $terms (mergeOverwrite . (dict "matchExpressions" (append (default list .matchExpressions) $wanted))) -}}
{{- end -}}
{{- $_ := set $node "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms) -}}
{{- $_ = set $affinity "nodeAffinity" $node -}}
{{- end -}}
{{- with $affinity }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* dict resources profile count -> resources with the GPUs in them */}}
{{- define "gamma.resources" -}}
{{- $resources := deepCopy (default dict .resources) -}}
{{- if .profile.resource -}}
{{- range $kind := list "limits" "requests" -}}
{{- $_ := set $resources $kind (mergeOverwrite (default dict (get $resources $kind)) (dict $.profile.resource (int64 $.count))) -}}
{{- end -}}
{{- end -}}
{{- if .profile.deviceClass -}}
{{- $_ := set $resources "claims" (append (default list $resources.claims) (dict "name" "gpu")) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* dict profile count -> the claim of a pod on its devices (spec of a ResourceClaim), as JSON */}}
{{- define "gamma.deviceClaim" -}}
{{- $exactly := dict "deviceClassName" .profile.deviceClass "allocationMode" "ExactCount" "count" (int64 .count) -}}
{{- $selectors := list -}}
{{- range .profile.deviceSelectors -}}{{- $selectors = append $selectors (dict "cel" (dict "expression" .)) -}}{{- end -}}
{{- if $selectors -}}{{- $_ := set $exactly "selectors" $selectors -}}{{- end -}}
{{- dict "devices" (dict "requests" (list (dict "name" "gpu" "exactly" $exactly))) | toJson -}}
{{- end -}}

{{/* dict name profile count -> name of the ResourceClaimTemplate. A template cannot change, so each claim has its own. */}}
{{- define "gamma.claimTemplateName" -}}
{{- printf "%s-%s" (.name | trunc 54 | trimSuffix "-") (include "gamma.deviceClaim" . | sha256sum | trunc 8) -}}
{{- end -}}

{{/* dict root name component profile count [allocation] */}}
{{- define "gamma.claimTemplate" -}}
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata:
  {{- include "gamma.metadata" (merge (dict "name" (include "gamma.claimTemplateName" .)) .) | nindent 2 }}
spec:
  spec:
    {{- include "gamma.deviceClaim" . | fromJson | toYaml | nindent 4 }}
{{ end -}}

{{/* dict root hubCache: environment of everything that reads the store or the hub. HOME and every cache are in writable
folders; models from the hub go to the large one. */}}
{{- define "gamma.env" -}}
{{- $values := .root.Values -}}
- name: HOME
  value: /cache
- name: USER
  value: gamma
- name: HF_HOME
  value: {{ .hubCache }}
{{- if $values.hub.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- if $values.hub.tokenSecret }}
- name: HF_TOKEN_PATH
  value: /var/run/gamma/hub/token
{{- end }}
{{- range $name, $value := $values.store.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "gamma.storeMounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
{{- if .Values.store.volume }}
- name: store
  mountPath: /store
{{- end }}
{{- if .Values.store.credentialsSecret }}
- name: store-credentials
  mountPath: /var/run/gamma/store
  readOnly: true
{{- end }}
{{- if .Values.hub.tokenSecret }}
- name: hub-token
  mountPath: /var/run/gamma/hub
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict root */}}
{{- define "gamma.storeVolumes" -}}
{{- $values := .root.Values -}}
- name: cache
  emptyDir:
    sizeLimit: {{ $values.vllm.cacheSize }}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- with $values.store.volume }}
- name: store
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.store.credentialsSecret }}
- name: store-credentials
  secret:
    secretName: {{ . }}
{{- end }}
{{- if $values.hub.tokenSecret }}
- name: hub-token
  secret:
    secretName: {{ $values.hub.tokenSecret }}
    items:
      - key: {{ $values.hub.tokenKey }}
        path: token
{{- end }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Image and security context of a container. Writing a checkpoint needs torch, so it runs in the image of vLLM, which
the node holds anyway; planning and watching run in the small one. */}}
{{- define "gamma.vllmImage" -}}
{{- include "gamma.servingImage" (dict "root" . "image" dict) -}}
{{- end -}}

{{/* dict root image: the image of vLLM with what an allocation changes; its own tag wins over the digest of all */}}
{{- define "gamma.servingImage" -}}
{{- $image := deepCopy .root.Values.images.vllm -}}
{{- if or .image.repository .image.tag -}}{{- $_ := set $image "digest" "" -}}{{- end -}}
{{- $image = mergeOverwrite $image .image -}}
image: {{ include "gamma.image" (dict "root" .root "image" $image) }}
imagePullPolicy: {{ $image.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.securityContext | nindent 2 }}
{{- end -}}

{{- define "gamma.sidecarImage" -}}
image: {{ include "gamma.image" (dict "root" . "image" .Values.images.sidecar) }}
imagePullPolicy: {{ .Values.images.sidecar.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end -}}
