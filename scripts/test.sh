#!/usr/bin/env bash
# Makes the environment and runs the tests, in two processes of one thread each. Arguments go to pytest: -m "not slow"
# leaves out what takes long, -n 0 makes it one process.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "$0")/environment.sh" requirements.txt scripts/requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive  # threads that wait for work leave the core to others
python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder tests "$@"
