{{/* What an allocation asks `gamma prepare` for. */}}

{{/* dict root allocation -> JSON of the allocation with every default filled in and its GPU profile under "profile" */}}
{{- define "gamma.allocation" -}}
{{- $values := .root.Values -}}
{{- $a := deepCopy .allocation -}}
{{- $defaults := dict "count" 1 "nodes" 1 "replicas" 1 "kvCacheDtype" "auto" "budget" "auto" "gpuMemoryUtilization" $values.vllm.gpuMemoryUtilization "vllmArgs" list "prepareArgs" list "env" list "tolerations" list "nodeSelector" dict "affinity" $values.affinity "podAnnotations" dict "priorityClassName" "" "topologySpreadConstraints" $values.topologySpreadConstraints "image" dict "volumes" list "volumeMounts" list "modelPath" $values.modelVolume.path "checkpoint" "" -}}
{{- $a = mergeOverwrite $defaults $a -}}
{{- $_ := set $a "rollout" (mergeOverwrite (deepCopy $values.rollout) (default dict .allocation.rollout)) -}}
{{- $_ = set $a "autoscaling" (mergeOverwrite (deepCopy $values.autoscaling) (default dict .allocation.autoscaling)) -}}
{{- $_ = set $a "router" (mergeOverwrite (deepCopy $values.router) (default dict .allocation.router)) -}}
{{- $_ = set $a "inferencePool" (mergeOverwrite (deepCopy $values.inferencePool) (default dict .allocation.inferencePool)) -}}
{{- $_ = set $a "profile" (default dict (get $values.gpuProfiles $a.gpu)) -}}
{{- /* Without a GPU every width is multiplied in one call: nothing is won by one width a fused layer. */ -}}
{{- $_ = set $a "fusion" (default (ternary "auto" "free" (not (and (empty $a.profile.resource) (empty $a.profile.deviceClass)))) $a.fusion) -}}
{{- /* A finished checkpoint is not prepared. `served` is what vLLM is told to load, `revision` that of the hub. */ -}}
{{- $_ = set $a "mode" (ternary "none" $values.prepare.mode (not (empty $a.checkpoint))) -}}
{{- if hasPrefix "oci://" $a.checkpoint -}}
{{- $_ = set $a "served" (printf "/model/%s" (trimAll "/" $a.modelPath) | trimSuffix "/") -}}
{{- else if $a.checkpoint -}}
{{- $parts := splitList "@" (trimPrefix "hf://" $a.checkpoint) -}}
{{- $_ = set $a "served" (first $parts) -}}
{{- $_ = set $a "revision" (ternary (last $parts) "" (gt (len $parts) 1)) -}}
{{- end -}}
{{- toJson $a -}}
{{- end -}}

{{/* Changes whenever the checkpoint that is asked for changes. */}}
{{- define "gamma.requestDigest" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- $request := dict "store" .root.Values.store.url "catalogue" (default "" $a.profile.catalogue) "gpuMemory" (default "" $a.profile.gpuMemory) "extra" .root.Values.prepare.extraArgs -}}
{{- range list "model" "count" "maxModelLen" "maxNumSeqs" "kvCacheDtype" "budget" "fusion" "lora" "servedModelName" "gpuMemoryUtilization" "prepareArgs" -}}
{{- $_ := set $request . (get $a .) -}}
{{- end -}}
{{- if gt (int64 $a.nodes) 1 -}}{{- $_ := set $request "nodes" $a.nodes -}}{{- end -}}
{{- toJson $request | sha256sum | trunc 16 -}}
{{- end -}}

{{/* The folder of the checkpoint. Its name holds the request's digest, so that a shared volume keeps the former one for
the pods that still serve it and for a rollback. */}}
{{- define "gamma.outFolder" -}}
{{- $a := include "gamma.allocation" . | fromJson -}}
{{- if eq $a.mode "none" -}}
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
{{- if gt (int64 $a.nodes) 1 }}
- --pipeline-parallel-size={{ int64 $a.nodes }}
{{- end }}
{{- with $a.maxModelLen }}
- --max-model-len={{ int64 . }}
{{- end }}
{{- with $a.maxNumSeqs }}
- --max-num-seqs={{ int64 . }}
{{- end }}
- --kv-cache-dtype={{ $a.kvCacheDtype }}
- --gpu-memory-utilization={{ $a.gpuMemoryUtilization }}
- --budget={{ $a.budget }}
- --fusion={{ $a.fusion }}
{{- include "gamma.loraArgs" (dict "lora" $a.lora) }}
{{- with (default dict $a.lora).targetModules }}
- --lora-target-modules={{ join "," . }}
{{- end }}
- --served-model-name={{ default $a.model $a.servedModelName }}
{{- range concat $a.prepareArgs .root.Values.prepare.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- range concat .root.Values.vllm.extraArgs $a.vllmArgs }}
- {{ printf "--vllm-arg=%s" . | quote }}
{{- end }}
{{- end -}}

