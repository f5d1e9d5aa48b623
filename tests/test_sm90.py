"""Without a GPU: the Triton kernels compile for one (sm_90, an H100), and in bfloat16 everything that they hold fits
into registers.

This file is also what the test runs, in a process in which Triton compiles rather than interprets:
`TRITON_CACHE_DIR=... python tests/test_sm90.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


HERE = Path(__file__).resolve()


def longest_loop(listing):
    """How many instructions the longest loop has in what nvdisasm prints."""
    labels, count, longest = {}, 0, 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s", line):
            count += 1
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:  # back
                longest = max(longest, count - labels[jump[1]])
    return longest


def compile_all():
    """Compile what a pass of 8 rows launches, in each format of the weights; prints a line of JSON for each kernel."""
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "scripts")]
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmark import SHAPES
    from kernels import cuda

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = set()

    class Compiler:
        """Takes a kernel's place: a launch compiles it."""

        def __init__(self, name):
            self.kernel, self.name = getattr(cuda, name), name

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            signature, constants, hints = {}, {}, {}
            for i, (param, value) in enumerate(zip(self.kernel.params, args, strict=True)):
                tensor = isinstance(value, torch.Tensor)
                constant = param.is_constexpr or value is None or isinstance(value, int) and value == 1
                signature[param.name] = (
                    "constexpr"
                    if constant
                    else f"*{NAMES[value.dtype]}"
                    if tensor
                    else "fp32"
                    if isinstance(value, float)
                    else "i32"
                )
                if constant:
                    constants[param.name] = value
                elif tensor or isinstance(value, int) and value % 16 == 0:
                    hints[i,] = [["tt.divisibility", 16]]
            key = repr((self.name, signature, constants, hints, options))
            if key in done:
                return
            done.add(key)
            result = triton.compile(
                ASTSource(self.kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options=options
            )
            cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
            cubin.write_bytes(result.asm["cubin"])

            def look(*command):
                return subprocess.run(
                    [tools / command[0], *command[1:], cubin], capture_output=True, text=True, check=True
                ).stdout

            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", look("cuobjdump", "--dump-resource-usage")).groups()
            found = dict(
                kernel=self.name,
                constants=constants,
                options=options,
                registers=int(registers),
                stack=int(stack),
                shared=result.metadata.shared,
            )
            if self.name == "linear_kernel":
                nbytes = (
                    constants["BLOCK_N"]
                    * constants["BLOCK_K"]
                    * args[1].itemsize
                    * args[1].shape[1]
                    // args[0].shape[-1]
                )  # of weights in a step
                found |= dict(
                    weights=signature["w"],
                    clocks=longest_loop(look("nvdisasm", "-c")) * options["num_warps"] / 4 * 8192 / nbytes,
                )
            print(json.dumps(found))

    NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8", torch.int64: "i64"}
    for name in ("linear_kernel", "attend_kernel", "combine_kernel", "norm_kernel"):
        setattr(cuda, name, Compiler(name))

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for name in ("llama3.2-1B", "llama2-7B", "llama3-8B", "llama2-70B"):
        _, dim, _, heads, kv_heads, width, ffn, *_ = SHAPES[name]
        for n, k in (((heads + 2 * kv_heads) * width, dim), (dim, heads * width), (2 * ffn, dim), (dim, ffn)):
            x = make(1, 8, k)
            cuda.linear(x, make(n, k))
            cuda.linear(x, make(n, k, dtype=torch.int8), make(n, dtype=torch.float32))
            for groupsize in (32, 128, 256):
                cuda.linear(x, make(n, k // 2, dtype=torch.uint8), *(make(n, k // groupsize) for _ in "sz"))
        cache = make(1, kv_heads, 4096, width)
        cuda.attend(make(1, 8, heads, width), cache, cache, make(8, dtype=torch.int64))
        cuda.norm(make(1, 8, dim), make(dim), 1e-5)


if __name__ == "__main__":
    compile_all()
    sys.exit()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, HERE], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_all_kernels_compile(compiled):
    assert {k["kernel"] for k in compiled} == {"linear_kernel", "attend_kernel", "combine_kernel", "norm_kernel"}
    assert {k["constants"].get("GROUPSIZE") for k in compiled} >= {1, 32, 128, 256}


def test_nothing_is_spilled_and_shared_memory_suffices(compiled):
    for kernel in compiled:
        assert kernel["stack"] == 0 and kernel["shared"] * 2 <= 227 * 1024, (
            kernel
        )  # two programs or more to a multiprocessor


@pytest.mark.parametrize("weights,most", [("*bf16", 100), ("*i8", 400), ("*u8", 1000)])
def test_instructions_for_8_kb_of_weights(compiled, weights, most):
    """Clocks that the four schedulers of a multiprocessor need at least; an H100 reads 8 KB for each in some 565."""
    clocks = [k["clocks"] for k in compiled if k.get("weights") == weights]
    assert clocks and min(clocks) > 20 and max(clocks) < most, clocks
