{{/* The pod of an allocation: template of its Deployment, or of the leader or the workers of its LeaderWorkerSet.
dict root allocation [role: leader or worker] */}}

{{- define "gamma.podTemplate" -}}
{{- $values := .root.Values -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $labels := dict "root" .root "component" "serving" "allocation" .allocation -}}
{{- $native := eq $a.mode "native" -}}
{{- $init := eq $a.mode "init" -}}
{{- $beside := and $values.sidecar.enabled (not $native) (ne (default "" .role) "worker") -}}
metadata:
  labels:
    {{- include "gamma.selectorLabels" $labels | nindent 4 }}
    {{- include "gamma.shownLabels" (dict "allocation" $a) | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: vllm
    gamma/request: {{ include "gamma.requestDigest" . | quote }}
    gamma/budget: {{ $a.budget | quote }}
    {{- with mergeOverwrite dict $values.podAnnotations $a.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "gamma.podBase" (dict "root" .root "profile" $a.profile "nodeSelector" $a.nodeSelector "tolerations" $a.tolerations "priorityClassName" $a.priorityClassName "claimant" (include "gamma.allocationName" .) "count" $a.count) | nindent 2 }}
  {{- with include "gamma.affinity" (dict "affinity" $a.affinity "profile" $a.profile) }}
  affinity:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $a.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ toYaml (mergeOverwrite (dict "labelSelector" (dict "matchLabels" (include "gamma.selectorLabels" $labels | fromYaml))) .) | indent 6 | trim }}
    {{- end }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int64 $values.vllm.terminationGracePeriodSeconds }}
  {{- if or $values.extraInitContainers $native $init }}
  initContainers:
    {{- with $values.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $init }}
    - {{ include "gamma.prepareContainer" . | indent 6 | trim }}
    {{- else if $native }}
    - {{ include "gamma.sidecarContainer" . | indent 6 | trim }}
    {{- end }}
  {{- end }}
  containers:
    - {{ include "gamma.vllmContainer" . | indent 6 | trim }}
    {{- if $beside }}
    - {{ include "gamma.sidecarContainer" . | indent 6 | trim }}
    {{- end }}
    {{- with $values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - {{ include "gamma.modelVolume" . | indent 6 | trim }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.vllm.sharedMemory }}}
    {{- include "gamma.storeVolumes" (dict "root" .root) | nindent 4 }}
    {{- with $a.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if and (or $beside $native) $values.sidecar.enabled $values.sidecar.tokenSecret }}
    - name: sidecar-tokens
      secret:
        secretName: {{ $values.sidecar.tokenSecret }}
        items:
          - {key: {{ $values.sidecar.tokenKey }}, path: tokens}
    {{- end }}
{{- end -}}
