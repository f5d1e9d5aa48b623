"""The operations that decoding consists of, for few rows at a time: a product that streams each weight once, attention over
the valid part of the cache, the norm, and all layers at once.

On CUDA they are Triton kernels (cuda.py), on the CPU a small C++ library (cpu.py, cpu.cpp). Every output row is computed by the same
sequence of operations however many rows go with it, so drafting, verifying and plain decoding agree bit for bit. Elsewhere,
and where the library can't be built, plain PyTorch does the same work, slower and without that promise.
"""

import torch
import torch.nn.functional as F

from kernels import cpu, cuda
from kernels.cuda import MAX_ROWS
from kernels.formats import dequantize

enabled = True  # False: plain PyTorch everywhere, to compare with


def backend(x, rows):
    """The kernels that take `rows` rows of x's kind: "cpu" (the library of cpu.py), "cuda" (those of cuda.py), or None."""
    if not enabled or rows > MAX_ROWS or torch.is_grad_enabled():
        return None
    if cpu.ready and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        return "cpu"
    return "cuda" if cuda.triton and x.device.type == "cuda" else None


def linear(x, w, scale=None, zero=None):
    """x (..., T, K) times w (N, K) transposed: (..., T, N). w of x's dtype; or int8 with scale (N,) float32 for its rows; or int4
    as formats.py packs it, (N, K / 2) uint8 with scale and zero (N, G) bfloat16 for the groups of its rows."""
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu":
        return torch.ops.layerskip.linear(x, w, scale, zero)
    if kind == "cuda":
        return cuda.linear(x, w, scale, zero)
    return F.linear(x, w if scale is None else dequantize(w, scale, zero, x.dtype))


def attend(q, k_cache, v_cache, pos):
    """Attention of q (B, T, H, C) at positions pos (T,) over cache rows 0..pos of k_cache and v_cache (B, G, S, C): (B, T, H, C)."""
    if backend(q, q.shape[1]) == "cuda":
        return cuda.attend(q, k_cache, v_cache, pos)
    mask = torch.arange(k_cache.shape[2], device=pos.device) <= pos[:, None]  # (T, S)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, enable_gqa=q.shape[2] > k_cache.shape[1])
    return y.transpose(1, 2)


def norm(x, w, eps):
    """Root-mean-square norm (1910.07467) of x (..., D), computed in float32 whatever the dtype, times w (D,)."""
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu":
        return torch.ops.layerskip.norm(x, w, eps)
    if kind == "cuda":
        return cuda.norm(x, w, eps)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * w
