"""Whether a GPU runs the Triton kernels: each is launched once, before decoding begins.

What a GPU, its driver or the system lacks shows at a kernel's first launch. Amid the recording of a CUDA graph, or
after the first tokens, it would be too late to go another way. Only an error which says that a kernel can't be built or
launched is a reason to do without it. What a kernel does wrong, like an illegal access, is raised.
"""

import contextlib
import io
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from command import warn
from kernels import cuda, formats, fused
from kernels.cuda import triton

Errors = tuple[type[Exception], ...]

BUILD_ERRORS: Errors = (OSError, subprocess.CalledProcessError)  # of the launcher's C compiler
LAUNCH_ERRORS: Errors = ()
if triton:
    from triton.runtime.errors import PTXASError

    LAUNCH_ERRORS = (triton.CompilationError, triton.OutOfResources, PTXASError)
GENERAL_ERRORS: Errors = (RuntimeError, AssertionError)  # of Triton and CUDA; their message tells which
MESSAGES = (
    "no kernel image",
    "kernel image is invalid",
    "PTX",
    "too many resources",
    "C compiler",
    "libcuda",
    "active drivers",
    "PassManager::run failed",
)
LAYER_WIDTH = 256  # of the layer that the fused kernels are launched with

tried: set[tuple] = set()  # what `prepare` has been called with


def prepare(x: Tensor, group: int, width: int, fuse: bool) -> bool:
    """Launch the kernels on x's device in its dtype, unless that was done. Returns whether they work there, and warns
    why if they don't.

    group: query heads that share a key/value head. width: numbers of a head. fuse: whether fused layers are wanted.
    """
    key = x.device, x.dtype, group, width, fuse
    if key not in tried and not cuda.fail_on(x):
        why = reason(x, group, width, fuse)
        tried.add(key)
        cuda.works[x.device, x.dtype] = why is None
        if why:
            dtype = str(x.dtype).removeprefix("torch.")
            message = f"decoding in {dtype} on {device_name(x.device)} runs on plain PyTorch, which is slower"
            warn(f"{message}: {why}")
    return cuda.takes(x)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability of a GPU, and bytes of shared memory that one program can have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def reason(x: Tensor, group: int, width: int, fuse: bool) -> str | None:
    """Why the kernels don't work on x's device in its dtype, in one line; None if they do."""
    if triton is None:
        return "Triton isn't installed"
    capability, cuda.shared_memory[x.device] = limits(x.device)
    if x.dtype == torch.bfloat16 and capability < (8, 0):
        return "it has no bfloat16; take --precision float16"
    on_device = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):  # Triton prints what fails
        for name, launch in launches(x, group, width, fuse):
            try:
                launch()
            except BUILD_ERRORS + LAUNCH_ERRORS + GENERAL_ERRORS as error:
                if not is_lack(error):
                    raise
                return f"the kernel for {name} can't run there ({first_words(error)})"
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)  # a fault of a kernel shows here
    return None


def is_lack(error: Exception) -> bool:
    """Whether an error says that a kernel can't be built or launched here, rather than that it did wrong."""
    return isinstance(error, BUILD_ERRORS + LAUNCH_ERRORS) or any(text in str(error) for text in MESSAGES)


def first_words(error: Exception) -> str:
    """One line of what an error says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, BUILD_ERRORS):
        return f"Triton can't build its launcher, which takes a C compiler and Python.h: {lines[0]}"
    if triton and isinstance(error, triton.CompilationError):
        return lines[-1]  # below the lines of source
    return lines[0]


def launches(x: Tensor, group: int, width: int, fuse: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is for, function that launches it) of each kernel, on few numbers, like x, but in the widest blocks."""
    groupsize = max(formats.GROUPSIZES)
    w = x.new_zeros(2 * cuda.BLOCK_N, 2 * groupsize)
    row = x.new_zeros(1, 1, w.shape[1])
    yield "norms", lambda: cuda.norm(row, row[0, 0], 1e-5)
    yield "products", lambda: cuda.linear(row, w)
    yield "int8 products", lambda: cuda.linear(row, *formats.int8_rows(w))
    yield "int4 products", lambda: cuda.linear(row, *formats.int4_groups(w, groupsize))
    query, cache = x.new_zeros(1, 1, group, width), x.new_zeros(1, 1, 1, width)
    pos = torch.zeros(1, dtype=torch.long, device=x.device)
    yield "attention", lambda: cuda.attend(query, cache, cache, pos)
    if fuse:
        yield "fused layers", lambda: fused_layer(x, group, width, pos)


def fused_layer(x: Tensor, group: int, width: int, pos: Tensor) -> Tensor:
    """A layer with zeros for weights, of one key/value head, at position pos."""
    rows = x.new_zeros(1, 1, LAYER_WIDTH)
    wqkv, wo = x.new_zeros((group + 2) * width, LAYER_WIDTH), x.new_zeros(LAYER_WIDTH, group * width)
    w13, w2 = x.new_zeros(2 * LAYER_WIDTH, LAYER_WIDTH), x.new_zeros(LAYER_WIDTH, LAYER_WIDTH)
    turn = torch.zeros(1, 1, width // 2, device=x.device)
    k_cache, v_cache = x.new_zeros(1, 1, 1, width), x.new_zeros(1, 1, 1, width)
    norms, nothing = [rows[0, 0]] * 2, [None] * 4
    weights = [wqkv, wo, w13, w2]
    return fused.layers(rows, pos, turn, turn, norms, weights, nothing, nothing, [k_cache], [v_cache], 1e-5)
