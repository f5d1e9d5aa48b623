"""Tensor parallelism: N processes, each with a part of every matrix, which decode one sequence together.

`split` gives each its part: of the heads and of the feed-forward width, so that a layer needs two sums over the
processes (after `wo` and `w2`), and of the vocabulary, whose logits are put together once per pass. Every process has
the norms, and the embedding, of which a token reads one row. After each of these steps all processes have the same
numbers, bit for bit, so that they take the same decisions.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kernels
from command import InputError
from kernels.formats import GROUPSIZES
from ranks import Shard, Span

if TYPE_CHECKING:
    from model import Attention, Block, FeedForward, ModelConfig, Transformer


# Collectives. They take the name of the group, so that the compiler traces them and a CUDA graph records them.


def gather(x: Tensor, shard: Shard) -> Tensor:
    """x (...) of all processes, in the order of their ranks: (N, ...), the same on each."""
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), shard.size, shard.group)
    return torch.ops._c10d_functional.wait_tensor(parts).view(shard.size, *x.shape)


def broadcast(x: Tensor, shard: Shard) -> Tensor:
    """x of the first process, on each."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.broadcast(x, 0, shard.group))


def all_reduce(x: Tensor, shard: Shard) -> Tensor:
    """The sum of all processes' x (..., D), the same on each.

    Few rows are added in the order of the ranks. A library's order depends on where in memory a number lies, and so on
    how many rows there are.
    """
    if x.numel() > kernels.MAX_ROWS * x.shape[-1]:
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", shard.group))
    if shard.direct and x.device.type == "cuda" and x.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.layerskip.one_shot(x, shard.group)
    total: Any = sum(gather(x, shard).float().unbind())
    return total.to(x.dtype)


def all_gather(x: Tensor, shard: Shard) -> Tensor:
    """All processes' parts x (..., V/N) of the logits, side by side: (..., V), the same on each."""
    return gather(x, shard).movedim(0, -2).flatten(-2)


@cache
def shared_buffer(numel: int, dtype: torch.dtype, device: torch.device, group: str) -> Tensor:
    """A buffer (numel,) for each GPU that all of the group can read."""
    from torch.distributed import _symmetric_memory as symmetric

    buffer = symmetric.empty(numel, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, group)  # type: ignore[arg-type]  # a group's name is a str of its own type
    return buffer


@torch.library.custom_op("layerskip::one_shot", mutates_args=())
def one_shot(x: torch.Tensor, group: str) -> torch.Tensor:
    """`all_reduce` in one step on GPUs that read each other's memory. Each adds all parts in the order of the ranks."""
    buffer = shared_buffer(kernels.MAX_ROWS * x.shape[-1], x.dtype, x.device, group)
    own = buffer[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(own, x.contiguous(), "sum", group)


@one_shot.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def span(things: Span, width: int, offset: int = 0) -> Span:
    """The rows or columns of these things, if each has `width` of them and the first begins at `offset`."""
    begin, end = things
    return offset + begin * width, offset + end * width


# Parts of a model.


def split(whole: "Transformer", shard: Shard) -> None:
    """Make a Transformer without weights (on the meta device) this process's part of it.

    Raises InputError if it can't be split over so many processes.
    """
    if shard.size == 1:
        return
    c = whole.config
    whole.shard = shard
    if c.n_head % shard.size or (c.n_kv_head % shard.size and shard.size % c.n_kv_head):
        heads = f"{c.n_head} query and {c.n_kv_head} key/value heads"
        raise InputError(f"{heads} can't be split over {shard.size} processes")
    if c.vocab_size % shard.size:
        raise InputError(f"a vocabulary of {c.vocab_size} can't be split over {shard.size} processes")
    split_layers(whole.layers, c, shard)
    whole.head.keep(rows=[shard.part(c.vocab_size)], combine=partial(all_gather, shard=shard))


def split_layers(layers: "Iterable[Block]", config: "ModelConfig", shard: Shard) -> None:
    """Make layers without weights this process's parts of them. Raises InputError if they can't be split."""
    for layer in layers:
        split_attention(layer.attention, config.groupsize, shard)
        split_feed_forward(layer.ffn, config.intermediate_size, shard)


def split_attention(attention: "Attention", groupsize: int | None, shard: Shard) -> None:
    """Keep this process's query heads and the key/value heads that go with them."""
    H, G, C = attention.heads, attention.kv_heads, attention.head_dim
    attention.heads = H // shard.size
    attention.kv_heads = max(1, G // shard.size)
    columns = attention.heads * C  # of wo
    if columns % attention.wo.unit:
        fitting = ["--mode int8", *(f"--groupsize {size}" for size in GROUPSIZES if columns % size == 0)]
        raise InputError(
            f"int4 in groups of {groupsize} can't be split over {shard.size} processes, "
            f"which have {columns} columns of wo each: quantize with {fitting[-1]}"
        )
    heads = shard.part(H)
    first = shard.rank * G // shard.size  # if there are fewer key/value heads than processes, some have the same one
    kv_heads = first, first + attention.kv_heads
    attention.wqkv.keep(rows=[span(heads, C), span(kv_heads, C, H * C), span(kv_heads, C, (H + G) * C)])
    attention.wo.keep(columns=span(heads, C), combine=partial(all_reduce, shard=shard))


def split_feed_forward(ffn: "FeedForward", width: int, shard: Shard) -> None:
    """Keep this process's part of the feed-forward width, in whole groups of int4."""
    unit = ffn.w2.unit
    if width // unit < shard.size:
        what = f"a feed-forward width of {width} in units of {unit}"
        raise InputError(f"{what} can't be split over {shard.size} processes")
    units = shard.part(width // unit)
    ffn.w13.keep(rows=[span(units, unit), span(units, unit, width)])
    ffn.w2.keep(columns=span(units, unit), combine=partial(all_reduce, shard=shard))
