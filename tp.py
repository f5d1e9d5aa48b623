"""Tensor parallelism: N processes, each with a part of every matrix, which decode one sequence together.

`torchrun --standalone --nproc_per_node=N generate.py ...` starts the processes, `start` connects them (NCCL on GPUs, gloo on the CPU), and
`Shard.split` gives each its part: of the heads and of the feed-forward width, so that a layer needs two sums over the processes (after
`wo` and `w2`), and of the vocabulary, whose logits are put together once per pass. Every process has the embedding, of which a token
reads one row, and the norms. What all processes then have is the same, bit for bit, so that they take every decision alike.
"""

import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial

import torch
import torch.distributed as dist

import kernels
from command import InputError, run_command as run_alone
from kernels.formats import GROUPSIZES

TIMEOUT = timedelta(minutes=10)  # of a collective; what may take longer waits in `gather`
FOREVER = timedelta(days=365)
_failing = threading.Lock()


# Collectives. They go by the name of the group, so that the compiler traces them and a CUDA graph records them.


def gather(x, shard):
    """x (...) of all processes, in the order of their ranks: (N, ...), the same on each."""
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), shard.size, shard.group)
    return torch.ops._c10d_functional.wait_tensor(parts).view(shard.size, *x.shape)


def broadcast(x, shard):
    """x of the first process, on each."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.broadcast(x, 0, shard.group))


def all_reduce(x, shard):
    """The sum of all processes' x (..., D), the same on each. Few rows are added in the order of the ranks, as a library would add them in
    one that depends on where in memory a number lies, and so on how many rows there are."""
    if x.numel() > kernels.MAX_ROWS * x.shape[-1]:
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", shard.group))
    if shard.direct and x.device.type == "cuda" and x.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.layerskip.one_shot(x, shard.group)
    return sum(gather(x, shard).float().unbind()).to(x.dtype)


def all_gather(x, shard):
    """All processes' parts x (..., V/N) of the logits, side by side: (..., V), the same on each."""
    return gather(x, shard).movedim(0, -2).flatten(-2)


@cache
def shared_buffer(numel, dtype, device, group):
    """A buffer (numel,) for each GPU that all of the group can read."""
    from torch.distributed import _symmetric_memory as symmetric

    buffer = symmetric.empty(numel, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, group)
    return buffer


@torch.library.custom_op("layerskip::one_shot", mutates_args=())
def one_shot(x: torch.Tensor, group: str) -> torch.Tensor:
    """`all_reduce` in one step on GPUs that read each other's memory: each reads all parts and adds them in the order of the ranks."""
    buffer = shared_buffer(kernels.MAX_ROWS * x.shape[-1], x.dtype, x.device, group)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer[: x.numel()].view(x.shape), x.contiguous(), "sum", group)


@one_shot.register_fake
def _(x, group):
    return torch.empty_like(x)


