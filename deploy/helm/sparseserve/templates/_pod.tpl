{{- /* The pod of a server, or of a worker of its group; `.` is {root, model, component}. */ -}}
{{- define "sparseserve.pod" -}}
{{- $values := .root.Values -}}
{{- $server := eq .component "server" -}}
metadata:
  labels:
    {{- include "sparseserve.release" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    model: {{ .model.name }}
  annotations:
    checksum/policy: {{ include "sparseserve.policies" . | sha256sum }}
    {{- if $values.proxy.enabled }}
    checksum/proxy: {{ include "sparseserve.nginx" .root | sha256sum }}
    {{- end }}
    {{- with $values.apiKey.value }}
    checksum/api-key: {{ sha256sum . | trunc 8 | quote }}
    {{- end }}
spec:
  serviceAccountName: {{ include "sparseserve.fullname" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false # a Service called vllm would set VLLM_PORT
  # The drain twice: vLLM waits as long again for its engine to end.
  terminationGracePeriodSeconds: {{ add $values.preStopSeconds $values.drainSeconds $values.drainSeconds 15 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- if and $server $values.proxy.enabled }}
  initContainers:
    {{- include "sparseserve.proxy" .root | nindent 4 }}
  {{- end }}
  containers:
    {{- include (printf "sparseserve.%s" .component) . | nindent 4 }}
  {{- if $server }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "sparseserve.selector" . | nindent 10 }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $.model $key }}
  {{ $key }}: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .model.sharedMemory | default "1Gi" }}}}
    {{- if $server }}
    - {name: policies, configMap: {name: {{ include "sparseserve.name" . }}}}
    {{- end }}
    {{- with include "sparseserve.claim" . }}
    - {name: weights, persistentVolumeClaim: {claimName: {{ . }}}}
    {{- end }}
    {{- if and $server $values.proxy.enabled }}
    - {name: proxy, configMap: {name: {{ include "sparseserve.fullname" .root }}-proxy}}
    - {name: proxy-tmp, emptyDir: {}}
    {{- end }}
{{- end -}}

