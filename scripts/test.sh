#!/usr/bin/env bash
# Makes the environment and runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt scripts/requirements.txt tests/requirements.txt
python -m pytest -q tests "$@"
