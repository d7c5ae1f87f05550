# Sourced by the launch scripts: `run COMMAND...` (or prints it, where dry_run=1), and a loop that starts a training
# again until it is done. Every start goes on after the last whole checkpoint.

run() {
  if [[ "${dry_run:-0}" == 1 ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# restart_until_done COMMAND...: 0 when COMMAND succeeds. Bad input (exit code 2) is not tried again, and neither is
# what fails RESTARTS (20) times, each within MIN_SECONDS (300) of its start.
restart_until_done() {
  local status quick=0 began pause="${PAUSE_SECONDS:-15}"
  while true; do
    began=$SECONDS
    status=0
    "$@" || status=$?
    [[ $status == 0 ]] && return 0
    if [[ $status == 2 || $status == 130 ]]; then
      echo "kangaroo: exit code $status: not tried again" >&2
      return "$status"
    fi
    if ((SECONDS - began < ${MIN_SECONDS:-300})); then quick=$((quick + 1)); else quick=0; fi
    if ((quick >= ${RESTARTS:-20})); then
      echo "kangaroo: failed $quick times in a row: giving up" >&2
      return "$status"
    fi
    echo "kangaroo: exit code $status; starting again in $pause s" >&2
    sleep "$pause"
  done
}