{{- define "sparseserve.server" -}}
{{- $values := .root.Values -}}
- name: server
  {{- if .model.multiNode }}
  command: [sh, -c, 'ray start --head --port=6379 --include-dashboard=false && exec sparseserve serve "$@"', sh]
  {{- end }}
  args: {{- include "sparseserve.args" . | nindent 4 }}
  {{- if not $values.proxy.enabled }}
  ports:
    - {name: http, containerPort: 8000}
  {{- end }}
  startupProbe:
    httpGet: {path: /health, port: {{ include "sparseserve.port" . }}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: {{ div (add $values.startupSeconds 9) 10 }}
  livenessProbe:
    httpGet: {path: /health, port: {{ include "sparseserve.port" . }}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    httpGet: {path: /ready, port: {{ include "sparseserve.port" . }}}
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 2
  lifecycle:
    preStop:
      sleep: {seconds: {{ $values.preStopSeconds }}}
  {{- include "sparseserve.container" . | nindent 2 }}
{{- end -}}

{{- /* Stays until the leader has drained: without it running answers would break. */ -}}
{{- define "sparseserve.worker" -}}
- name: worker
  # A worker that ended before the leader is there would have the whole group made anew.
  command:
    - sh
    - -c
    - >-
      until ray health-check --address "$LWS_LEADER_ADDRESS:6379"; do sleep 5; done;
      exec ray start --address="$LWS_LEADER_ADDRESS:6379" --block
  lifecycle:
    preStop:
      sleep: {seconds: {{ add .root.Values.preStopSeconds .root.Values.drainSeconds }}}
  {{- include "sparseserve.container" . | nindent 2 }}
{{- end -}}

{{- /* What the containers of servers and workers have alike. */ -}}
{{- define "sparseserve.container" -}}
image: {{ include "sparseserve.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{ include "sparseserve.locked" . }}
env: {{- include "sparseserve.env" . | trim | nindent 2 }}
{{- $resources := deepCopy (.model.resources | default dict) }}
{{- if include "sparseserve.gpu" . }}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" (include "sparseserve.ranks" . | int)) ($resources.limits | default dict)) }}
{{- end }}
{{- with $resources }}
resources: {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: home, mountPath: /home/sparseserve}
  - {name: shm, mountPath: /dev/shm}
  {{- if eq .component "server" }}
  - {name: policies, mountPath: /etc/sparseserve, readOnly: true}
  {{- end }}
  {{- with .model.weights }}
  - {name: weights, mountPath: /models, readOnly: {{ .readOnly | default false }}}
  {{- end }}
{{- end -}}

{{- /* What the model's own `env` names is left to it: server-side apply refuses a name that comes twice. */ -}}
{{- define "sparseserve.env" -}}
{{- $own := .model.env | default list -}}
{{- $named := list -}}
{{- range $own }}{{ $named = append $named .name }}{{ end -}}
{{- range include "sparseserve.defaults" . | fromYamlArray }}
{{- if not (has .name $named) }}
- {{ toJson . }}
{{- end }}
{{- end }}
{{- range $own }}
- {{ toJson . }}
{{- end }}
{{- end -}}

{{- define "sparseserve.defaults" -}}
{{- $network := .root.Values.networkPolicy -}}
{{- $path := hasPrefix "/" .model.model -}}
- {name: HOME, value: /home/sparseserve}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /home/sparseserve/.cache/torchinductor}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if or $path (and $network.enabled (not $network.egress)) }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if and .model.weights (not $path) }}
- {name: HF_HOME, value: /models}
{{- end }}
{{- if .model.multiNode }}
- {name: VLLM_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}
{{- with include "sparseserve.threads" . }}
# vLLM would bind a thread to every core of the node, whatever the limit.
- {name: VLLM_CPU_OMP_THREADS_BIND, value: nobind}
- {name: OMP_NUM_THREADS, value: {{ . | quote }}}
{{- end }}
{{- if eq .component "server" }}
{{- with include "sparseserve.secret" .root }}
- name: VLLM_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.apiKey.key | default "api-key" }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- /* OpenMP threads of a rank on the CPU: its share of the limit, less the core that vLLM leaves to the scheduler. */ -}}
{{- define "sparseserve.threads" -}}
{{- $limit := dig "limits" "cpu" "" (.model.resources | default dict) | toString -}}
{{- if and $limit (not (include "sparseserve.gpu" .)) -}}
{{- $milli := ternary (trimSuffix "m" $limit | int) (mulf $limit 1000 | int) (hasSuffix "m" $limit) -}}
{{- max 1 (sub (div $milli (include "sparseserve.ranks" . | int | mul 1000)) 1) -}}
{{- end -}}
{{- end -}}

{{- define "sparseserve.locked" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- /* A sidecar: it starts before the server and ends after it. */ -}}
{{- define "sparseserve.proxy" -}}
- name: proxy
  image: {{ .Values.proxy.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [nginx, -c, /etc/sparseserve/nginx.conf, -g, daemon off;]
  ports:
    - {name: http, containerPort: 8080}
  {{- include "sparseserve.locked" . | nindent 2 }}
  resources: {{- toYaml .Values.proxy.resources | nindent 4 }}
  volumeMounts:
    - {name: proxy, mountPath: /etc/sparseserve, readOnly: true}
    - {name: proxy-tmp, mountPath: /tmp}
{{- end -}}

{{- define "sparseserve.policies" -}}
{{- dict "models" (dict "*" .model.policy) | toPrettyJson -}}
{{- end -}}

{{- /* deploy/nginx.conf, with this chart's limit, and not one worker for each of a node's many cores. */ -}}
{{- define "sparseserve.nginx" -}}
{{- .Files.Get "files/nginx.conf" | replace "rate=50r/s" (printf "rate=%dr/s" (int .Values.proxy.requestsPerSecond)) | replace "worker_processes auto;" "worker_processes 2;" -}}
{{- end -}}
