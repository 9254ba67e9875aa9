{{/* Names, labels, images. */}}

{{- define "gamma.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* dict root allocation -> name of the allocation's objects */}}
{{- define "gamma.allocationName" -}}
{{- printf "%s-%s" (include "gamma.fullname" .root) .allocation.name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* dict root allocation -> what scales and rolls its pods, as YAML: apiVersion, kind, name */}}
{{- define "gamma.workload" -}}
{{- $several := gt (int64 (include "gamma.allocation" . | fromJson).nodes) 1 -}}
{apiVersion: {{ ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" $several }}, kind: {{ ternary "LeaderWorkerSet" "Deployment" $several }}, name: {{ include "gamma.allocationName" . }}}
{{- end -}}

{{/* dict root allocation -> name of the router in front of an allocation */}}
{{- define "gamma.routerName" -}}
{{- printf "%s-router" (include "gamma.allocationName" . | trunc 56 | trimSuffix "-") -}}
{{- end -}}

{{/* dict root allocation -> Service that clients ask */}}
{{- define "gamma.frontName" -}}
{{- ternary (include "gamma.routerName" .) (include "gamma.allocationName" .) (include "gamma.allocation" . | fromJson).router.enabled -}}
{{- end -}}

{{/* dict root allocation -> Service of the endpoint picker of an allocation's InferencePool; unless named what llm-d's chart
calls it in a release of the pool's name */}}
{{- define "gamma.pickerName" -}}
{{- $picker := (include "gamma.allocation" . | fromJson).inferencePool.endpointPicker -}}
{{- default (printf "%s-epp" (include "gamma.allocationName" . | trunc 40)) $picker.service -}}
{{- end -}}

{{/* dict allocation domain -> host name under which clients ask for the allocation; empty if nothing says it */}}
{{- define "gamma.host" -}}
{{- if .allocation.host -}}
{{- .allocation.host -}}
{{- else if .domain -}}
{{- printf "%s.%s" .allocation.name .domain -}}
{{- end -}}
{{- end -}}

{{/* dict root component [allocation] */}}
{{- define "gamma.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .allocation }}
gamma/allocation: {{ .name }}
{{- end }}
{{- end -}}

{{/* dict root allocation -> labels of the pods that answer: of several nodes the first */}}
{{- define "gamma.answeringLabels" -}}
{{ include "gamma.selectorLabels" (dict "root" .root "component" "serving" "allocation" .allocation) }}
{{- if gt (int64 (default 1 .allocation.nodes)) 1 }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end -}}

{{- define "gamma.labels" -}}
{{ include "gamma.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict allocation (with its defaults): what `kubectl get -L gamma/budget,gamma/gpu` shows. Of a digest the first 12 digits:
labels have no colon and 63 characters at most. */}}
{{- define "gamma.shownLabels" -}}
gamma/budget: {{ .allocation.budget | replace "sha256:" "sha256-" | trunc 19 | quote }}
gamma/gpu: {{ printf "%dx%s" (mul (int64 .allocation.count) (int64 .allocation.nodes)) (regexReplaceAll "[^A-Za-z0-9_.-]" .allocation.gpu "-") | trunc 63 | trimAll "-._" | quote }}
{{- end -}}

{{/* metadata: dict root name component [allocation] [annotations] [labels] */}}
{{- define "gamma.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "gamma.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* dict root image */}}
{{- define "gamma.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "gamma.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "gamma.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}
