#!/usr/bin/env bash
# What is wanted of a GPU, in one command: checks, then figures, then a short table; after benchmarks/gpu_smoke.sh has
# shown that the GPU runs all of it. Each step's output is kept in FOLDER. A step whose output is there is not run again, so that the command goes on where a time limit stopped it.
# SHAPES, LENGTHS, FORMATS, ACCEPTANCES, PLAIN and DEVICE can be set.
# usage: benchmarks/gpu.sh FOLDER
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit
device=${DEVICE:-cuda}

step() { # NAME COMMAND...: run it, keep what it prints
    local name=$1
    shift
    [ -e "$out/$name.txt" ] && return
    echo "== $name: $*"
    "$@" > "$out/$name.partial" 2>&1
    local code=$?
    tail -n 25 "$out/$name.partial" | cut -c -200
    if [ $code -eq 0 ]; then
        mv "$out/$name.partial" "$out/$name.txt"
    else
        echo "== $name FAILED with $code"
    fi
}

exact() { # PRECISION: greedy self-speculative text against plain text
    step "exact-$1" python scripts/correctness.py --device "$device" --precision "$1" --early_exit 1 3 6 \
        --speculate_k 2 4 --out "$out/exact-$1"
}

speed() { # SHAPE FORMAT LENGTH ACCEPTANCE
    local name=$1-$2-$3-$4
    local quantization=()
    [ "$2" = full ] || quantization=(--quantization "$2")
    step "$name" python scripts/benchmark.py --device "$device" --shape "$1" "${quantization[@]}" --prompt_tokens "$3" \
        --acceptance "$4" --speculate_k 1 2 3 4 6 --num_prompts 1 --repeats 3 --json "$out/$name.json"
}

step tests python -m pytest -q -rs tests/test_gpu.py tests/test_kernels.py tests/test_quantize.py tests/test_demo.py
exact float32
exact bfloat16
for shape in ${SHAPES:-llama2-7B llama3-8B llama3.2-1B llama2-13B codellama-34B}; do
    for format in ${FORMATS:-full int8 int4}; do
        for length in ${LENGTHS:-128 2048 8000}; do
            for acceptance in ${ACCEPTANCES:-.8}; do
                speed "$shape" "$format" "$length" "$acceptance"
            done
        done
    done
done
step llama2-7B-plain_kernels python scripts/benchmark.py --device "$device" --shape "${PLAIN:-llama2-7B}" \
    --plain_kernels --draft_head full --speculate_k 2 4 --num_prompts 1 --json "$out/plain_kernels.json"
step llama2-7B-fused python scripts/benchmark.py --device "$device" --shape "${PLAIN:-llama2-7B}" --fuse \
    --speculate_k 2 4 --num_prompts 1 --json "$out/fused.json"

python - "$out" <<'END'
import json
import sys
from pathlib import Path

print("\nrun                                   plain tok/s (share)  best tok/s  speedup (of ideal)  E K  v(5)/v(1)")
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
    plain, *rows = report["table"]
    best = max(rows, key=lambda row: row["speedup"])
    times = report["pass_seconds"]
    print(
        f"{path.stem:37s} {plain['tokens_per_second']:10.1f} ({plain['bandwidth_share']:.0%})"
        f"  {best['tokens_per_second']:10.1f}  {best['speedup']:.2f}x ({best['speedup'] / best['ideal_speedup']:.0%})"
        f"        {best['exit_layer']} {best['k']}  {times[4] / times[0]:.2f}"
    )
END
