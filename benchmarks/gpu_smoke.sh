#!/usr/bin/env bash
# The first minutes on a GPU: does everything run, and right? Nothing is downloaded. Each step runs alone, under a time
# limit of its own, and what it prints is kept in FOLDER, though a later one may hang or crash. The exit code is 1 if one
# failed. What it is all about, benchmarks/gpu.sh, takes far longer.
# DEVICE=cpu tries the script itself. SHAPE, PYTHON and LIMIT (seconds for each step) can be set.
# usage: benchmarks/gpu_smoke.sh [FOLDER]
set -uo pipefail
out=${1:-gpu-smoke}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit
device=${DEVICE:-cuda}
shape=${SHAPE:-llama3.2-1B}
python=${PYTHON:-python}
summary=$out/summary.txt
failed=0
: > "$summary"

step() { # NAME SECONDS COMMAND...: run it for so long at most, keep what it prints, and add a line to the summary
    local name=$1 limit=${LIMIT:-$2} began=$SECONDS
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1 < /dev/null
    local code=$? result=ok
    case $code in
        0) ;;
        124 | 137) result="stopped after $limit s" ;;
        *) result="failed with $code" ;;
    esac
    [ $code -eq 0 ] || failed=1
    tail -n 12 "$out/$name.txt" | cut -c -200
    printf '%-10s %5d s  %-20s %s\n' "$name" $((SECONDS - began)) "$result" "$name.txt" | tee -a "$summary"
}

facts='
import platform
import sys

import torch

from kernels import cuda, probe

device = torch.device(sys.argv[1])
print("python", platform.python_version(), "torch", torch.__version__, "triton", getattr(cuda.triton, "__version__", None))
if device.type == "cuda":
    capability, shared = probe.limits(device)
    free, total = torch.cuda.mem_get_info(device)
    print("GPU", torch.cuda.get_device_name(device), "CUDA of PyTorch", torch.version.cuda)
    print(f"capability {capability}, shared memory of a program {shared} bytes, memory {free} of {total} bytes free")
'

rm -f "$out"/demo.*  # a check goes on where it was
step machine 30 "$python" -c "$facts" "$device"
if command -v nvidia-smi > /dev/null; then
    step driver 20 nvidia-smi --query-gpu=name,driver_version,memory.used,temperature.gpu,power.limit --format=csv
fi
step kernels 120 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_gpu.py -k decoding_shapes
step graph 120 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_gpu.py -k "graphed and llama2-separate and 2-4"
step demo 60 "$python" scripts/correctness.py --device "$device" --precision float32 --no-compile --early_exit 2 \
    --speculate_k 4 --num_prompts 2 --max_new_tokens 64 --out "$out/demo"
step speed 120 "$python" scripts/benchmark.py --device "$device" --shape "$shape" --early_exit 2 --speculate_k 4 \
    --num_prompts 1 --repeats 1 --max_new_tokens 64 --pass_rows 0 --json "$out/speed.json"

printf '\nstep          time  result               output, in %s\n' "$out"
cat "$summary"
exit $failed
