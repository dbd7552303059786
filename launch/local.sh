#!/usr/bin/env bash
# Runs Python in the project's own environment: launch/local.sh -m fastlm.train --config configs/lm_small.py
#
# Makes .venv in the repository root from requirements.txt on first use, and again when requirements.txt
# or a variable below changes, then becomes `.venv/bin/python "$@"` in the repository root.
#   FASTLM_ACCELERATOR  cpu | cuda | tpu: which jax to install. Default: what .venv has, else cpu.
#   FASTLM_PYTHON       the interpreter, 3.11 to 3.13. Default: what .venv was made with, else python3.
# Notable: the record of what was installed is written last, so an interrupted install is redone; two first
# uses at once wait for each other. Left out: keeping the old .venv until the new one is whole (virtual
# environments cannot be moved), so do not change requirements.txt under a running job.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

case ${FASTLM_PYTHON:-} in
  /*) ;;
  */*) FASTLM_PYTHON=$PWD/$FASTLM_PYTHON ;; # before the cd below
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

record=.venv/installed.txt # line 1: accelerator, line 2: interpreter, then requirements.txt as installed
recorded() { sed -n "$1p" "$record" 2>/dev/null || true; }

accelerator=${FASTLM_ACCELERATOR:-$(recorded 1)}
accelerator=${accelerator:-cpu}
python=${FASTLM_PYTHON:-$(recorded 2)}
python=${python:-python3}
case $accelerator in
  cpu) extra= ;;
  cuda) extra='jax[cuda13]' ;;
  tpu) extra='jax[tpu]' ;;
  *) fail "FASTLM_ACCELERATOR is '$accelerator'; choose cpu, cuda or tpu" ;;
esac

wanted() {
  printf '%s\n' "$accelerator" "$python"
  cat requirements.txt
}

is_current() { [ -x .venv/bin/python ] && wanted | cmp -s - "$record"; }

check_python() {
  local version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "'$python' does not run; set FASTLM_PYTHON to a Python 3.11 to 3.13"
  case $version in
    3.11 | 3.12 | 3.13) ;;
    *) fail "'$python' is Python $version, fastlm needs 3.11 to 3.13; set FASTLM_PYTHON, e.g. FASTLM_PYTHON=python3.12" ;;
  esac
}

# pip writes to the log and is silent otherwise; the log is shown only when something failed.
install() {
  local log
  check_python
  echo "launch/local.sh: installing requirements.txt ($accelerator) into .venv, once; this takes 1 to 10 minutes" >&2
  log=$(mktemp)
  rm -f "$record"
  "$python" -m venv --clear .venv >"$log" 2>&1 &&
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ${extra:+"$extra"} >>"$log" 2>&1 || {
    cat "$log" >&2
    rm -f "$log"
    fail "could not make .venv (reason above; on Debian and Ubuntu 'python3-venv' must be installed); run the same command to try again"
  }
  rm -f "$log"
  wanted >"$record.new" && mv "$record.new" "$record"
}

# The lock sits on requirements.txt because that file always exists; opened to append, never written.
if ! is_current; then
  (
    ! command -v flock >/dev/null || flock 9 # macOS has none: there, first uses must not overlap
    is_current || install
  ) 9>>requirements.txt
fi

if [ "$accelerator" = cpu ]; then
  export JAX_PLATFORMS="${JAX_PLATFORMS-cpu}"
fi
exec .venv/bin/python "$@"
