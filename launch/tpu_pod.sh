#!/usr/bin/env bash
# Runs a fastlm command on all workers of a Cloud TPU pod: launch/tpu_pod.sh COMMAND [options] [-- python arguments]
#
#   create   make the pod, or reuse the one of that name; returns when it is ready
#   run      copy the code to the workers and start `launch/local.sh <python arguments>` on them, in the background
#   follow   print the run's log until it ends (of worker 0, or --worker), and end with its exit status
#   up       create, run, follow            stop     SIGTERM to the run: it saves and exits
#   fetch    copy PATH (after --), relative to the root, from the worker(s) into the same place here
#   delete   give the pod back
#
#   --name, --zone, --type, --version   or TPU_NAME, TPU_ZONE, TPU_TYPE, TPU_VERSION; e.g. v5litepod-16, v2-alpha-tpuv5-lite
#   --spot       a preemptible pod                --workers N  how many workers `fetch` asks (default 1)
#   --worker I   only this worker (default all)   --alone      each worker is a JAX program of its own (sweeps)
#   --python P   the workers' Python, installed there when missing (default python3.11)
#   --dry-run    print the commands, one per line, and run none (as for a pod that does not exist yet)
#
# Notable: `run` leaves a run alone that is still going, so a lost connection costs nothing: run and follow again.
# --workdir must be a folder they share (a mounted bucket or disk), since all workers write one checkpoint. Left out: several slices.
# `run` sets FASTLM_MULTIHOST=1, which tells the program that its workers are to be joined by jax.distributed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/commands.sh

tpu() { run gcloud compute tpus "$@" --zone "$zone"; }
on_workers() { tpu tpu-vm ssh "$name" --worker "$1" --command "$2"; }
pod_state() { tpu queued-resources describe "$name" --format 'value(state.state)'; }

create() {
  [ -n "$type" ] && [ -n "$version" ] || fail "create needs --type and --version (or TPU_TYPE and TPU_VERSION)"
  if [ -n "$dry_run" ]; then pod_state; fi
  if [ -n "$dry_run" ] || ! pod_state >/dev/null 2>&1; then
    tpu queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$version" $spot
  fi
  if [ -n "$dry_run" ]; then pod_state; else wait_until_active; fi
}

wait_until_active() {
  local state=''
  until [ "$state" = ACTIVE ]; do
    state=$(pod_state)
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED) fail "pod '$name' is $state; delete it and create it again" ;;
      *) echo "tpu_pod.sh: pod '$name' is $state, waiting" >&2 && sleep 30 ;;
    esac
  done
}

# One command for each worker. The wrapper `program` outlives the SIGTERM that `stop` sends to its whole group, to
# note the exit status.
start() {
  local program remote
  program="trap : TERM; env FASTLM_ACCELERATOR=tpu FASTLM_PYTHON=$(quoted "$python")$environment launch/local.sh $(quoted "$@")"
  program+='; echo $? >.run/status'
  remote='mkdir -p fastlm/.run && cd fastlm && if [ -f .run/pid ] && kill -0 "$(cat .run/pid)" 2>/dev/null; then echo "still running: follow or stop it"; else '
  remote+="rm -f .run/status && tar -xzf ../code.tar.gz && { $python -c 'import ensurepip' || "
  remote+="{ sudo apt-get -qq update && sudo apt-get -qqy install $python $python-venv; }; } && "
  remote+="{ setsid nohup bash -c $(quoted "$program")>.run/log 2>&1 </dev/null & echo \$! >.run/pid; }; fi"
  run mkdir -p runs
  run tar -czf runs/code.tar.gz --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data --exclude=__pycache__ .
  tpu tpu-vm scp runs/code.tar.gz "$name:code.tar.gz" --worker "$worker"
  on_workers "$worker" "$remote"
}

follow() {
  on_workers "${worker/all/0}" 'cd fastlm && tail -n +1 --pid="$(cat .run/pid)" -F .run/log; exit "$(cat .run/status)"'
}

fetch() {
  [ $# -eq 1 ] || fail "fetch needs one path after '--'"
  local first=0 last=$((workers - 1)) i
  if [ "$worker" != all ]; then first=$worker last=$worker; fi
  run mkdir -p "$(dirname "$1")"
  for ((i = first; i <= last; i++)); do
    tpu tpu-vm scp --recurse "$name:fastlm/$1" "$(dirname "$1")" --worker "$i"
  done
}

[ $# -gt 0 ] || fail "needs a command: create, run, follow, up, stop, fetch or delete"
command=$1 && shift
name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
worker=all workers=1 python=python3.11 spot='' environment='FASTLM_MULTIHOST=1' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes && shift && continue ;;
    --spot) spot=--spot && shift && continue ;;
    # a slice of one host: libtpu then does not wait for the other hosts
    --alone) environment='TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_DEVICES=0,1,2,3' && shift && continue ;;
    --name | --zone | --type | --version | --worker | --workers | --python) ;;
    *) fail "unknown option '$1'; options come before '--', what Python runs after it (see the head of launch/tpu_pod.sh)" ;;
  esac
  [ $# -ge 2 ] || fail "$1 needs a value"
  printf -v "${1#--}" %s "$2"
  shift 2
done
[ $# -eq 0 ] || shift
[ -n "$name" ] && [ -n "$zone" ] || fail "needs --name and --zone (or TPU_NAME and TPU_ZONE)"
check_number workers 1 "$workers"
[ "$worker" = all ] || check_number worker 0 "$worker"

case $command in run | up) [ $# -gt 0 ] || fail "nothing to run: put '-- -m fastlm.train ...' at the end" ;; esac
case $command in
  create) create ;;
  run) start "$@" ;;
  follow) follow ;;
  up)
    create
    start "$@"
    follow
    ;;
  stop) on_workers "$worker" 'kill -TERM -- "-$(cat fastlm/.run/pid)"' ;;
  fetch) fetch "$@" ;;
  delete) tpu queued-resources delete "$name" --force --quiet ;;
  *) fail "unknown command '$command'; choose create, run, follow, up, stop, fetch or delete" ;;
esac
