# Sourced by the scripts that start a job: `start COMMAND` becomes the command, or after --dry-run prints it alone.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi

start() {
  [ "$dry_run" ] || exec "$@"
  local words
  words=$(printf ' %q' "$@")
  echo "${words# }"
}
