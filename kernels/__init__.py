"""What decoding consists of, for few rows at a time: products, attention, the norm, and all layers at once.

On CUDA these are Triton kernels (cuda.py), on the CPU a small C++ library (cpu.py, cpu.cpp). Each row of a result is
computed by the same sequence of operations, however many rows go with it. So drafting, verifying and plain decoding
agree bit for bit. Elsewhere, where the library can't be built, and where a GPU doesn't run its kernels (probe.py),
plain PyTorch does the same work: slower, and without that promise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiler, cpu, cuda, probe
from kernels.cuda import MAX_ROWS
from kernels.formats import dequantize

enabled = True  # False: plain PyTorch everywhere, to compare with
# True: a GPU's layers in five kernels each (fused.py) rather than thirteen. Off, because no GPU has run or measured it:
# python scripts/benchmark.py --shape llama2-7B --device cuda, with and without --fuse
fuse = False


def prepare(x: Tensor, group: int, width: int) -> None:
    """See to the kernels for a model with weights like x, before it decodes: build the CPU's, try the GPU's. A warning
    says why there are none.

    group: query heads that share a key/value head. width: numbers of a head.
    """
    if x.device.type == "cpu":
        cpu.prepare()
    elif x.device.type == "cuda" and enabled:
        probe.prepare(x, group, width, fuse)


def available(x: Tensor) -> str | None:
    """Which kernels there are for x's device and dtype, as `prepare` found: "cpu", "cuda", or None."""
    if not enabled:
        return None
    if cpu.takes(x):
        return "cpu"
    return "cuda" if cuda.takes(x) else None


def can_compile(x: Tensor) -> bool:
    """Whether torch.compile has anything to do for a model with weights like x, and can. The CPU's kernels run all
    layers as one operation, which leaves nothing. Where Triton's kernels don't run, those that it would make don't; and
    where it has failed before, it will again.
    """
    return available(x) != "cpu" and compiler.works and not cuda.fail_on(x)


def backend(x: Tensor, rows: int) -> str | None:
    """Which kernels take `rows` rows like x now: "cpu", "cuda", or None for plain PyTorch.

    All are for few rows. The CPU's take any number in float32, where they are faster than PyTorch's; in bfloat16 that
    has instructions which round otherwise.
    """
    kind = available(x)
    many = rows > MAX_ROWS and not (kind == "cpu" and x.dtype == torch.float32)
    return None if many or torch.is_grad_enabled() else kind


def linear(x: Tensor, w: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """x (..., T, K) times w (N, K) transposed: (..., T, N).

    w has x's dtype; or is int8, with a float32 scale (N,) for each row; or is int4 as formats.py packs it, (N, K / 2)
    uint8, with bfloat16 scale and zero (N, G) for each group of a row. The CPU's kernels take int8 and int4 in panels
    (formats.py).
    """
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu" and (scale is None or w.dim() == 3):
        return torch.ops.layerskip.linear(x, w, scale, zero)
    if kind == "cuda":
        return cuda.linear(x, w, scale, zero)
    if scale is not None:
        w = dequantize(w, scale, zero, x.dtype)
    return F.linear(x, w)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """Attention of queries q (B, T, H, C) at positions pos (T,), each over cache rows 0 to its position: (B, T, H, C).

    k_cache and v_cache: (B, G, S, C).
    """
    if backend(q, q.shape[1]) == "cuda":
        return cuda.attend(q, k_cache, v_cache, pos)
    mask = torch.arange(k_cache.shape[2], device=pos.device) <= pos[:, None]  # (T, S)
    grouped = q.shape[2] > k_cache.shape[1]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (1910.07467) of x (..., D), computed in float32 whatever the dtype, times w (D,)."""
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu":
        return torch.ops.layerskip.norm(x, w, eps)
    if kind == "cuda":
        return cuda.norm(x, w, eps)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * w
