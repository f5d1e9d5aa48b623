#!/usr/bin/env bash
# Makes the environment, lets the demo checkpoint continue a class, then compares plain and self-speculative decoding.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
python generate.py --num_samples 1 --temperature 0 --self_speculative --early_exit 3 --speculate_k 4
python scripts/benchmark.py --early_exit 3 --speculate_k 4
