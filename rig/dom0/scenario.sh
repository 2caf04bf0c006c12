#!/bin/sh
# Runs one scenario in a process of its own: the library, the scenario's file, its function.
# Standard error is the trace; standard output (and 3, where the former is caught) is what a person
# reads.
set -eu
. /job/settings
. /job/dom0/lib.sh
SCENARIO=$1
. "/job/scenarios/$SCENARIO.sh"
exec 3>&1
trap 'status=$?; [ $status -eq 0 ] || echo "FAILED in step: $STEP"' EXIT
set -x
scenario
[ ! -e "$RUN/failed" ]
