{{- define "sparseserve.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 31 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 31 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What one model's objects are called; here and below `.` is {root, model}. */ -}}
{{- define "sparseserve.name" -}}
{{- printf "%s-%s" (include "sparseserve.fullname" .root) .model.name -}}
{{- end -}}

{{- define "sparseserve.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "sparseserve.release" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* The pods that answer requests; those of a group's workers have the component `worker`. */ -}}
{{- define "sparseserve.servers" -}}
{{ include "sparseserve.release" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "sparseserve.selector" -}}
{{ include "sparseserve.servers" .root }}
model: {{ .model.name }}
{{- end -}}

{{- define "sparseserve.gpu" -}}
{{- if ne .model.device "cpu" }}true{{ end -}}
{{- end -}}

{{- define "sparseserve.image" -}}
{{- $built := printf "%s:%s" .root.Values.image.repository (.root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- .model.image | default (printf "%s-%s" $built (ternary "cuda" "cpu" (eq (include "sparseserve.gpu" .) "true"))) -}}
{{- end -}}

{{- define "sparseserve.port" -}}
{{- ternary 8080 8000 .root.Values.proxy.enabled -}}
{{- end -}}

{{- define "sparseserve.secret" -}}
{{- with .Values.apiKey.existingSecret }}{{ . }}{{ else }}{{ if .Values.apiKey.value }}{{ include "sparseserve.fullname" . }}-api-key{{ end }}{{ end -}}
{{- end -}}

{{- define "sparseserve.claim" -}}
{{- with .model.weights -}}
{{- .existingClaim | default (printf "%s-weights" (include "sparseserve.name" $)) -}}
{{- end -}}
{{- end -}}

{{- /* Ranks of one pod; unless it computes on the CPU, each has a GPU. */ -}}
{{- define "sparseserve.ranks" -}}
{{- $sizes := .model.parallel | default dict -}}
{{- $all := mul ($sizes.tensor | default 1) ($sizes.pipeline | default 1) ($sizes.data | default 1) -}}
{{- $nodes := (.model.multiNode | default dict).size | default 1 -}}
{{- if mod $all $nodes -}}
{{- fail (printf "models: %s: tensor * pipeline * data = %d GPUs cannot be shared evenly by multiNode.size = %d pods" .model.name $all (int $nodes)) -}}
{{- end -}}
{{- div $all $nodes -}}
{{- end -}}

{{- /* Arguments of `sparseserve serve`. JSON, for Helm writes large numbers as 1e+06 elsewhere. */ -}}
{{- define "sparseserve.args" -}}
{{- $sizes := .model.parallel | default dict -}}
- {{ .model.model | quote }}
- --policy=/etc/sparseserve/policies.yaml
- --host={{ ternary "127.0.0.1" "0.0.0.0" .root.Values.proxy.enabled }}
- --port=8000
- --shutdown-timeout={{ .root.Values.drainSeconds }}
- {{ printf "--served-model-name=%s" (.model.servedName | default .model.name) | quote }}
{{- range $flag := list "tensor" "pipeline" "data" }}
{{- with index $sizes $flag }}
- --{{ $flag }}-parallel-size={{ . }}
{{- end }}
{{- end }}
{{- if .model.multiNode }}
- --distributed-executor-backend=ray
{{- end }}
{{- range $key, $value := .model.args }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $key }}
{{- else if kindIs "slice" $value }}
- --{{ $key }}
{{- range $value }}
- {{ ternary . (toJson .) (kindIs "string" .) | quote }}
{{- end }}
{{- else }}
- {{ printf "--%s=%s" $key (ternary $value (toJson $value) (kindIs "string" $value)) | quote }}
{{- end }}
{{- end }}
{{- end -}}
