"""The GPU's kernels, in Triton: products, attention, the norm. The compiler of PyTorch fuses what lies between them.

A row's arithmetic is the same whatever goes with it: rows are padded to one number, and K and the cache are split at
fixed places.
"""

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for CUDA
    triton = None

MAX_ROWS = 16  # that the kernels take at once
PROGRAMS = 512  # that a product is split into, at least: about four for each multiprocessor
BLOCK_N = 32  # columns of a product that one program computes
SPLIT = 256  # cache rows that one program attends to
MOST_STAGES = 4  # steps of a product, at most, of which a program reads the later ones while it computes the first
MOST_SHARED = 227 * 1024  # an H100's, where probe.py has not looked

# What probe.py has found: bytes of shared memory that one program can have, and whether the kernels can be launched.
shared_memory: dict[torch.device, int] = {}
works: dict[tuple[torch.device, torch.dtype], bool] = {}


def takes(x: Tensor) -> bool:
    """Whether the kernels have been seen to run on x's device, with its dtype."""
    return works.get((x.device, x.dtype), False)


def fail_on(x: Tensor) -> bool:
    """Whether the kernels have been seen not to run on x's device, with its dtype."""
    return not works.get((x.device, x.dtype), True)


def linear(x: Tensor, w: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """`linear` as one kernel that streams w once. x (..., K) has at most MAX_ROWS rows.

    A product of few columns is split along K too, so that there are enough programs for all multiprocessors. The parts
    are added in order; the compiler does so in the kernel that comes next.
    """
    N, K = w.shape[0], x.shape[-1]
    x = x.contiguous()
    M = x.numel() // K
    groupsize, block_k, blocks, splits, stages = parting(x, w, zero)
    parts = x.new_empty(splits, *x.shape[:-1], N, dtype=torch.float32 if splits > 1 else x.dtype)
    linear_kernel[blocks, splits](
        x, w, scale, zero, parts, M, N, K,
        groupsize, splits, MAX_ROWS, BLOCK_N, block_k,
        num_warps=x.itemsize, num_stages=stages,
    )  # fmt: skip
    return functools.reduce(torch.add, parts.unbind()).to(x.dtype)


def parting(x: Tensor, w: Tensor, zero: Tensor | None) -> tuple[int, int, int, int, int]:
    """How the product of x (..., K) and w (N, ...) is parted: int4's groupsize (else 1), the columns of K in a step,
    the blocks of BLOCK_N columns of N, the parts of K, and the steps that a program has on their way.

    There are so many of these that two programs fit into a multiprocessor's shared memory. A program has x.itemsize
    warps: tensor cores don't take float32, which needs the registers of more threads.
    """
    K = x.shape[-1]
    groupsize = 1 if zero is None else K // zero.shape[1]
    block_k = max(512 // x.itemsize, groupsize)
    blocks = triton.cdiv(w.shape[0], BLOCK_N)
    splits = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, blocks)), triton.cdiv(K, block_k))
    step = block_k * MAX_ROWS * x.itemsize + block_k * BLOCK_N * w.itemsize * w.shape[1] // K  # bytes
    room = shared_memory.get(x.device, MOST_SHARED)
    stages = min(MOST_STAGES, 1 + max(1, room // (2 * step)))
    return groupsize, block_k, blocks, splits, stages


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor) -> Tensor:
    """`attend` in two kernels: each program takes SPLIT cache rows, then their results are combined.

    Programs whose rows lie beyond all positions end at once.
    """
    B, T, H, C = q.shape
    G, S = k_cache.shape[1:3]
    group, splits, rows, block_s, block_c, warps = attention_parting(H, k_cache)
    part, stat = attention_parts(k_cache, splits, rows)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = q.contiguous()
    attend_kernel[splits, G, B](
        q, k_cache, v_cache, pos, part, stat, T, S, C, C**-0.5 / math.log(2),
        group, SPLIT, block_s, rows, block_c,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    combine_kernel[T, H, B](part, stat, pos, y, splits, C, group, SPLIT, rows, block_c, num_warps=1)
    return y


def attention_parting(heads: int, k_cache: Tensor) -> tuple[int, int, int, int, int, int]:
    """How attention of `heads` to k_cache (B, G, S, C) is parted: the query heads that share a key/value head, the
    parts of the cache, a program's rows of queries, its cache rows in a step, its width, and its warps.
    """
    _, G, S, C = k_cache.shape
    rows = triton.next_power_of_2(MAX_ROWS * heads // G)
    warps = 4 if rows <= 64 and k_cache.itemsize == 2 else 8
    width = max(16, triton.next_power_of_2(C))
    return heads // G, triton.cdiv(S, SPLIT), rows, 64 // k_cache.itemsize, width, warps


def attention_parts(k_cache: Tensor, splits: int, rows: int) -> tuple[Tensor, Tensor]:
    """Room for what programs leave each other: the weighted sums of values (B, G, splits, rows, C); the largest scores
    and the sums of exponentials (B, G, splits, rows, 2).
    """
    B, G, _, C = k_cache.shape
    part = torch.empty(B, G, splits, rows, C, dtype=torch.float32, device=k_cache.device)
    return part, torch.empty(B, G, splits, rows, 2, dtype=torch.float32, device=k_cache.device)


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """`norm`, with one program for each row."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    D = x.shape[-1]
    rows = x.numel() // D
    norm_kernel[rows,](x, w, y, D, eps, triton.next_power_of_2(D), num_warps=8)
    return y


if triton:

    @triton.jit
    def linear_kernel(
        x,  # (M, K)
        w,  # (N, K); int4: (N, K / 2)
        scale,  # None; int8: (N,); int4: (N, K / GROUPSIZE)
        zero,  # None; int4: (N, K / GROUPSIZE)
        y,  # (SPLITS, M, N)
        M,
        N,
        K,
        GROUPSIZE: tl.constexpr,
        SPLITS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Program (i, s) computes BLOCK_N columns of y[s], the product over part s of K."""
        m = tl.arange(0, ROWS)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        split = tl.program_id(1)
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        acc = product(x, None, None, w, scale, zero, acc, m, n, split, M, N, K, GROUPSIZE, SPLITS, BLOCK_K)
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(y + (split * M + m)[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def product(
        x,  # (M, K)
        norm,  # None, or (K,): x is first times factor, rounded, and times norm
        factor,  # (ROWS,)
        w,
        scale,
        zero,
        acc,  # (ROWS, BLOCK_N), zeros
        m,  # (ROWS,)
        n,  # (BLOCK_N,)
        split,
        M,
        N,
        K,
        GROUPSIZE: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """acc and the product of rows m of x and rows n of w, over part `split` of K. Of int4 norm must be None."""
        steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
        for start in range(split * steps * BLOCK_K, tl.minimum((split + 1) * steps * BLOCK_K, K), BLOCK_K):
            if zero is None:
                k = start + tl.arange(0, BLOCK_K)
                a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
                if norm is not None:
                    a = (a.to(tl.float32) * factor[:, None]).to(a.dtype).to(tl.float32)
                    a = (a * tl.load(norm + k, mask=k < K, other=0).to(tl.float32)[None, :]).to(x.dtype.element_ty)
                b = tl.load(w + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)
                acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
            else:
                acc = int4_step(x, w, scale, zero, acc, m, n, start, M, N, K, GROUPSIZE, BLOCK_K)
        if scale is not None and zero is None:
            acc *= tl.load(scale + n, mask=n < N, other=0)[None, :]
        return acc

    @triton.jit
    def int4_step(x, w, scale, zero, acc, m, n, start, M, N, K, GROUPSIZE: tl.constexpr, BLOCK_K: tl.constexpr):
        """acc (ROWS, BLOCK_N) and the product over columns start to start + BLOCK_K.

        A byte has two columns, 16 apart. The lower halves of the bytes are one product, the upper halves another.
        In an order like Marlin's (2408.11743), words whose eight columns are 32 apart, the loop would take 594 to 614
        clocks in groups of 128 and 256 rather than 750 to 760 (counted in compiled code, as in BENCHMARKS.md). What
        stands in the way: weights would have to be laid out anew as they are loaded, as the CPU's are.
        """
        i = start // 2 + tl.arange(0, BLOCK_K // 2)  # bytes
        k = i // 16 * 32 + i % 16  # columns of the lower halves
        g = start // GROUPSIZE + tl.arange(0, BLOCK_K // GROUPSIZE)
        byte = tl.load(w + n[None, :] * (K // 2) + i[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        group = n[None, :] * (K // GROUPSIZE) + g[:, None]
        valid = (n < N)[None, :] & (g < K // GROUPSIZE)[:, None]
        s = spread(tl.load(scale + group, mask=valid, other=0), GROUPSIZE // 2)  # (BLOCK_K / 2, BLOCK_N)
        z = spread(tl.load(zero + group, mask=valid, other=0), GROUPSIZE // 2)
        valid = (m < M)[:, None] & (k < K)[None, :]
        a = tl.load(x + m[:, None] * K + k[None, :], mask=valid, other=0)  # (ROWS, BLOCK_K / 2)
        acc = tl.dot(a, int4_weight(byte & 15, s, z, a.dtype), acc, input_precision="ieee")
        a = tl.load(x + m[:, None] * K + k[None, :] + 16, mask=valid, other=0)
        return tl.dot(a, int4_weight(byte >> 4, s, z, a.dtype), acc, input_precision="ieee")

    @triton.jit
    def spread(v, COUNT: tl.constexpr):
        """Each row of v (G, N) COUNT times: (G * COUNT, N)."""
        wide = tl.broadcast_to(v[:, None, :], (v.shape[0], COUNT, v.shape[1]))
        return tl.reshape(wide, (v.shape[0] * COUNT, v.shape[1]))

    @triton.jit
    def int4_weight(q, scale, zero, dtype: tl.constexpr):
        """The weights in dtype that q (uint8, 0 to 15) stands for."""
        if dtype == tl.bfloat16:
            # The bits 0x4300 + q are the bfloat16 128 + q. A conversion would cost more than reading the bytes.
            return tl.fma((q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136, scale, zero)
        return ((q.to(tl.float32) - 8) * scale.to(tl.float32) + zero.to(tl.float32)).to(dtype)

    @triton.jit
    def attend_kernel(
        q,  # (B, T, H, C)
        k,  # (B, G, S, C)
        v,  # (B, G, S, C)
        pos,  # (T,)
        part,  # (B, G, splits, ROWS, C)
        stat,  # (B, G, splits, ROWS, 2)
        T,
        S,
        C,
        factor,  # of scores, for powers of 2
        GROUP: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_S: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Program (split, g, b): the queries of group g over SPLIT cache rows, as in FlashAttention (2205.14135)."""
        split = tl.program_id(0)
        g = tl.program_id(1)
        b = tl.program_id(2)
        G = tl.num_programs(1)
        last = tl.load(pos + T - 1)
        if split * SPLIT > last:
            return
        c = tl.arange(0, BLOCK_C)
        row, t, head, limit, inside = group_rows(pos, g, T, c, C, GROUP, ROWS)
        query = tl.load(q + ((b * T + t) * (G * GROUP) + head)[:, None] * C + c[None, :], mask=inside, other=0)
        cache = (b * G + g).to(tl.int64) * S * C
        acc, top, total = attend_part(query, k + cache, v + cache, limit, split, last, c, C, factor, SPLIT, BLOCK_S)
        out = ((b * G + g) * tl.num_programs(0) + split) * ROWS + row
        tl.store(part + out[:, None] * C + c[None, :], acc, mask=inside)
        tl.store(stat + out * 2, top, mask=t < T)
        tl.store(stat + out * 2 + 1, total, mask=t < T)

    @triton.jit
    def group_rows(pos, g, T, c, C, GROUP: tl.constexpr, ROWS: tl.constexpr):
        """The rows of the program for group g of heads, one for each of them at each token: a row's number, token,
        head, and the last cache row that it sees (ROWS,), and which of its numbers (ROWS, BLOCK_C) there are.
        """
        row = tl.arange(0, ROWS)
        t = row // GROUP
        limit = tl.load(pos + t, mask=t < T, other=-1)  # a query sees cache rows up to its own position
        return row, t, g * GROUP + row % GROUP, limit, (t < T)[:, None] & (c < C)[None, :]

    @triton.jit
    def attend_part(query, k, v, limit, split, last, c, C, factor, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr):
        """query (ROWS, BLOCK_C) over part `split` of a head's cache rows k and v (S, C), for each row of query up to
        limit (ROWS,), at most to `last`: the weighted sum of values, the largest score and the sum of exponentials.
        """
        ROWS: tl.constexpr = query.shape[0]
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros(query.shape, tl.float32)
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            key_mask = (s <= last)[None, :] & (c < C)[:, None]
            keys = tl.load(k + s[None, :] * C + c[:, None], mask=key_mask, other=0)  # (BLOCK_C, BLOCK_S)
            score = tl.dot(query, keys, input_precision="ieee") * factor
            score = tl.where(s[None, :] <= limit[:, None], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf: a row that has seen nothing yet
            weight = tl.exp2(score - shift[:, None])
            keep = tl.exp2(top - shift)
            value_mask = (s <= last)[:, None] & (c < C)[None, :]
            values = tl.load(v + s[:, None] * C + c[None, :], mask=value_mask, other=0)  # (BLOCK_S, BLOCK_C)
            total = total * keep + tl.sum(weight, 1)
            acc = tl.dot(weight.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
            top = new_top
        return acc, top, total

    @triton.jit
    def combine_kernel(
        part,  # (B, G, splits, ROWS, C)
        stat,  # (B, G, splits, ROWS, 2)
        pos,  # (T,)
        y,  # (B, T, H, C)
        splits,
        C,
        GROUP: tl.constexpr,
        SPLIT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Program (t, head, b) combines the parts of one query, from the first cache row to its position."""
        t = tl.program_id(0)
        head = tl.program_id(1)
        b = tl.program_id(2)
        T = tl.num_programs(0)
        H = tl.num_programs(1)
        row = tl.full((1,), t * GROUP + head % GROUP, tl.int32)
        c = tl.arange(0, BLOCK_C)
        first = (b * (H // GROUP) + head // GROUP) * splits
        value = combined(part, stat, row, c, first, tl.load(pos + t) // SPLIT + 1, C, ROWS)
        out = ((b * T + t) * H + head) * C + c[None, :]
        tl.store(y + out, value.to(y.dtype.element_ty), mask=c[None, :] < C)

    @triton.jit
    def combined(part, stat, row, c, first, count, C, ROWS: tl.constexpr):
        """The result of each row of queries, at columns c, from `count` parts, which begin at number `first`."""
        top = tl.full(row.shape, float("-inf"), tl.float32)
        total = tl.zeros(row.shape, tl.float32)
        acc = tl.zeros((row.shape[0], c.shape[0]), tl.float32)
        for split in range(0, count):
            out = (first + split) * ROWS + row
            part_top = tl.load(stat + out * 2)
            part_total = tl.load(stat + out * 2 + 1)
            value = tl.load(part + out[:, None] * C + c[None, :], mask=c[None, :] < C, other=0)
            new_top = tl.maximum(top, part_top)
            keep = tl.exp2(top - new_top)
            add = tl.exp2(part_top - new_top)
            acc = acc * keep[:, None] + value * add[:, None]
            total = total * keep + part_total * add
            top = new_top
        return acc / total[:, None]

    @triton.jit
    def norm_kernel(x, w, y, D, eps, BLOCK: tl.constexpr):
        """Program i: row i of x (rows, D), normalized and times w (D,), into y (rows, D)."""
        i = tl.arange(0, BLOCK)
        row = tl.program_id(0) * D
        v = tl.load(x + row + i, mask=i < D, other=0).to(tl.float32)
        v = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = v.to(y.dtype.element_ty).to(tl.float32) * tl.load(w + i, mask=i < D, other=0).to(tl.float32)
        tl.store(y + row + i, v.to(y.dtype.element_ty), mask=i < D)
