"""Without a GPU: the Triton kernels compile for one (sm_90, an H100; the fused ones for sm_80, an A100, too), and in
bfloat16 everything that they hold fits into registers.

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
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a multiprocessor has for its programs


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


class Compiler:
    """Takes a kernel's place in its module: a launch compiles it, once, and prints a line of JSON about it."""

    arch = 90
    done: set[str] = set()

    def __init__(self, module, name):
        self.kernel, self.name = getattr(module, name), f"{module.__name__.split('.')[-1]}.{name}"
        setattr(module, name, self)

    def __getitem__(self, grid):
        return self.launch

    def signature(self, args):
        """({parameter: type}, {parameter: value that is constant}, what is known of the others), as for a launch."""
        import torch

        types = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8"}
        types |= {torch.int64: "i64", torch.int32: "i32"}
        signature, constants, hints = {}, {}, {}
        for i, (param, value) in enumerate(zip(self.kernel.params, args, strict=True)):
            tensor, whole = isinstance(value, torch.Tensor), isinstance(value, int) and not param.do_not_specialize
            if param.is_constexpr or value is None or whole and value == 1:
                signature[param.name] = "constexpr"
                constants[param.name] = value
                continue
            number = "fp32" if isinstance(value, float) else "i32"
            signature[param.name] = f"*{types[value.dtype]}" if tensor else number
            if tensor or whole and value % 16 == 0:
                hints[i,] = [["tt.divisibility", 16]]
        return signature, constants, hints

    def launch(self, *args, **options):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, hints = self.signature(args)
        key = repr((self.arch, self.name, signature, constants, hints, options))
        if key in self.done:
            return
        self.done.add(key)
        source = ASTSource(self.kernel, signature, constants, hints)
        result = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

        def look(*command):
            command = [tools / command[0], *command[1:], cubin]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", look("cuobjdump", "--dump-resource-usage")).groups()
        found = dict(kernel=self.name, arch=self.arch, constants=constants, options=options)
        found |= dict(registers=int(registers), stack=int(stack), shared=result.metadata.shared)
        listing = look("nvdisasm", "-c")
        found["waits"] = "ACQBULK" in listing  # for the kernel ahead of it
        if "BLOCK_K" in constants:
            named = dict(zip(self.kernel.arg_names, args, strict=True))
            w = named["w"]
            nbytes = constants["BLOCK_N"] * constants["BLOCK_K"] * w.itemsize * w.shape[1] // named["K"]  # in a step
            clocks = longest_loop(listing) * options["num_warps"] / 4 * 8192 / nbytes
            found |= dict(weights=signature["w"], clocks=clocks)
        print(json.dumps(found))


def weight_formats(n, k, groupsizes):
    """(weight, scale, zero) of a matrix (n, k) in each format."""
    import torch

    yield make(n, k), None, None
    yield make(n, k, dtype=torch.int8), make(n, dtype=torch.float32), None
    for groupsize in groupsizes:
        yield make(n, k // 2, dtype=torch.uint8), make(n, k // groupsize), make(n, k // groupsize)


def make(*shape, dtype=None):
    import torch

    return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


def compile_all():
    """Compile what a pass of 8 rows launches, in each format of the weights."""
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "scripts")]
    import torch

    from benchmark import SHAPES
    from kernels import cuda, fused

    for name in ("linear_kernel", "attend_kernel", "combine_kernel", "norm_kernel"):
        Compiler(cuda, name)
    Compiler(fused, "product_kernel"), Compiler(fused, "attend_kernel")
    pos, counters = make(8, dtype=torch.int64), make(512, dtype=torch.int32)
    for name in ("llama3.2-1B", "llama2-7B", "llama3-8B", "llama2-70B"):
        _, dim, _, heads, kv_heads, width, ffn, *_ = SHAPES[name]
        for n, k in (((heads + 2 * kv_heads) * width, dim), (dim, heads * width), (2 * ffn, dim), (dim, ffn)):
            for weight in weight_formats(n, k, (32, 128, 256)):
                cuda.linear(make(1, 8, k), *weight)
        cache = make(1, kv_heads, 4096, width)
        cuda.attend(make(1, 8, heads, width), cache, cache, pos)
        cuda.norm(make(1, 8, dim), make(dim), 1e-5)
    _, dim, _, heads, kv_heads, width, ffn, *_ = SHAPES["llama2-70B"]
    for Compiler.arch in (80, 90):
        fused.early = lambda device: Compiler.arch >= 90
        x, inner, turn = make(1, 8, dim), (heads + 2 * kv_heads) * width, make(8, 1, width // 2, dtype=torch.float32)
        for weight in weight_formats(inner, dim, (128,)):
            fused.product(x, weight, counters, norm=make(dim), eps=1e-5)
        for weight in weight_formats(2 * ffn, dim, (128,)):
            fused.product(x, weight, counters, norm=make(dim), eps=1e-5, gated=True)
        for weight in weight_formats(dim, ffn, (128,)):
            fused.product(make(1, 8, ffn), weight, counters, residual=x)
        cache = make(1, kv_heads, 4096, width)
        fused.attend(make(1, 8, inner), pos, turn, turn, cache, cache, counters)


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
    ours = {f"cuda.{name}_kernel" for name in ("linear", "attend", "combine", "norm")}
    fused = {"fused.product_kernel", "fused.attend_kernel"}
    assert {k["kernel"] for k in compiled if k["arch"] == 90} == ours | fused
    assert {k["kernel"] for k in compiled if k["arch"] == 80} == fused | {"cuda.norm_kernel"}  # int4's norm
    assert {k["constants"].get("GROUPSIZE") for k in compiled} >= {1, 32, 128, 256}


def test_nothing_is_spilled_and_shared_memory_suffices(compiled):
    for kernel in compiled:  # two programs or more to a multiprocessor
        assert kernel["stack"] == 0 and kernel["shared"] * 2 <= SHARED[kernel["arch"]], kernel


@pytest.mark.parametrize("weights,most", [("*bf16", 100), ("*i8", 400), ("*u8", 1000)])
def test_instructions_for_8_kb_of_weights(compiled, weights, most):
    """Clocks that the four schedulers of a multiprocessor need at least; an H100 reads 8 KB for each in some 565."""
    clocks = [k["clocks"] for k in compiled if k["kernel"] == "cuda.linear_kernel" and k["weights"] == weights]
    assert clocks and min(clocks) > 20 and max(clocks) < most, clocks


def test_fused_kernels_wait_and_their_norms_take_no_longer_than_reading(compiled):
    for kernel in compiled:
        if kernel["kernel"].startswith("fused."):
            assert kernel["waits"] == (kernel["arch"] == 90)
            assert kernel.get("weights") == "*u8" or kernel.get("clocks", 0) < 565, kernel
