{{- define "domainstudio.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{- define "domainstudio.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: worker
{{- end }}

{{- define "domainstudio.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Claim of a cache: the given one, or that of this release. */}}
{{- define "domainstudio.claim" -}}
{{ .cache.existingClaim | default (printf "%s-%s-cache" .release .name) }}
{{- end }}

{{/* Volume of a cache, by the name that the job template mounts. */}}
{{- define "domainstudio.cache" -}}
name: {{ .name }}-cache
{{- if .cache.enabled }}
persistentVolumeClaim: {claimName: {{ include "domainstudio.claim" . }}}
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}

{{/* Volume of the git key. The mode is 0440: the key belongs to root, and the run's group may read it. */}}
{{- define "domainstudio.gitKey" -}}
name: git-key
{{- if .Values.git.secret }}
secret: {secretName: {{ .Values.git.secret }}, optional: true, defaultMode: 288}
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}

{{/* Labels of a run's job and pod. */}}
{{- define "domainstudio.runLabels" -}}
{{- $labels := dict "app.kubernetes.io/instance" .Release.Name "app.kubernetes.io/component" "run" }}
{{- with .Values.runs.queue.name }}{{- $_ := set $labels "kueue.x-k8s.io/queue-name" . }}{{- end }}
{{- with .Values.runs.queue.priorityClass }}{{- $_ := set $labels "kueue.x-k8s.io/priority-class" . }}{{- end }}
{{- toYaml (merge (deepCopy .Values.runs.labels) $labels) }}
{{- end }}

{{/* Defaults of the variables in deploy/kubernetes-pool.yaml. */}}
{{- define "domainstudio.jobVariables" -}}
{{- $runs := .Values.runs }}
{{- $secrets := list }}
{{- range .Values.image.pullSecrets }}{{- $secrets = append $secrets (dict "name" .) }}{{- end }}
{{- $found := dict
  "namespace" .Release.Namespace
  "image" (include "domainstudio.image" .)
  "image_pull_policy" .Values.image.pullPolicy
  "image_pull_secrets" $secrets
  "service_account_name" (printf "%s-runs" .Release.Name)
  "config_map" .Release.Name
  "secret" .Values.secret.name
  "dvc_cache" (include "domainstudio.cache" (dict "name" "dvc" "cache" .Values.cache.dvc "release" .Release.Name) | fromYaml)
  "hub_cache" (include "domainstudio.cache" (dict "name" "hub" "cache" .Values.cache.hub "release" .Release.Name) | fromYaml)
  "git_key" (include "domainstudio.gitKey" . | fromYaml)
  "labels" (include "domainstudio.runLabels" . | fromYaml)
  "annotations" $runs.annotations
  "node_selector" $runs.nodeSelector
  "tolerations" $runs.tolerations
  "gpu_count" $runs.gpus
  "cpu" $runs.cpu
  "memory" $runs.memory
  "ephemeral_storage" $runs.ephemeralStorage
  "shared_memory" $runs.sharedMemory
}}
{{- with $runs.priorityClassName }}{{- $_ := set $found "priority_class_name" . }}{{- end }}
{{- with $runs.affinity }}{{- $_ := set $found "affinity" . }}{{- end }}
{{- toYaml (merge (deepCopy $runs.jobVariables) $found) }}
{{- end }}

{{/* Containers write nothing but their volumes, and may do nothing that needs root. */}}
{{- define "domainstudio.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment, resources and rights of a container of the worker. */}}
{{- define "domainstudio.environment" -}}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- with .Values.secret.prefectAuthKey }}
  # A run's Job names the Secret, so that the password stands in no Job.
  - name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME
    value: {{ $.Values.secret.name | quote }}
  - name: PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY
    value: {{ . | quote }}
  {{- end }}
  # Without it the worker would watch the pods of all namespaces.
  - name: PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES
    value: {{ .Release.Namespace | quote }}
  {{- with .Values.worker.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
envFrom:
  - configMapRef: {name: {{ .Release.Name }}}
  - secretRef: {name: {{ .Values.secret.name }}}
resources: {{- toYaml .Values.worker.resources | nindent 2 }}
securityContext: {{- include "domainstudio.containerSecurity" . | nindent 2 }}
{{- end }}
