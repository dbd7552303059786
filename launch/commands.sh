# Shared by slurm.sh and tpu_pod.sh (sourced, not run): one-line errors, and commands that --dry-run prints.

fail() {
  echo "error: $(basename "$0"): $*" >&2
  exit 2
}

# The arguments as words that any POSIX shell reads back unchanged, each followed by a space.
quoted() {
  local word escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s' " "${word//\'/$escaped}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
}

# Runs a command, or with dry_run set prints it as one line.
run() {
  if [ -n "${dry_run:-}" ]; then
    quoted "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# A number at least as large as $2, or the error that names option $1.
check_number() {
  case $3 in '' | *[!0-9]*) fail "--$1 is '$3'; it must be a whole number" ;; esac
  [ "$3" -ge "$2" ] || fail "--$1 is $3; it must be at least $2"
}