@dataclass
class Shard:
    """One process's part: number `rank` of `size`. A single process, the default, has everything."""

    rank: int = 0
    size: int = 1
    group: str = ""  # the processes' name in torch.distributed
    direct: bool = False  # whether they are GPUs that read each other's memory
    store: dist.Store | None = None  # where they leave each other messages
    messages: int = field(default=0, repr=False)  # left by each so far

    def gather(self, value):
        """The values of all processes, in the order of their ranks; of what JSON holds. All must call it; it waits as long as it takes."""
        if self.size == 1:
            return [value]
        self.messages += 1
        self.store.set(f"{self.messages}/{self.rank}", json.dumps(value))
        keys = [f"{self.messages}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, FOREVER)
        return [json.loads(self.store.get(key)) for key in keys]

    def share(self, value):
        """The first process's value, on all of them; of what JSON holds. All must call it."""
        return self.gather(value)[0]

    def device(self, name):
        """Where this process computes, if the user names `name`: of several on GPUs each has its own."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and name.startswith("cuda") else name

    def split(self, whole):
        """Make `whole`, a Transformer without weights (on the meta device) this process's part of it. Raises InputError if it can't be split so."""
        if self.size == 1:
            return
        c, n, r = whole.config, self.size, self.rank
        whole.shard = self
        if c.n_head % n or c.n_kv_head % n and n % c.n_kv_head:
            raise InputError(f"{c.n_head} query and {c.n_kv_head} key/value heads can't be split over {n} processes")
        if c.vocab_size % n:
            raise InputError(f"a vocabulary of {c.vocab_size} can't be split over {n} processes")

        def part(total):
            """This process's of `total` things: [begin, end)."""
            return total * r // n, total * (r + 1) // n

        def span(things, width, offset=0):
            """The rows or columns [begin, end) of things [begin, end), each of `width`, the first at `offset`."""
            return offset + things[0] * width, offset + things[1] * width

        C, heads, kv = (
            c.head_dim,
            part(c.n_head),
            r * c.n_kv_head // n,
        )  # of fewer key/value heads than processes, some have the same
        kv_heads = kv, kv + max(1, c.n_kv_head // n)
        qkv = [span(heads, C), span(kv_heads, C, c.n_head * C), span(kv_heads, C, (c.n_head + c.n_kv_head) * C)]
        for layer in whole.layers:
            attention, ffn = layer.attention, layer.ffn
            own = c.n_head // n * C
            if own % attention.wo.unit:
                fitting = [f"--groupsize {g}" for g in GROUPSIZES if own % g == 0]
                raise InputError(
                    f"int4 in groups of {c.groupsize} can't be split over {n} processes, which have {own} columns of wo each: quantize with {(fitting or ['--mode int8'])[-1]}"
                )
            unit = ffn.w2.unit
            if c.intermediate_size // unit < n:
                raise InputError(
                    f"a feed-forward width of {c.intermediate_size} in units of {unit} can't be split over {n} processes"
                )
            width = part(c.intermediate_size // unit)  # as even as may be
            attention.heads, attention.kv_heads = c.n_head // n, max(1, c.n_kv_head // n)
            attention.wqkv.keep(rows=qkv)
            attention.wo.keep(columns=span(heads, C), combine=partial(all_reduce, shard=self))
            ffn.w13.keep(rows=[span(width, unit), span(width, unit, c.intermediate_size)])
            ffn.w2.keep(columns=span(width, unit), combine=partial(all_reduce, shard=self))
        whole.head.keep(rows=[part(c.vocab_size)], combine=partial(all_gather, shard=self))

    def fail(self, why):
        """End this process, and with it all of them. why: as for sys.exit; only the first to fail says it."""
        _failing.acquire()  # never released: of two threads that get here the second waits for the end
        sys.__stdout__.flush()
        code = why if isinstance(why, int) else 1
        with suppress(RuntimeError):  # the store is lost if torchrun was killed
            if (
                self.store.clone().add("failed", 1) == 1 and code is not why
            ):  # the store itself may be waiting in another thread
                print(why, file=sys.__stderr__, flush=True)
        os._exit(code)

    def watch(self):
        """From now on end this process on SIGINT and SIGTERM, which torchrun sends when another one has failed, even while it waits for others."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(write)

        def wait():
            while (number := os.read(read, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
                pass
            self.fail(
                130
                if number == signal.SIGINT
                else "error: another process failed or was killed, or torchrun was told to stop"
            )

        threading.Thread(target=wait, daemon=True).start()


@cache
def start():
    """This process's Shard: one of several where torchrun started several, which it connects. Raises InputError if something else set WORLD_SIZE."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Shard()
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # until `watch`: while it waits for others it could do nothing on the way out
    try:
        store, rank, _ = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {size}, but this is not one of {size} processes that torchrun started ({error})"
        ) from None
    gpus = range(torch.cuda.device_count())
    direct = (
        len(gpus) > 1
        and os.environ.get("LOCAL_WORLD_SIZE") == str(size)
        and all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)
    )
    return Shard(rank, size, dist.group.WORLD.group_name, direct, dist.PrefixStore("layerskip", store))


def run_command(main, watch=True):
    """model.py's `run_command` for a command that torchrun may start in several processes: the first speaks for all, and if one fails, all end.

    watch: end on signals at once; False if main takes them itself.
    """

    def together():
        shard = start()
        if shard.size == 1:
            return main()
        if watch:
            shard.watch()
        if shard.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            run_alone(main)
        except SystemExit as exit:
            if exit.code:
                shard.fail(exit.code)
        except Exception as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                shard.fail(f"error: lost contact with another process: {str(error).splitlines()[0].split('. ')[0]}")
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        shard.gather(None)  # none ends while another still hears from it
        dist.destroy_process_group()

    run_alone(together)