{{- define "gamma.loraArgs" -}}
{{- with .lora }}
- --enable-lora
{{- with .maxLoras }}
- --max-loras={{ int64 . }}
{{- end }}
{{- with .maxLoraRank }}
- --max-lora-rank={{ int64 . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* dict allocation: what `vllm serve` is told of a finished checkpoint, which has no vllm.yaml of a plan */}}
{{- define "gamma.servedArgs" -}}
{{- $a := .allocation -}}
- {{ $a.served }}
{{- with $a.revision }}
- --revision={{ . }}
{{- end }}
- --served-model-name={{ default $a.model $a.servedModelName }}
- --tensor-parallel-size={{ $a.count }}
{{- if gt (int64 $a.nodes) 1 }}
- --pipeline-parallel-size={{ int64 $a.nodes }}
{{- end }}
- --gpu-memory-utilization={{ $a.gpuMemoryUtilization }}
- --kv-cache-dtype={{ $a.kvCacheDtype }}
{{- with $a.maxModelLen }}
- --max-model-len={{ int64 . }}
{{- end }}
{{- with $a.maxNumSeqs }}
- --max-num-seqs={{ int64 . }}
{{- end }}
{{- include "gamma.loraArgs" (dict "lora" $a.lora) }}
{{- with (default dict $a.lora).targetModules }}
- --lora-target-modules
{{- range . }}
- {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Options of `vllm serve` that the plan decides (PLANNED_OPTIONS of allocator.plan.vllm_arguments) -> where to say them. */}}
{{- define "gamma.plannedOptions" -}}
block-size: ""
config: ""
enable-expert-parallel: prepareArgs
enable-lora: lora
gpu-memory-utilization: gpuMemoryUtilization
kv-cache-dtype: kvCacheDtype
kv-cache-memory-bytes: budget
lora-target-modules: lora.targetModules
max-lora-rank: lora.maxLoraRank
max-loras: lora.maxLoras
max-model-len: maxModelLen
max-num-batched-tokens: prepareArgs
max-num-seqs: maxNumSeqs
model: ""
num-gpu-blocks-override: budget
pipeline-parallel-size: nodes
quantization: ""
served-model-name: servedModelName
tensor-parallel-size: count
{{- end -}}

{{/* Options of `vllm serve` that are the chart's, whatever is planned -> where to say them. */}}
{{- define "gamma.chartOptions" -}}
headless: nodes
host: ""
master-addr: nodes
master-port: nodes
nnodes: nodes
node-rank: nodes
port: vllm.port
{{- end -}}

{{/* Options of `gamma prepare` that the chart gives -> the field they come from. */}}
{{- define "gamma.givenOptions" -}}
budget: budget
enable-lora: lora
fusion: fusion
gpu: gpu
gpu-memory: gpu
gpu-memory-utilization: gpuMemoryUtilization
kv-cache-dtype: kvCacheDtype
lora-target-modules: lora.targetModules
max-lora-rank: lora.maxLoraRank
max-loras: lora.maxLoras
max-model-len: maxModelLen
max-num-seqs: maxNumSeqs
out: ""
pipeline-parallel-size: nodes
served-model-name: servedModelName
store: ""
tensor-parallel-size: count
vllm-arg: vllmArgs
{{- end -}}

{{/* dict arguments known -> JSON list of [argument, field] for arguments whose option `known` has */}}
{{- define "gamma.contradictions" -}}
{{- $short := dict "tp" "tensor-parallel-size" "pp" "pipeline-parallel-size" "ep" "enable-expert-parallel" "q" "quantization" -}}
{{- $found := list -}}
{{- range $argument := .arguments -}}
{{- if hasPrefix "-" $argument -}}
{{- $head := splitList "=" $argument | first -}}
{{- $name := regexReplaceAll "^-+" $head "" | replace "_" "-" -}}
{{- if not (hasPrefix "--" $head) -}}{{- $name = default $name (get $short $name) -}}{{- end -}}
{{- if hasKey $.known $name -}}{{- $found = append $found (list $argument (get $.known $name)) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}
