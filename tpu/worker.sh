#!/bin/bash
# Runs a command until it is done. Used on virtual machines.
#
#   worker.sh NAME FAILURES COMMAND...
#
# Exit code 0: done. 75 (stopped on request, as on preemption): restart at once. Any other code:
# restart after a delay, at most FAILURES times in total. Output goes to logs/NAME.log, the state to
# logs/NAME.status: "running", "done", or "failed CODE". A second worker of the same name refuses to
# start. SIGTERM is forwarded to the command and ends the loop.
set -u
name=$1 allowed=$2
shift 2
mkdir -p logs
exec 9>"logs/$name.lock"
if ! flock --nonblock 9; then
    echo "$name is already running on this machine: see logs/$name.log" >&2
    exit 1
fi
exec >>"logs/$name.log" 2>&1

say() { echo "$(date --utc +%FT%TZ) worker: $*"; }
status() { echo "$*" >"logs/$name.status"; }

child=
stopping=
trap 'stopping=yes; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM

failures=0
status running
while true; do
    say "starting: $*"
    "$@" 9>&- &
    child=$!
    wait "$child"
    code=$?
    # A signal ends the first wait while the command is still saving.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    say "ended with code $code"
    if [ "$code" = 0 ]; then
        status done
        exit 0
    fi
    if [ -n "$stopping" ]; then
        status "failed $code"
        exit "$code"
    fi
    if [ "$code" != 75 ]; then
        failures=$((failures + 1))
        if [ "$failures" -gt "$allowed" ]; then
            say "gave up after $failures failures"
            status "failed $code"
            exit "$code"
        fi
        sleep "${WINNOW_RESTART_SECONDS:-30}"
    fi
done
