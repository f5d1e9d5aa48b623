#!/usr/bin/env bash
# demo.sh: makes the environment, lets the demo checkpoint write some Python, then compares plain and self-speculative
# decoding.
# demo.sh smollm2: makes the environment, downloads SmolLM2-135M-Instruct (93 MB) and asks it a question.
set -euo pipefail
case $#/${1:-} in
    0/ | 1/smollm2) ;;
    *)
        echo "usage: $0 [smollm2]" >&2
        exit 2
        ;;
esac

if [ $# -eq 1 ]; then
    # shellcheck source=/dev/null
    source "$(dirname "$0")/environment.sh" requirements.txt scripts/requirements.txt
    folder=checkpoints/SmolLM2-135M-Instruct
    python scripts/smollm2.py
    [ -f $folder/model.pth ] || scripts/prepare.sh $folder
    python generate.py --checkpoint_path $folder/model.pth --chat --compile --num_samples 1 --temperature 0 \
        --max_new_tokens 80 --prompt 'What is the capital of France? Answer in one sentence.'
    exit
fi

# shellcheck source=/dev/null
source "$(dirname "$0")/environment.sh" requirements.txt
python generate.py --num_samples 1 --top_p 0.95 --self_speculative --early_exit 3 --speculate_k 4 --prompt 'class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def '
python scripts/benchmark.py --early_exit 3 --speculate_k 7 --draft_precision same int8 --pass_rows 0 --json /dev/null
