"""The GPU's kernels, in Triton, for the products, attention and the norm; the compiler fuses what lies between.

A row's arithmetic is the same whatever goes with it: rows are padded to one size, splits of K and of the cache are cut at fixed
places.
"""

import functools
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for CUDA
    triton = None

MAX_ROWS = 16  # that the kernels take at once


def linear(x, w, scale=None, zero=None):
    """`linear` as one kernel that streams w once. x (..., K) with at most MAX_ROWS rows.

    A product of few columns is split along K, so that there are programs enough for every multiprocessor; what they give is added in
    order, which the compiler does in the kernel that comes next.
    """
    N, K = w.shape[0], x.shape[-1]
    x = x.contiguous()
    groupsize = 1 if zero is None else K // zero.shape[1]
    block_n, block_k = 32, max(512 // x.itemsize, groupsize)
    blocks = triton.cdiv(N, block_n)
    splits = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, blocks)), triton.cdiv(K, block_k))
    parts = x.new_empty(splits, *x.shape[:-1], N, dtype=torch.float32 if splits > 1 else x.dtype)
    warps = x.itemsize  # float32, which tensor cores don't take, wants the registers of more threads
    linear_kernel[blocks, splits](x, w, scale, zero, parts, x.numel() // K, N, K, groupsize, splits, MAX_ROWS, block_n, block_k, num_warps=warps, num_stages=4)
    return functools.reduce(torch.add, parts.unbind()).to(x.dtype)


def attend(q, k_cache, v_cache, pos):
    """`attend` in two kernels: parts of SPLIT cache rows each, of which those beyond the positions end at once, then their sum."""
    B, T, H, C = q.shape
    G, S = k_cache.shape[1:3]
    rows, splits, block_c = triton.next_power_of_2(MAX_ROWS * (H // G)), triton.cdiv(S, SPLIT), max(16, triton.next_power_of_2(C))
    part = torch.empty(B, G, splits, rows, C, dtype=torch.float32, device=q.device)
    stat = torch.empty(B, G, splits, rows, 2, dtype=torch.float32, device=q.device)  # largest score, sum of exponentials
    y, q = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.contiguous()
    warps = 4 if rows <= 64 and q.itemsize == 2 else 8
    attend_kernel[splits, G, B](q, k_cache, v_cache, pos, part, stat, T, S, C, C ** -0.5 / math.log(2), H // G, SPLIT, 64 // q.itemsize, rows, block_c, num_warps=warps, num_stages=2)
    combine_kernel[T, H, B](part, stat, pos, y, splits, C, H // G, SPLIT, rows, block_c, num_warps=1)
    return y


def norm(x, w, eps):
    """`norm`, one program to a row."""
    x = x.contiguous()
    y, D = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    norm_kernel[x.numel() // D,](x, w, y, D, eps, triton.next_power_of_2(D), num_warps=8)
    return y


PROGRAMS = 512  # of a product, at least: about four for each multiprocessor
SPLIT = 256  # cache rows that one program attends to

if triton:
    @triton.jit
    def linear_kernel(x, w, scale, zero, y, M, N, K, GROUPSIZE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        m, n, split = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
        steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(split * steps * BLOCK_K, tl.minimum((split + 1) * steps * BLOCK_K, K), BLOCK_K):
            if zero is None:
                k = start + tl.arange(0, BLOCK_K)
                a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)  # (ROWS, BLOCK_K)
                b = tl.load(w + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)  # (BLOCK_K, BLOCK_N)
                acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
            else:  # a byte has two columns, which lie 16 apart: each half of the bytes is a product of its own
                i = start // 2 + tl.arange(0, BLOCK_K // 2)
                k, g = i // 16 * 32 + i % 16, start // GROUPSIZE + tl.arange(0, BLOCK_K // GROUPSIZE)
                byte = tl.load(w + n[None, :] * (K // 2) + i[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)  # (BLOCK_K/2, BLOCK_N)
                group, valid = n[None, :] * (K // GROUPSIZE) + g[:, None], (n < N)[None, :] & (g < K // GROUPSIZE)[:, None]
                s = spread(tl.load(scale + group, mask=valid, other=0), GROUPSIZE // 2)
                z = spread(tl.load(zero + group, mask=valid, other=0), GROUPSIZE // 2)
                valid = (m < M)[:, None] & (k < K)[None, :]
                a = tl.load(x + m[:, None] * K + k[None, :], mask=valid, other=0)  # (ROWS, BLOCK_K/2)
                acc = tl.dot(a, int4_weight(byte & 15, s, z, a.dtype), acc, input_precision="ieee")
                a = tl.load(x + m[:, None] * K + k[None, :] + 16, mask=valid, other=0)
                acc = tl.dot(a, int4_weight(byte >> 4, s, z, a.dtype), acc, input_precision="ieee")
        if scale is not None and zero is None:
            acc *= tl.load(scale + n, mask=n < N, other=0)[None, :]
        tl.store(y + (split * M + m)[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])

    @triton.jit
    def spread(v, COUNT: tl.constexpr):
        """Each row of v (G, N) COUNT times: (G * COUNT, N)."""
        return tl.reshape(tl.broadcast_to(v[:, None, :], (v.shape[0], COUNT, v.shape[1])), (v.shape[0] * COUNT, v.shape[1]))

    @triton.jit
    def int4_weight(q, scale, zero, dtype: tl.constexpr):
        """The weight in dtype that q (uint8, 0 to 15) stands for."""
        if dtype == tl.bfloat16:  # 0x4300 + q is the bfloat16 128 + q: a conversion would cost more than the bytes
            return tl.fma((q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136, scale, zero)
        return ((q.to(tl.float32) - 8) * scale.to(tl.float32) + zero.to(tl.float32)).to(dtype)

    @triton.jit
    def attend_kernel(q, k, v, pos, part, stat, T, S, C, factor, GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
        split, g, b, G = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
        last = tl.load(pos + T - 1)
        if split * SPLIT > last:
            return
        row, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_C)  # row: the group's heads of every query
        t, head = row // GROUP, g * GROUP + row % GROUP
        limit = tl.load(pos + t, mask=t < T, other=-1)  # a query sees cache rows up to its own position
        query = tl.load(q + ((b * T + t) * (G * GROUP) + head)[:, None] * C + c[None, :], mask=(t < T)[:, None] & (c < C)[None, :], other=0)
        top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        cache = (b * G + g).to(tl.int64) * S * C
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            keys = tl.load(k + cache + s[None, :] * C + c[:, None], mask=(s <= last)[None, :] & (c < C)[:, None], other=0)  # (C, S)
            score = tl.dot(query, keys, input_precision="ieee") * factor  # factor: for powers of 2
            score = tl.where(s[None, :] <= limit[:, None], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that see nothing yet
            weight = tl.exp2(score - shift[:, None])
            keep = tl.exp2(top - shift)
            values = tl.load(v + cache + s[:, None] * C + c[None, :], mask=(s <= last)[:, None] & (c < C)[None, :], other=0)  # (S, C)
            total = total * keep + tl.sum(weight, 1)
            acc = tl.dot(weight.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
            top = new_top
        out = ((b * G + g) * tl.num_programs(0) + split) * ROWS + row
        tl.store(part + out[:, None] * C + c[None, :], acc, mask=(t < T)[:, None] & (c < C)[None, :])
        tl.store(stat + out * 2, top, mask=t < T)
        tl.store(stat + out * 2 + 1, total, mask=t < T)

    @triton.jit
    def combine_kernel(part, stat, pos, y, splits, C, GROUP: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
        t, head, b, T, H = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)
        row, c = t * GROUP + head % GROUP, tl.arange(0, BLOCK_C)
        first = (b * (H // GROUP) + head // GROUP) * splits
        top, total, acc = -float("inf"), 0.0, tl.zeros((BLOCK_C,), tl.float32)
        for split in range(0, tl.load(pos + t) // SPLIT + 1):
            out = (first + split) * ROWS + row
            part_top, part_total = tl.load(stat + out * 2), tl.load(stat + out * 2 + 1)
            new_top = tl.maximum(top, part_top)
            keep, add = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
            acc = acc * keep + tl.load(part + out * C + c, mask=c < C, other=0) * add
            total = total * keep + part_total * add
            top = new_top
        tl.store(y + ((b * T + t) * H + head) * C + c, (acc / total).to(y.dtype.element_ty), mask=c < C)

    @triton.jit
    def norm_kernel(x, w, y, D, eps, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        row = tl.program_id(0) * D
        v = tl.load(x + row + i, mask=i < D, other=0).to(tl.float32)
        v = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = v.to(y.dtype.element_ty).to(tl.float32) * tl.load(w + i, mask=i < D, other=0).to(tl.float32)
        tl.store(y + row + i, v.to(y.dtype.element_ty), mask=i < D)
