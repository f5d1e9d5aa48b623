"""A GPU that doesn't run the kernels: one line says so, and plain PyTorch does their work. Triton's interpreter stands
for the GPU; what may go wrong is raised in a kernel's place.
"""

import io
import subprocess
from contextlib import redirect_stderr

import pytest
import torch
import triton
from triton.runtime.errors import PTXASError

import kernels
from kernels import cpu, cuda, fused, probe

DEVICE = torch.device("cpu")
SHAPE = (4, 16)  # query heads that share a key/value head, and their width


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The CPU, taken for a GPU of compute capability 9.0 that nothing is known of yet."""
    monkeypatch.setattr(probe, "limits", lambda device: ((9, 0), 1234))
    monkeypatch.setattr(cpu, "ready", False)
    monkeypatch.setattr(probe, "tried", set())
    for name in ("works", "shared_memory"):
        monkeypatch.setattr(cuda, name, {})


def prepare(dtype=torch.float16, fuse=False, shape=SHAPE):
    """(what `probe.prepare` returns, its warnings)."""
    with redirect_stderr(io.StringIO()) as said:
        result = probe.prepare(torch.zeros(1, dtype=dtype), *shape, fuse)
    return result, said.getvalue().splitlines()


class Raising:
    """Takes a kernel's place, and fails at its launch."""

    def __init__(self, error):
        self.error, self.launches = error, 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        self.launches += 1
        print("all of the source")
        raise self.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_kernel_is_launched_once(dtype, monkeypatch):
    launched = []

    def counted(kernel, name):
        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        return Counted()

    for module in (cuda, fused):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, counted(getattr(module, name), f"{module.__name__[8:]}.{name}"))
    x = torch.zeros(1, dtype=dtype)
    assert kernels.available(x) is None and kernels.can_compile(x), "not tried yet"
    assert prepare(dtype, fuse=True) == (True, []) and prepare(dtype, fuse=True) == (True, [])
    own = ["cuda.norm_kernel"] + 3 * ["cuda.linear_kernel"] + ["cuda.attend_kernel", "cuda.combine_kernel"]
    layer = 2 * ["fused.product_kernel"]
    assert launched == own + layer[:1] + ["fused.attend_kernel"] + layer[:1] + layer
    assert kernels.available(x) == "cuda" and cuda.shared_memory == {DEVICE: 1234}
    assert kernels.available(x.double()) is None, "of another dtype nothing is known"


COMPILER = subprocess.CalledProcessError(1, ["gcc", "launcher.c"])
LACKS = [
    (triton.OutOfResources(81920, 65536, "shared memory"), "shared memory, Required: 81920"),
    (triton.CompilationError("def f():\n    x", None, "no such instruction"), "no such instruction"),
    (PTXASError("`ptxas` failed with error code 1\nmuch more"), "`ptxas` failed"),
    (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"), "no kernel image"),
    (RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."), "PTX"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "C compiler"),
    (AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"), "libcuda.so"),
    (COMPILER, "Python.h"),
    (FileNotFoundError(2, "No such file", "gcc"), "Python.h"),
]


@pytest.mark.parametrize("error,said", LACKS, ids=[type(error).__name__ for error, _ in LACKS])
def test_a_kernel_that_cannot_run_is_done_without(error, said, monkeypatch, capsys):
    kernel = Raising(error)
    monkeypatch.setattr(cuda, "attend_kernel", kernel)
    works, (line,) = prepare()
    assert not works and "\n" not in line and said in line and not capsys.readouterr().out
    assert "float16 on cpu" in line and "plain PyTorch" in line and "the kernel for attention" in line
    assert prepare() == (False, []) and prepare(shape=(1, 8)) == (False, []) and kernel.launches == 1
    x = torch.ones(1, 2, 8, dtype=torch.float16)
    assert kernels.available(x) is None and not kernels.can_compile(x)
    assert kernels.can_compile(x.float()), "nothing is known of float32"
    with torch.inference_mode():
        assert kernels.norm(x, x[0, 0], 0.0).eq(1).all() and kernels.linear(x, x[0]).eq(8).all()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        AssertionError("wrong shape"),
        TypeError("no such argument"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_fault_of_a_kernel_is_not_hidden(error, monkeypatch):
    monkeypatch.setattr(cuda, "linear_kernel", Raising(error))
    with pytest.raises(type(error), match=str(error)[-12:]):
        prepare()


def test_fused_kernels_that_cannot_run(monkeypatch):
    monkeypatch.setattr(fused, "product_kernel", Raising(triton.OutOfResources(2, 1, "registers")))
    assert prepare() == (True, [])
    works, (line,) = prepare(fuse=True)
    assert not works and "fused layers" in line


def test_before_ampere_there_is_no_bfloat16(monkeypatch):
    monkeypatch.setattr(probe, "limits", lambda device: ((7, 5), 1234))
    works, (line,) = prepare(torch.bfloat16)
    assert not works and "no bfloat16; take --precision float16" in line
    assert prepare(torch.float16) == (True, [])


def test_without_triton(monkeypatch):
    monkeypatch.setattr(probe, "triton", None)
    works, (line,) = prepare()
    assert not works and "Triton isn't installed" in line


def test_a_model_is_prepared_before_it_decodes(monkeypatch):
    from test_generate import tiny_model

    asked = []
    monkeypatch.setattr(kernels, "prepare", lambda x, *shape: asked.append((x.dtype, *shape)))
    model = tiny_model()
    model.setup_caches(8)
    assert asked == [(torch.float32, model.config.n_head // model.config.n_kv_head, model.config.head_dim)]


def test_the_compiler_reads_what_was_found():
    """The questions that a pass asks while it is compiled: answers that change are compiled anew."""

    def f(x):
        return x * 2 if cuda.takes(x) else x

    compiled, x = torch.compile(f, backend="eager", fullgraph=True), torch.ones(1)
    assert compiled(x) == 1
    cuda.works[DEVICE, torch.float32] = True
    assert compiled(x) == 2
    cuda.works[DEVICE, torch.float32] = False
    assert compiled(x) == 1
