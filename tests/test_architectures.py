"""Without a GPU: the Triton kernels compile for all that PyTorch knows of, from a T4 (sm_75) to a B200 (sm_100), and a
program's shared memory suffices there. For an A100 (sm_80) and an H100 (sm_90), in bfloat16, everything that the
kernels hold fits into registers, too.

This file is also what the test runs, in a process in which Triton compiles rather than interprets:
`TRITON_CACHE_DIR=... python tests/test_architectures.py`.
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
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KB that one program can have
CLOSELY = (80, 90)  # looked at as machine code, too


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

    arch: int
    done: set[str] = set()

    def __init__(self, module, name):
        self.kernel, self.name = getattr(module, name), f"{module.__name__.split('.')[-1]}.{name}"
        setattr(module, name, self)

    def __getitem__(self, grid):
        return self.launch

    def signature(self, args):
        """({parameter: type}, {parameter: value that is constant}, what is known of the others), as for a launch."""
        import torch

        types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        types |= {torch.int8: "i8", torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32"}
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
        found = dict(kernel=self.name, arch=self.arch, constants=constants, options=options)
        found |= dict(shared=result.metadata.shared, dtypes=[type for type in signature.values() if type[0] == "*"])
        if self.arch in CLOSELY:
            named = dict(zip(self.kernel.arg_names, args, strict=True))
            found |= machine_code(result.asm["cubin"], named, options["num_warps"])
        print(json.dumps(found))


def machine_code(cubin, args, warps):
    """What a kernel's machine code says: {registers, stack, waits: whether it waits for the kernel ahead of it, and for
    a product weights: their type, clocks: that the loop takes for 8 KB of them}.
    """
    import triton

    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(cubin)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def look(tool, option):
        return subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", look("cuobjdump", "--dump-resource-usage")).groups()
    found = dict(registers=int(registers), stack=int(stack))
    if "w" not in args and "qkv" not in args:
        return found
    listing = look("nvdisasm", "-c")
    found["waits"] = "ACQBULK" in listing
    if "BLOCK_K" in args:
        w = args["w"]
        nbytes = args["BLOCK_N"] * args["BLOCK_K"] * w.itemsize * w.shape[1] // args["K"]  # in a step
        found |= dict(weights=str(w.dtype)[6:], clocks=longest_loop(listing) * warps / 4 * 8192 / nbytes)
    return found


def make(*shape, dtype=None):
    import torch

    return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


def weight_formats(n, k, groupsizes):
    """(weight, scale, zero) of a matrix (n, k) in each format."""
    import torch

    yield make(n, k), None, None
    yield make(n, k, dtype=torch.int8), make(n, dtype=torch.float32), None
    for groupsize in groupsizes:
        yield make(n, k // 2, dtype=torch.uint8), make(n, k // groupsize), make(n, k // groupsize)


def compile_all():
    """Compile what a pass of 8 rows launches: for CLOSELY in each format of the weights, for the others what takes the
    most shared memory.
    """
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "scripts")]
    import torch

    from kernels import cuda, fused

    for name in ("linear_kernel", "attend_kernel", "combine_kernel", "norm_kernel"):
        Compiler(cuda, name)
    Compiler(fused, "product_kernel"), Compiler(fused, "attend_kernel")
    fused.early = lambda device: Compiler.arch >= 90
    for Compiler.arch, room in SHARED.items():
        cuda.shared_memory[torch.device("meta")] = room * 1024
        if Compiler.arch in CLOSELY:
            compile_products()
            compile_attention()
            compile_fused()
        else:
            compile_largest()


def shape(name):
    """(dim, heads, kv_heads, width, ffn) of a model."""
    from benchmark import SHAPES

    _, dim, _, heads, kv_heads, width, ffn, *_ = SHAPES[name]
    return dim, heads, kv_heads, width, ffn


def compile_products():
    from kernels import cuda

    dim, *_, ffn = shape("llama2-70B")
    for weight in weight_formats(dim, dim, (32, 256)):
        cuda.linear(make(1, 8, dim), *weight)
    cuda.linear(make(1, 8, dim), make(2 * ffn, dim))  # K in one part
    cuda.norm(make(1, 8, dim), make(dim), 1e-5)


def compile_attention():
    import torch

    from kernels import cuda

    for name in ("llama3.2-1B", "llama2-70B"):
        _, heads, kv_heads, width, _ = shape(name)
        cache = make(1, kv_heads, 4096, width)
        cuda.attend(make(1, 8, heads, width), cache, cache, make(8, dtype=torch.int64))


def compile_fused():
    import torch

    from kernels import fused

    dim, heads, kv_heads, width, ffn = shape("llama2-70B")
    x, inner, counters = make(1, 8, dim), (heads + 2 * kv_heads) * width, make(512, dtype=torch.int32)
    for weight in weight_formats(inner, dim, (128,)):
        fused.product(x, weight, counters, norm=make(dim), eps=1e-5)
    gates, down = (make(2 * ffn, dim), None, None), (make(dim, ffn), None, None)
    fused.product(x, gates, counters, norm=make(dim), eps=1e-5, gated=True)
    fused.product(make(1, 8, ffn), down, counters, residual=x)
    fused_attention(heads, kv_heads, width, torch.bfloat16)


def fused_attention(heads, kv_heads, width, dtype):
    import torch

    from kernels import fused

    qkv, cache = make(1, 8, (heads + 2 * kv_heads) * width, dtype=dtype), make(1, kv_heads, 4096, width, dtype=dtype)
    turn = make(8, 1, width // 2, dtype=torch.float32)
    fused.attend(qkv, make(8, dtype=torch.int64), turn, turn, cache, cache, make(512, dtype=torch.int32))


def compile_largest():
    """No T4 holds a model with eight heads of 128 to a group, whose attention wants 80 KB there (kernels/probe.py)."""
    import torch

    from kernels import cuda, fused

    old = Compiler.arch < 80
    dim, heads, kv_heads, width, _ = shape("llama3-8B" if old else "llama2-70B")
    half = make(dim, dim, dtype=torch.float16 if old else torch.bfloat16)
    cuda.linear(half[None, :8], half)
    x, w = make(1, 8, dim, dtype=torch.float32), make(dim, dim, dtype=torch.float32)
    cuda.linear(x, make(dim, dim // 2, dtype=torch.uint8), make(dim, dim // 256), make(dim, dim // 256))
    fused.product(x, (w, None, None), make(512, dtype=torch.int32), norm=w[0], eps=1e-5)
    fused_attention(heads, kv_heads, width, torch.float32)


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
    for arch in SHARED:
        wanted = ours | fused if arch in CLOSELY else {"cuda.linear_kernel"} | fused
        assert {k["kernel"] for k in compiled if k["arch"] == arch} == wanted
    assert {k["constants"].get("GROUPSIZE") for k in compiled} >= {1, 32, 128, 256}
    assert {type for k in compiled if k["arch"] == 75 for type in k["dtypes"]} >= {"*fp16", "*fp32", "*u8"}


def test_shared_memory_suffices(compiled):
    for kernel in compiled:
        assert kernel["shared"] <= SHARED[kernel["arch"]] * 1024, kernel
        if kernel["arch"] in CLOSELY:  # two programs or more to a multiprocessor
            assert kernel["shared"] * 2 <= SHARED[kernel["arch"]] * 1024, kernel


def test_fewer_steps_are_on_their_way_where_shared_memory_is_small(compiled):
    stages = {}
    for kernel in compiled:
        if kernel["kernel"] == "cuda.linear_kernel" and kernel["constants"].get("scale", 0) is None:
            stages.setdefault(kernel["arch"], set()).add(kernel["options"]["num_stages"])
    assert stages == {75: {2}, 80: {4}, 86: {3}, 89: {3}, 90: {4}, 100: {4}}


def test_nothing_is_spilled(compiled):
    closely = [kernel for kernel in compiled if kernel["arch"] in CLOSELY]
    assert closely
    for kernel in closely:
        assert kernel["stack"] == 0, kernel


@pytest.mark.parametrize("weights,most", [("bfloat16", 100), ("int8", 400), ("uint8", 1000)])
def test_instructions_for_8_kb_of_weights(compiled, weights, most):
    """Clocks that the four schedulers of a multiprocessor need at least; an H100 reads 8 KB for each in some 565."""
    products = [k for k in compiled if k["kernel"] == "cuda.linear_kernel" and k["arch"] == 90]
    clocks = [k["clocks"] for k in products if k["weights"] == weights]
    assert clocks and min(clocks) > 20 and max(clocks) < most, clocks


def test_fused_kernels_wait_and_their_norms_take_no_longer_than_reading(compiled):
    for kernel in compiled:
        if kernel["kernel"].startswith("fused.") and kernel["arch"] in CLOSELY:
            assert kernel["waits"] == (kernel["arch"] == 90)
            assert kernel.get("weights") == "uint8" or kernel.get("clocks", 0) < 565, kernel
