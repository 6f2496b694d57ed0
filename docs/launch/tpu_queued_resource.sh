#!/usr/bin/env bash
# K2 on a TPU pod by a queued resource: bash docs/launch/tpu_queued_resource.sh
# Fill in the fields marked <...>. NODES is the number of slices.
set -euo pipefail

PROJECT="<project>"
ZONE="<zone>"
NAME=k2jax
TYPE=v5p-2048       # counts TensorCores: 1,024 chips, 256 hosts
RUNTIME=v2-alpha-tpuv5
NODES=1             # slices; micro-batches per device are divided by it
SHARED="<file server>:/<share>" # NFS mounted by all hosts, for checkpoints
GIT="<git address of k2jax>"

at=(--project "$PROJECT" --zone "$ZONE")

gcloud compute tpus queued-resources create "$NAME" "${at[@]}" \
  --accelerator-type "$TYPE" --runtime-version "$RUNTIME" \
  --node-count "$NODES" --node-prefix "$NAME"

until [ "$(gcloud compute tpus queued-resources describe "$NAME" "${at[@]}" \
  --format 'value(state.state)')" = ACTIVE ]; do
  sleep 60
done

# The same command on every host of every slice: hosts find each other by the TPU's metadata.
everywhere() {
  local pids=() code=0
  for ((i = 0; i < NODES; i++)); do
    gcloud compute tpus tpu-vm ssh "$NAME-$i" "${at[@]}" --worker all --command "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

everywhere "sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount -t nfs $SHARED /shared; } \
  && { [ -d k2jax ] || git clone $GIT k2jax; } \
  && python3 -m venv env && env/bin/pip install -q -e 'k2jax[tpu]'"

# A lost host ends all processes with a code other than 0 and 2 (a mistake); all restart.
key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')  # of this run: keeps strangers from process 0's port
for ((try = 1; try <= 100; try++)); do
  code=0
  everywhere "K2JAX_CACHE=/shared/cache K2JAX_CLUSTER_KEY=$key env/bin/k2jax train kimi_k2_pretrain \
    --out /shared/runs/k2 --data.path /shared/tokens \
    --mesh.replica $NODES --train.accumulate $((16 / NODES))" || code=$?
  if [ "$code" = 0 ] || [ "$code" = 2 ]; then break; fi
  sleep 30
done
exit "$code"
