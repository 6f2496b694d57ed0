#!/usr/bin/env bash
# N processes of one run on this machine, over loopback: bash docs/launch/local.sh N CONFIG [options]
# VERB=evaluate or VERB=generate: VERB=evaluate bash docs/launch/local.sh 2 runs/tiny --mesh.data 2
# Without GPUs the mesh's devices are emulated, an equal share in each process.
# Only process 0 prints. A lost process ends the others (exit code 75), and all restart.
set -u
processes=$1
shift
port=${PORT:-29400}      # a free port
tries=${TRIES:-3}        # starts before giving up
command=${K2JAX:-k2jax}  # or ".venv/bin/k2jax"

stop() { kill -TERM "${pids[@]}" 2>/dev/null; stopped=1; }
stopped=0
trap stop INT TERM

for ((try = 1; try <= tries; try++)); do
  pids=()
  for ((i = 0; i < processes; i++)); do
    $command "${VERB:-train}" "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$i" &
    pids+=($!)
  done
  code=0
  for pid in "${pids[@]}"; do
    wait "$pid"
    one=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done  # a signal ends `wait` early
    # A mistake (2) is final; any other failure (75, or 137 of a killed process) is retried.
    if [ "$code" != 2 ] && [ "$one" != 0 ]; then code=$one; fi
  done
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$stopped" = 1 ]; then break; fi
done
exit "$code"
