#!/usr/bin/env bash
# Train, evaluate and report one configuration as an indexed Kubernetes Job, one process per pod; pod 0 reports.
# IMAGE has this repository, installed, as its working folder; CLAIM is a ReadWriteMany volume claim, mounted at
# /shared, where WORKDIR and config.catalogue.folder should be. DRY_RUN=1 prints the manifest and the command:
#   NAME=three PODS=4 IMAGE=... CLAIM=... [RESOURCE=nvidia.com/gpu=8] [SELECTOR=key=value,...] \
#     launch/gke.sh CONFIG /shared/runs/three [--config.x=y ...]
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${NAME:-}" ] || [ -z "${PODS:-}" ] || [ -z "${IMAGE:-}" ] || [ -z "${CLAIM:-}" ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
printf -v config '%q' "--config=$1"
printf -v workdir '%q' "--workdir=$2"
shift 2
printf -v more ' %q' "$@"
[ $# -gt 0 ] || more=""
together="--multihost --coordinator=$NAME-0.$NAME:8476 --num_processes=$PODS --process_id=\$JOB_COMPLETION_INDEX"
limits="" selector=""
[ -z "${RESOURCE:-}" ] || limits="
          resources: {limits: {\"${RESOURCE%=*}\": \"${RESOURCE##*=}\"}}"
if [ -n "${SELECTOR:-}" ]; then
  IFS=, read -ra pairs <<< "$SELECTOR"
  selector="
      nodeSelector:"
  for pair in "${pairs[@]}"; do
    selector+="
        ${pair%%=*}: \"${pair#*=}\""
  done
fi
manifest="apiVersion: v1
kind: Service # gives the pods the names that --coordinator uses
metadata: {name: $NAME}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {job-name: $NAME}
---
apiVersion: batch/v1
kind: Job
metadata: {name: $NAME}
spec:
  completionMode: Indexed
  completions: $PODS
  parallelism: $PODS
  backoffLimit: $((3 * PODS)) # one that is lost ends the others, and all are made again and continue
  podFailurePolicy: # neither a pod that was preempted is counted, nor those that ended because of it
    rules:
      - {action: Ignore, onPodConditions: [{type: DisruptionTarget}]}
      - {action: Ignore, onExitCodes: {operator: In, values: [75]}}
  template:
    spec:
      subdomain: $NAME
      restartPolicy: Never
      terminationGracePeriodSeconds: 120$selector
      containers:
        - name: genret
          image: $IMAGE$limits
          volumeMounts: [{name: shared, mountPath: /shared}]
          command: [bash, -euc]
          args:
            - |
              export GENRET_PREEMPTED=75
              # bash is process 1 and passes no signal on by itself.
              child='' stop=''
              trap 'stop=1; kill \"\$child\"' TERM
              on() { \"\$@\" & child=\$!; wait \"\$child\" || wait \"\$child\"; [ -z \"\$stop\" ]; }
              on python -m experiments.run $together $config $workdir$more
              on python -m experiments.evaluate $together $config $workdir$more
              [ \"\$JOB_COMPLETION_INDEX\" != 0 ] || on python -m experiments.report $workdir
      volumes: [{name: shared, persistentVolumeClaim: {claimName: $CLAIM}}]"
# A Job that is there can be neither started again nor given another number of pods; the run goes on from its files.
remove=(kubectl delete job "$NAME" --ignore-not-found)
if [ -n "${DRY_RUN:-}" ]; then
  echo "${remove[*]}"
  echo "kubectl apply -f - << 'EOF'"
  echo "$manifest"
  echo "EOF"
else
  "${remove[@]}"
  kubectl apply -f - <<< "$manifest"
fi
