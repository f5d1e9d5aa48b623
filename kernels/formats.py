"""How weights are stored in int8 and int4: layout, rounding, widening.

int8: symmetric, w[n, k] = q[n, k] scale[n], with q from -127 to 127.
int4: asymmetric in groups of k, w[n, k] = (q[n, k] - 8) scale[n, g] + zero[n, g], with q from 0 to 15. Of every 32 weights of a
row, byte j of 16 holds number j in its lower half and number j + 16 in its upper.
"""

import torch

GROUPSIZES = (32, 64, 128, 256)


def int8_rows(w):
    """w (N, K) as int8 (N, K) and float32 scales (N,), symmetric, so that the largest of a row is 127 scales."""
    scale = torch.cat([part.abs().amax(1) for part in w.split(8192)]).float().clamp(min=1e-12) / 127  # in parts: little memory beside w
    return torch.cat([(part.float() / s[:, None]).round().to(torch.int8) for part, s in zip(w.split(8192), scale.split(8192))]), scale


def int4_range(w):
    """The scale and zero, each (N, G) bfloat16, that fit w (N, G, groupsize): its smallest value becomes 0, its largest 15."""
    low, high = w.float().aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-8).to(torch.bfloat16)
    return scale, (low + 8 * scale.float()).to(torch.bfloat16)


def int4_round(w, scale, zero):
    """q (...) uint8 whose value is nearest to w (...), for scale and zero that broadcast with it."""
    return ((w.float() - zero.float()) / scale.float() + 8).round().clamp(0, 15).to(torch.uint8)


def pack(q):
    """q (N, K) uint8, 0 to 15, as bytes (N, K / 2) in the order of the file."""
    low, high = q.view(len(q), -1, 2, 16).unbind(2)
    return (low | high << 4).flatten(1)


def int4_groups(w, groupsize):
    """w (N, K) as (weight, scale, zero) in int4, each weight rounded to the nearest."""
    groups = w.unflatten(1, (-1, groupsize))
    scale, zero = int4_range(groups)
    return pack(int4_round(groups, scale[..., None], zero[..., None]).flatten(1)), scale, zero


def dequantize(w, scale, zero, dtype):
    """The weight (N, K) that `linear` multiplies with, in dtype, for quantized w, scale and zero."""
    if zero is None:
        return (w * scale[:, None]).to(dtype)
    halves = torch.stack((w.view(len(w), -1, 16) & 15, w.view(len(w), -1, 16) >> 4), 2)  # (N, K / 32, 2, 16)
    q = halves.view(*scale.shape, -1).to(torch.float32) - 8  # (N, G, groupsize)
    return (q * scale[..., None].float() + zero[..., None].float()).flatten(1).to(dtype)
