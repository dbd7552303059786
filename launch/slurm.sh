#!/usr/bin/env bash
# Runs a fastlm command as a Slurm job: launch/slurm.sh [options] -- -m fastlm.train --config C --workdir W
#
#   --nodes N       nodes (default 1)                --partition P   partition (default: the cluster's)
#   --gpus N        GPUs per node (default 1; 0: CPU)  --account A   account (default: yours)
#   --cpus N        cores per process (default 8)    --name NAME     job name (default fastlm)
#   --time T        time limit (default 24:00:00)    --array SPEC    job array, e.g. 0-7%2 (see launch/sweep.py)
#   --dry-run       print the commands, one per line, and run none
#
# Notable: one process per GPU, which is what jax.distributed assumes when it reads Slurm's variables. The job
# is this same script (`slurm.sh job ...` inside Slurm), so arguments travel as arguments and need no quoting.
# Two minutes before the time limit the run gets SIGTERM (it saves), then the job goes back into the queue;
# a preempted job is requeued by Slurm itself. --workdir must lie on a file system that all nodes share.
set -euo pipefail

# Slurm runs a copy of this file, in the directory the job was submitted from: the repository root.
[ "${1:-}" = job ] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/commands.sh

# Inside the job: set up once, then start every process; pass signals on and wait until the runs have saved.
job() {
  local requeue='' interrupted='' status=0 srun_pid
  launch/local.sh -c ''
  # srun does not take --cpus-per-task over from sbatch by itself
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 launch/local.sh "$@" &
  srun_pid=$!
  trap 'interrupted=yes requeue=yes; kill -TERM "$srun_pid" || true' USR1 # the time limit is near
  trap 'interrupted=yes; kill -TERM "$srun_pid" || true' TERM            # cancelled or preempted: Slurm decides
  while :; do # `wait` returns early when a signal arrives
    interrupted='' status=0
    wait "$srun_pid" || status=$?
    [ -n "$interrupted" ] || break
  done
  [ -z "$requeue" ] || requeue_job || fail "the run was stopped for the time limit, but requeueing failed; submit it again"
  exit "$status"
}

# An array element's own number can equal that of the whole array, so it is named by array and index.
requeue_job() {
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

if [ "${1:-}" = job ]; then
  shift
  job "$@"
fi

nodes=1 gpus=1 cpus=8 time=24:00:00 partition='' account='' name=fastlm array='' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes && shift && continue ;;
    --nodes | --gpus | --cpus | --time | --partition | --account | --name | --array) ;;
    *) fail "unknown option '$1'; options come before '--', what Python runs after it (see the head of launch/slurm.sh)" ;;
  esac
  [ $# -ge 2 ] || fail "$1 needs a value"
  printf -v "${1#--}" %s "$2"
  shift 2
done
[ "${1:-}" = -- ] && [ $# -ge 2 ] || fail "nothing to run: put '-- -m fastlm.train ...' at the end"
shift
check_number nodes 1 "$nodes"
check_number gpus 0 "$gpus"
check_number cpus 1 "$cpus"

accelerator=cpu tasks=1
if [ "$gpus" -gt 0 ]; then accelerator=cuda tasks=$gpus; fi

set -- launch/slurm.sh job "$@"
[ "$gpus" -eq 0 ] || set -- --gpus-per-node="$gpus" "$@"
[ -z "$partition" ] || set -- --partition="$partition" "$@"
[ -z "$account" ] || set -- --account="$account" "$@"
[ -z "$array" ] || set -- --array="$array" "$@"
run mkdir -p runs/slurm
run env FASTLM_ACCELERATOR="$accelerator" sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" \
  --cpus-per-task="$cpus" --time="$time" --requeue --open-mode=append --signal=B:USR1@120 \
  --output=runs/slurm/%x-%j.out "$@"
