#!/usr/bin/env bash
# Makes the environment, lets the demo checkpoint write some Python, then compares plain and self-speculative decoding.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
python generate.py --num_samples 1 --top_p 0.95 --self_speculative --early_exit 3 --speculate_k 4 --prompt 'class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def '
python scripts/benchmark.py --early_exit 3 --speculate_k 6 --pass_rows 0 --json /dev/null
