{{/* What an allocation asks `gamma prepare` for. */}}

{{/* dict root allocation -> JSON of the allocation with every default filled in and its GPU profile under "profile" */}}
{{- define "gamma.allocation" -}}
{{- $values := .root.Values -}}
{{- $a := deepCopy .allocation -}}
{{- $defaults := dict "count" 1 "replicas" 1 "kvCacheDtype" "auto" "budget" "auto" "gpuMemoryUtilization" $values.vllm.gpuMemoryUtilization "vllmArgs" list "prepareArgs" list "env" list "tolerations" list "nodeSelector" dict "affinity" $values.affinity "podAnnotations" dict "modelPath" $values.modelVolume.path -}}
{{- $a = mergeOverwrite $defaults $a -}}
{{- $_ := set $a "rollout" (mergeOverwrite (deepCopy $values.rollout) (default dict .allocation.rollout)) -}}
{{- $_ = set $a "autoscaling" (mergeOverwrite (deepCopy $values.autoscaling) (default dict .allocation.autoscaling)) -}}
{{- $_ = set $a "profile" (default dict (get $values.gpuProfiles $a.gpu)) -}}
{{- toJson $a -}}
{{- end -}}

{{/* Changes whenever the checkpoint that is asked for changes. */}}
{{- define "gamma.requestDigest" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $request := dict "store" .root.Values.store.url "catalogue" (default "" $a.profile.catalogue) "gpuMemory" (default "" $a.profile.gpuMemory) "extra" .root.Values.prepare.extraArgs -}}
{{- range list "model" "count" "maxModelLen" "maxNumSeqs" "kvCacheDtype" "budget" "servedModelName" "gpuMemoryUtilization" "prepareArgs" -}}
{{- $_ := set $request . (get $a .) -}}
{{- end -}}
{{- toJson $request | sha256sum | trunc 16 -}}
{{- end -}}

{{/* The folder of the checkpoint. Its name holds the request's digest, so that a shared volume keeps the former one for
the pods that still serve it and for a rollback. */}}
{{- define "gamma.outFolder" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- if eq .root.Values.prepare.mode "none" -}}
{{- printf "/model/%s" (trimAll "/" $a.modelPath) | trimSuffix "/" -}}
{{- else -}}
{{- printf "/model/%s-%s" $a.name (include "gamma.requestDigest" .) -}}
{{- end -}}
{{- end -}}

{{/* The flags that `gamma prepare` and `gamma sidecar --node` share, as a YAML list. */}}
{{- define "gamma.requestArgs" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
- --store={{ .root.Values.store.url }}
- --out={{ include "gamma.outFolder" . }}
{{- if $a.profile.gpuMemory }}
- --gpu-memory={{ $a.profile.gpuMemory }}
{{- else }}
- --gpu={{ default "auto" $a.profile.catalogue }}
{{- end }}
- --tensor-parallel-size={{ $a.count }}
{{- with $a.maxModelLen }}
- --max-model-len={{ int64 . }}
{{- end }}
{{- with $a.maxNumSeqs }}
- --max-num-seqs={{ int64 . }}
{{- end }}
- --kv-cache-dtype={{ $a.kvCacheDtype }}
- --gpu-memory-utilization={{ $a.gpuMemoryUtilization }}
- --budget={{ $a.budget }}
- --served-model-name={{ default $a.model $a.servedModelName }}
{{- range concat $a.prepareArgs .root.Values.prepare.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
