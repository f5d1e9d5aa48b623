"""The GPU's layers with all fused that can be: five kernels for each, in int4 seven.

The norm is part of the product behind it, RoPE and the writing of the caches part of attention, gate and residual part
of the product before them. Where programs have parts of one result, the last to finish adds them all, in order. A
kernel may start before the one ahead of it has ended, and waits for it inside (programmatic dependent launch).

As in cuda.py, a row's arithmetic is the same whatever goes with it. The number of rows is therefore no constant of
a kernel's, not even if it is 1.
"""

import functools
import math

import torch
from torch import Tensor

from kernels import cuda
from kernels.cuda import BLOCK_N, MAX_ROWS, SPLIT, triton

Matrix = tuple[Tensor, Tensor | None, Tensor | None]  # weight, scale, zero, as `linear` takes them

SCHEMA = (
    "(Tensor x, Tensor pos, Tensor cos, Tensor sin, Tensor[] norms, Tensor[] weights, Tensor?[] scales, "
    "Tensor?[] zeros, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, float eps) -> Tensor"
)


@torch.library.custom_op("layerskip::fused_layers", mutates_args=("k_caches", "v_caches"), schema=SCHEMA)
def layers(
    x: Tensor,
    pos: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor | None],
    zeros: list[Tensor | None],
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    eps: float,
) -> Tensor:
    """x (B, T, D), at most MAX_ROWS rows, after the layers, whose keys and values go into the caches (B, G, S, C).

    pos (T,) grows; cos and sin (T, 1, C/2). Each layer has two norms (D,) and four matrices: wqkv, wo, w13, w2.
    """
    matrices = list(zip(weights, scales, zeros, strict=True))
    count = max(cuda.PROGRAMS, k_caches[0].shape[0] * k_caches[0].shape[1])
    arrived = torch.zeros(count, dtype=torch.int32, device=x.device)  # programs that have finished a part; 0 in between
    x = x.contiguous()
    for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        wqkv, wo, w13, w2 = matrices[4 * i : 4 * i + 4]
        y = product(x, wqkv, arrived, norm=norms[2 * i], eps=eps)
        y = attend(y, pos, cos, sin, k_cache, v_cache, arrived)
        x = product(y, wo, arrived, residual=x)
        y = product(x, w13, arrived, norm=norms[2 * i + 1], eps=eps, gated=True)
        x = product(y, w2, arrived, residual=x)
    return x


