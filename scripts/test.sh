#!/usr/bin/env bash
# Makes the environment and runs the tests. Arguments go to pytest: -m "not slow" leaves out what takes long.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "$0")/environment.sh" requirements.txt scripts/requirements.txt tests/requirements.txt
python -m pytest -q -rs tests "$@"
