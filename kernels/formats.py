"""How weights are stored in int8 and int4: layout, rounding, widening.

int8: symmetric, w[n, k] = q[n, k] scale[n], with q from -127 to 127.
int4: asymmetric in groups of k, w[n, k] = (q[n, k] - 8) scale[n, g] + zero[n, g], with q from 0 to 15. Every 32 weights
of a row are 16 bytes. Byte j holds number j in its lower half and number j + 16 in its upper half.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPSIZES = (32, 64, 128, 256)
PANEL = 16  # outputs that the CPU's kernels take side by side


def int8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) as int8 (N, K) and float32 scales (N,). A row's largest weight becomes 127 or -127."""
    parts = w.split(8192)  # rows at a time, to need little memory beside w
    scale = torch.cat([part.abs().amax(1) for part in parts]).float().clamp(min=1e-12) / 127
    rounded = []
    for part, s in zip(parts, scale.split(8192), strict=True):
        rounded.append((part.float() / s[:, None]).round().to(torch.int8))
    return torch.cat(rounded), scale


def int4_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, each (N, G) bfloat16, for w (N, G, groupsize): its smallest value becomes 0, its largest 15."""
    low, high = w.float().aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-8).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    return scale, zero


def int4_round(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q (...) uint8, the nearest to w (...), for scale and zero that broadcast with w."""
    return ((w.float() - zero.float()) / scale.float() + 8).round().clamp(0, 15).to(torch.uint8)


def pack(q: Tensor) -> Tensor:
    """q (N, K) uint8, 0 to 15, as bytes (N, K / 2) in the order of the file."""
    low, high = q.view(len(q), -1, 2, 16).unbind(2)
    return (low | high << 4).flatten(1)


def unpack(w: Tensor) -> Tensor:
    """The reverse of `pack`."""
    pairs = w.view(len(w), -1, 16)
    return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)  # (N, K / 32, 2, 16) before


def int4_groups(w: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """w (N, K) as (weight, scale, zero) in int4, each weight rounded to the nearest."""
    groups = w.unflatten(1, (-1, groupsize))
    scale, zero = int4_range(groups)
    q = int4_round(groups, scale[..., None], zero[..., None])  # (N, G, groupsize)
    return pack(q.flatten(1)), scale, zero


def panels(
    w: Tensor, scale: Tensor, zero: Tensor | None, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(weight, scale, zero) of a quantized weight as the CPU's kernels read it: in panels of 16 outputs side by side.

    int8: (N / 16, K, 16), scale (N / 16, 1, 16). int4: (N / 16, K / 8, 16) int32, each with eight columns of an output,
    as q - 8 in four bits with a sign, the first in the lowest ones; scale and zero (N / 16, G, 16). N is rounded up.
    in_place: take the tensors' own memory again, where the result fits.
    """
    if zero is None:
        return rearrange(w, side_by_side, in_place), rearrange(scale[:, None], side_by_side, in_place), None
    w = rearrange(w, in_lanes, in_place)
    return w, rearrange(scale, side_by_side, in_place), rearrange(zero, side_by_side, in_place)


def rearrange(t: Tensor, order: Callable[[Tensor], Tensor], in_place: bool) -> Tensor:
    """All rows of t (N, X) in an order, many at a time, to need little memory beside t."""
    count, some = -(-len(t) // PANEL), 64 * PANEL
    row = t[0].nbytes
    memory = torch.empty(count * PANEL * row, dtype=torch.uint8, device=t.device)
    if in_place and t.nbytes == memory.nbytes:
        memory = t.contiguous().view(torch.uint8).flatten()
    dtype = t.dtype
    for begin in range(0, len(t), some):
        part = order(t[begin : begin + some])
        dtype = part.dtype
        part = part.view(torch.uint8).flatten()
        memory[begin * row :][: len(part)] = part
    return memory.view(dtype).view(count, -1, PANEL)


def side_by_side(t: Tensor) -> Tensor:
    """t (N, X) as (N / 16, X, 16)."""
    t = F.pad(t, (0, 0, 0, -len(t) % PANEL))
    return t.view(-1, PANEL, t.shape[1]).transpose(1, 2).contiguous()


def in_lanes(w: Tensor) -> Tensor:
    """Rows (N, K / 2), packed as in the file, as (N / 16, K / 8, 16) int32."""
    q = side_by_side(unpack(w) ^ 8)
    lanes = torch.zeros(q.shape[0], q.shape[1] // 8, PANEL, dtype=torch.int32, device=w.device)
    for i in range(8):
        lanes |= q[:, i::8].int() << 4 * i
    return lanes


def rows_of_panels(t: Tensor) -> Tensor:
    """The rows (N, X) that panels (N / 16, X, 16) hold, N as rounded up; numbers of int4 from 0 to 15."""
    if t.dtype == torch.int32:
        t = torch.stack([t >> 4 * i & 15 ^ 8 for i in range(8)], 2).flatten(1, 2).to(torch.int8)  # (N / 16, K, 16)
    return t.transpose(1, 2).flatten(0, 1)


def round_weight(w: Tensor, quantization: str, groupsize: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """w (N, K) as (weight, scale, zero), each weight rounded to the nearest.

    quantization: "int8", or "int4" in groups of groupsize, which becomes int8 where they don't divide K. int8 has no
    zero.
    """
    if quantization == "int8" or groupsize is None or w.shape[1] % groupsize:
        return *int8_rows(w), None
    return int4_groups(w, groupsize)


def dequantize(w: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (N, K), in dtype, that quantized w, scale and zero stand for, in panels (N rounded up) or as in the
    file. zero is None for int8.
    """
    if w.dim() == 3:
        w, scale = rows_of_panels(w), rows_of_panels(scale)
        zero = None if zero is None else rows_of_panels(zero)
    elif zero is not None:
        w = unpack(w)
    if zero is None:
        return (w * scale.view(-1, 1)).to(dtype)
    q = w.reshape(*scale.shape, -1).to(torch.float32) - 8  # (N, G, groupsize)
    return (q * scale[..., None].float() + zero[..., None].float()).flatten(1).to(dtype)