@layers.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def early(device: torch.device) -> bool:
    """Whether the device can start a kernel before the one ahead of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def product(
    x: Tensor,
    matrix: Matrix,
    arrived: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x (B, T, K), first normalized with norm (K,), times a matrix (N, K) transposed: (B, T, N).

    gated: of the result's halves, silu of the first times the second, (B, T, N / 2). residual (B, T, N) is added.
    """
    w, scale, zero = matrix
    if norm is not None and zero is not None:
        # In a kernel of its own: every program would compute it again, and int4's have too many instructions already.
        x, norm = cuda.norm(x, norm, eps), None
    N, K = w.shape[0], x.shape[-1]
    M = x.numel() // K
    groupsize, block_k, blocks, splits, stages = cuda.parting(x, w, zero)
    y = x.new_empty(*x.shape[:-1], N // 2 if gated else N)
    parts = x.new_empty(splits, M, N, dtype=torch.float32) if splits > 1 else None
    width = min(4096, triton.next_power_of_2(K)) if norm is not None else 0
    pdl = early(x.device)
    product_kernel[blocks, splits](
        x, norm, w, scale, zero, residual, parts, arrived, y, M, N, K, eps,
        gated, groupsize, splits, MAX_ROWS, BLOCK_N, block_k, width, pdl,
        num_warps=x.itemsize, num_stages=stages, launch_pdl=pdl,
    )  # fmt: skip
    return y


def attend(
    qkv: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, arrived: Tensor
) -> Tensor:
    """Attention of the queries in qkv (B, T, (H + 2G) C), whose keys and values go into the caches first: (B, T, H C).

    Queries and keys are rotated by cos and sin (T, 1, C/2).
    """
    B, T, width = qkv.shape
    _, G, S, C = k_cache.shape
    heads = width // C - 2 * G
    group, splits, rows, block_s, block_c, warps = cuda.attention_parting(heads, k_cache)
    part, stat = cuda.attention_parts(k_cache, splits, rows)
    y = qkv.new_empty(B, T, heads * C)
    pdl = early(qkv.device)
    attend_kernel[splits, G, B](
        qkv, cos, sin, k_cache, v_cache, pos, part, stat, arrived, y, T, S, C, C**-0.5 / math.log(2),
        group, SPLIT, block_s, MAX_ROWS, rows, block_c, pdl,
        num_warps=warps, num_stages=2, launch_pdl=pdl,
    )  # fmt: skip
    return y


if triton:
    import triton.language as tl

    from kernels.cuda import attend_part, combined, group_rows
    from kernels.cuda import product as product_part

    @triton.jit(do_not_specialize=["M"])
    def product_kernel(
        x,  # (M, K)
        norm,  # None, or (K,)
        w,  # as for linear_kernel, like scale and zero
        scale,
        zero,
        residual,  # None, or (M, N)
        parts,  # (SPLITS, M, N), or None if SPLITS is 1
        arrived,  # (blocks,), zeros
        y,  # (M, N), or if GATED (M, N / 2)
        M,
        N,
        K,
        eps,
        GATED: tl.constexpr,
        GROUPSIZE: tl.constexpr,
        SPLITS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        WIDTH: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Program (i, s): block i of the product over part s of K; the last of a block also writes it to y."""
        follow(PDL)
        block = tl.program_id(0)
        split = tl.program_id(1)
        m = tl.arange(0, ROWS)
        j = block * BLOCK_N + tl.arange(0, BLOCK_N)
        n = j // 2 + j % 2 * (N // 2) if GATED else j  # gate and up of a column side by side
        factor = row_factors(x, m, M, K, eps, WIDTH) if norm is not None else None
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        acc = product_part(x, norm, factor, w, scale, zero, acc, m, n, split, M, N, K, GROUPSIZE, SPLITS, BLOCK_K)
        if SPLITS > 1:
            inside = (m < M)[:, None] & (j < N)[None, :]
            tl.store(parts + (split * M + m)[:, None] * N + j[None, :], acc, mask=inside)
            if not is_last(arrived + block, SPLITS):
                return
            acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
            for s in tl.static_range(SPLITS):  # unrolled, so that all are loaded at once
                acc += tl.load(parts + (s * M + m)[:, None] * N + j[None, :], mask=inside, other=0)
        out = acc.to(y.dtype.element_ty)
        width = N
        if GATED:
            out = gate(out, ROWS, BLOCK_N)
            j = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            width = N // 2
        inside = (m < M)[:, None] & (j < width)[None, :]
        at = m[:, None] * width + j[None, :]
        if residual is not None:
            out = tl.load(residual + at, mask=inside, other=0).to(tl.float32) + out.to(tl.float32)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def follow(PDL: tl.constexpr):
        """Let the next kernel start, and wait for what the one ahead writes. Every program must, before anything."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def is_last(counter, count):
        """Whether `count` programs have come here; then this one can read what they all wrote. Sets counter back."""
        tl.debug_barrier()  # all of this program's threads have written
        last = tl.atomic_add(counter, 1) == count - 1
        if last:
            tl.store(counter, 0)
        return last

    @triton.jit
    def row_factors(x, m, M, K, eps, WIDTH: tl.constexpr):
        """What normalizes rows m of x (M, K), as in `norm_kernel`: (ROWS,).

        One row after the other, WIDTH columns at a time, because all at once would compute those that aren't there too.
        """
        total = tl.zeros(m.shape, tl.float32)
        chunks = tl.cdiv(K, WIDTH)
        for i in tl.range(0, M * chunks, num_stages=3):
            k = i % chunks * WIDTH + tl.arange(0, WIDTH)
            v = tl.load(x + i // chunks * K + k, mask=k < K, other=0).to(tl.float32)
            total += tl.where(m == i // chunks, tl.sum(v * v, 0), 0)
        return tl.rsqrt(total / K + eps)

    @triton.jit
    def gate(y, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
        """silu of y's even columns times its odd ones, rounded where PyTorch rounds: (ROWS, BLOCK_N / 2)."""
        gate, up = tl.split(tl.reshape(y, (ROWS, BLOCK_N // 2, 2)))
        wide = gate.to(tl.float32)
        return (wide / (1 + tl.exp(-wide))).to(y.dtype) * up

    @triton.jit(do_not_specialize=["T"])
    def attend_kernel(
        qkv,  # (B, T, H + 2G, C)
        cos,  # (T, C / 2)
        sin,  # (T, C / 2)
        k,  # (B, G, S, C)
        v,  # (B, G, S, C)
        pos,  # (T,)
        part,  # (B, G, splits, ROWS, C)
        stat,  # (B, G, splits, ROWS, 2)
        arrived,  # (B G,), zeros
        y,  # (B, T, H, C)
        T,
        S,
        C: tl.constexpr,
        factor,  # of scores, for powers of 2
        GROUP: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_S: tl.constexpr,
        TOKENS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Program (split, g, b): group g over SPLIT cache rows, of which it writes those that are new; the last of
        a group also combines all parts.
        """
        follow(PDL)
        split = tl.program_id(0)
        g = tl.program_id(1)
        b = tl.program_id(2)
        G = tl.num_programs(1)
        last = tl.load(pos + T - 1)
        if split * SPLIT > last:
            return
        c = tl.arange(0, BLOCK_C)
        cache = (b * G + g).to(tl.int64) * S * C
        first = b * T * (GROUP + 2) * G  # of this sequence's rows in qkv
        t = tl.arange(0, TOKENS)
        key = first + t * (GROUP + 2) * G + GROUP * G + g
        write_new(qkv, key, cos, sin, k + cache, v + cache, pos, t, T, c, split, G, C, SPLIT)
        row, t, head, limit, inside = group_rows(pos, g, T, c, C, GROUP, ROWS)
        query = rotated(qkv, first + t * (GROUP + 2) * G + head, cos, sin, t, c, inside, C)
        acc, top, total = attend_part(query, k + cache, v + cache, limit, split, last, c, C, factor, SPLIT, BLOCK_S)
        parts = (b * G + g) * tl.num_programs(0)  # the first of this group's
        out = (parts + split) * ROWS + row
        tl.store(part + out[:, None] * C + c[None, :], acc, mask=inside)
        tl.store(stat + out * 2, top, mask=t < T)
        tl.store(stat + out * 2 + 1, total, mask=t < T)
        count = last // SPLIT + 1
        if is_last(arrived + b * G + g, count):
            value = combined(part, stat, row, c, parts, count, C, ROWS).to(y.dtype.element_ty)
            tl.store(y + ((b * T + t) * GROUP * G + head)[:, None] * C + c[None, :], value, mask=inside)

    @triton.jit
    def write_new(qkv, row, cos, sin, k, v, pos, t, T, c, split, G, C: tl.constexpr, SPLIT: tl.constexpr):
        """Write those of a head's new keys and values, in rows row and row + G of qkv, that belong to part `split` of
        its cache rows k and v (S, C). After it, all of this program's threads can read them.
        """
        p = tl.load(pos + t, mask=t < T, other=0)
        new = ((t < T) & (p // SPLIT == split))[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        tl.store(k + at, rotated(qkv, row, cos, sin, t, c, new, C), mask=new)
        tl.store(v + at, tl.load(qkv + (row + G)[:, None] * C + c[None, :], mask=new, other=0), mask=new)
        tl.debug_barrier()

    @triton.jit
    def rotated(x, row, cos, sin, t, c, inside, C: tl.constexpr):
        """RoPE of rows of x (rows, C) at columns c, by cos and sin at t (as `rotate` in model.py)."""
        HALF: tl.constexpr = C // 2
        at = t[:, None] * HALF + c[None, :] % HALF
        turn = tl.load(sin + at, mask=inside, other=0)
        turn = tl.where((c < HALF)[None, :], -turn, turn)
        own = tl.load(x + row[:, None] * C + c[None, :], mask=inside, other=0)
        other = tl.load(x + row[:, None] * C + (c[None, :] + HALF) % C, mask=inside, other=0)
        y = own.to(tl.float32) * tl.load(cos + at, mask=inside, other=0) + other.to(tl.float32) * turn
        return y.to(own.dtype)
