#!/usr/bin/env bash
# Makes the environment, then decodes the demo checkpoint plainly and with self-speculation, compiled, and compares them.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
python generate.py --num_samples 1 --temperature 0 --self_speculative "$@"
python scripts/benchmark.py
