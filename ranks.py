"""The processes that decode or train together: how they start, meet, talk and end.

`torchrun --standalone --nproc_per_node=N COMMAND` starts them, and `start` connects them (NCCL on GPUs, gloo on the
CPU). The first speaks for all. If one fails, is killed or is stopped, all of them end, in one line.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from command import InputError, first_line
from command import run_command as run_alone

TIMEOUT = timedelta(minutes=10)  # of a collective; what may take longer waits in `gather`
FOREVER = timedelta(days=365)
PATIENCE = timedelta(minutes=3)  # how long the processes look for each other when they start
ROLL_CALL = 2.0  # seconds in which each says that it is there, when a collective has failed
GRACE = 5.0  # seconds that a lost store may take to say so
MOST_PROCESSES = 1024
_failing = threading.Lock()

Span = tuple[int, int]  # [begin, end)


@dataclass
class Shard:
    """One process's part: number `rank` of `size`. A single process, the default, has everything."""

    rank: int = 0
    size: int = 1
    group: str = ""  # the processes' name in torch.distributed
    direct: bool = False  # whether they are GPUs that read each other's memory
    store: Any = None  # torch.distributed's, where they leave each other messages; None for a single process
    messages: int = field(default=0, repr=False)  # how many each has left so far
    local: int = 0  # its number on this machine
    parent: int | None = None  # torchrun's process id, if torchrun started it

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks; a value is anything that JSON holds.

        All processes must call it. It waits for them as long as it takes.
        """
        if self.size == 1:
            return [value]
        self.messages += 1
        self.store.set(f"{self.messages}/{self.rank}", json.dumps(value))
        keys = [f"{self.messages}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, FOREVER)
        return [json.loads(self.store.get(key)) for key in keys]

    def share(self, value: Any) -> Any:
        """The first process's value, on all of them; a value is anything that JSON holds. All must call it."""
        return self.gather(value)[0]

    def device(self, name: str) -> str:
        """Where this process computes, if the user says `name`: of several on GPUs each has its own.

        Raises InputError if there are too few GPUs.
        """
        if self.size > 1 and name.startswith("cuda"):
            gpus = torch.cuda.device_count()
            if self.local >= gpus:
                raise InputError(f"--device {name}: {gpus} GPUs here, but at least {self.local + 1} processes")
            return f"cuda:{self.local}"
        return name

    def part(self, total: int) -> Span:
        """This process's of `total` things, as even as may be."""
        return total * self.rank // self.size, total * (self.rank + 1) // self.size

    def fail(self, why: str | int) -> NoReturn:
        """End this process, and with it all of them. why: as for sys.exit; only the first to fail prints it."""
        _failing.acquire()  # and never release: a second thread that gets here waits for the end
        deadline(GRACE, why)
        with suppress(OSError):  # nobody reads it any more
            sys.__stdout__.flush()  # type: ignore[union-attr]
        if self.is_first_to_fail():
            end(why)
        end(why if isinstance(why, int) else 1)

    def is_first_to_fail(self) -> bool:
        """Whether this process is the one to print why. True once for all; if their store is lost, perhaps for several.

        The store is lost with the process that holds it: torchrun, or without it the first.
        """
        if not self.orphaned():
            with suppress(RuntimeError):
                # A clone, because another thread may be waiting in the store itself.
                return self.store.clone().add("failed", 1) == 1
        return self.local == 0 or not self.orphaned()

    def orphaned(self) -> bool:
        """Whether torchrun, which started this process, is gone."""
        return self.parent not in (None, os.getppid())

    def outlive_nobody(self) -> None:
        """From now on end this process within about a second of torchrun's end, which nobody else would tell it."""

        def wait() -> None:
            while not self.orphaned():
                time.sleep(1)
            self.fail("error: torchrun was killed")

        threading.Thread(target=wait, daemon=True).start()

    def lost_contact(self, error: Exception) -> str:
        """What to print about a collective that failed. It names the processes that don't answer for a while."""
        reason = re.sub(r"^\[.*?\] ", "", first_line(error, type(error).__name__)).split(". ")[0]
        unknown = f"error: lost contact with another process: {reason}"
        deadline(ROLL_CALL + GRACE, unknown)
        with suppress(RuntimeError):
            store = self.store.clone()
            store.set(f"lost/{self.rank}", "")
            time.sleep(ROLL_CALL)
            silent = [rank for rank in range(self.size) if not store.check([f"lost/{rank}"])]
            if silent:
                return f"error: lost contact with {processes(silent)}: killed, stopped, or too slow ({reason})"
        return unknown

    def watch(self) -> None:
        """From now on end this process on SIGINT and SIGTERM, even while it waits for others.

        torchrun sends SIGTERM when another process has failed.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(write)

        def wait() -> None:
            while (number := os.read(read, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
                pass
            if number == signal.SIGINT:
                self.fail(130)
            self.fail("error: another process failed or was killed, or torchrun was told to stop")

        threading.Thread(target=wait, daemon=True).start()


def can_read_each_other(size: int) -> bool:
    """Whether all processes are on this machine, which has several GPUs that read each other's memory."""
    gpus = range(torch.cuda.device_count())
    if len(gpus) < 2 or os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


def end(why: str | int) -> NoReturn:
    """End this process at once, whatever it is at. why: as for sys.exit."""
    if isinstance(why, str):
        print(why, file=sys.__stderr__, flush=True)
    os._exit(why if isinstance(why, int) else 1)


def deadline(seconds: float, why: str | int) -> threading.Timer:
    """`end` this process then, unless the timer is cancelled. For what has no time-out of its own."""
    timer = threading.Timer(seconds, end, [why])
    timer.daemon = True
    timer.start()
    return timer


def processes(ranks: list[int]) -> str:
    """Their names, as in "process 1, 2"."""
    return f"process {', '.join(map(str, ranks))}"


def number(name: str, least: int, most: int) -> int:
    """A number that torchrun left in the environment. Raises InputError if it is missing or out of range."""
    text = os.environ.get(name)
    if text is None:
        raise InputError(f"{name} is not set")
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise InputError(f"{name} is {text!r}, not a number from {least} to {most}")
    return int(text)


def world_size() -> int:
    """How many processes torchrun has started, this one included; 1 without torchrun.

    Raises InputError if WORLD_SIZE is no such number.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    try:
        return number("WORLD_SIZE", 1, MOST_PROCESSES)
    except InputError as error:
        raise InputError(f"{error}: unset it, or let torchrun set it") from None


def master_address() -> tuple[str, int]:
    """(host, port) where the processes meet. Raises InputError if it can't be one."""
    host, port = os.environ.get("MASTER_ADDR", ""), number("MASTER_PORT", 1, 65535)
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise InputError(f"MASTER_ADDR is {host!r}: {error}") from None
    return host, port


@cache
def start() -> Shard:
    """This process's Shard. If torchrun started several processes, it connects them.

    Raises InputError if something else set WORLD_SIZE, or if they don't find each other.
    """
    size = world_size()
    if size == 1:
        return Shard()
    # Until `watch` a signal ends the process at once: while it waits for others, Python code could not run.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        rank = number("RANK", 0, size - 1)
        local = number("LOCAL_RANK", 0, size - 1)
        address = master_address()
    except InputError as error:
        what = f"this is not one of {size} processes that torchrun started"
        raise InputError(f"WORLD_SIZE is {size}, but {what} ({error})") from None
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    shard = Shard(rank, size, local=local, parent=parent)
    where = f"MASTER_ADDR:MASTER_PORT {address[0]}:{address[1]}"
    late = deadline(2 * PATIENCE.total_seconds(), f"error: {where}: no answer; something else may use the port")
    try:
        connect(shard, address)
    except (OSError, RuntimeError) as error:
        why = f"{where}: can't connect {size} processes ({first_line(error, type(error).__name__)})"
        if shard.store:
            shard.fail(f"error: {why}")
        raise InputError(why) from None
    finally:
        late.cancel()
    return shard


def connect(shard: Shard, address: tuple[str, int]) -> None:
    """Complete a Shard that knows only who it is. Raises OSError or RuntimeError if that fails."""
    if shard.rank:
        await_listener(address)
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    # After a failure `torchrun --max_restarts` starts them anew, and its store still has the messages of those before.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    shard.store = dist.PrefixStore("layerskip", store)
    if shard.parent:
        shard.outlive_nobody()
    meet(shard)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=shard.rank, world_size=shard.size, timeout=TIMEOUT)
    store.set_timeout(TIMEOUT)
    shard.group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    shard.direct = can_read_each_other(shard.size)


def await_listener(address: tuple[str, int]) -> None:
    """Wait until the store's process listens. Raises OSError if it doesn't begin to within PATIENCE.

    PyTorch can wait by itself, but writes stack traces meanwhile.
    """
    end = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def meet(shard: Shard) -> None:
    """Wait until all processes are there; end this one if some don't come within PATIENCE, or come twice."""
    if shard.store.add(f"here/{shard.rank}", 1) > 1:
        shard.fail(f"error: RANK is {shard.rank} in two processes")
    keys = [f"here/{rank}" for rank in range(shard.size)]
    try:
        shard.store.wait(keys, PATIENCE)
    except dist.DistStoreError:
        absent = [rank for rank, key in enumerate(keys) if not shard.store.check([key])]
        shard.fail(f"error: {processes(absent)} of {shard.size} did not start within {PATIENCE.seconds} seconds")


def run_shard(main: Callable[[], None], shard: Shard, watch: bool) -> None:
    """Run `main` in one of several processes; if it fails, all of them end. watch: as in `run_command`."""

    def watched() -> None:
        if watch:
            shard.watch()  # only here, because the handler of `run_alone` would end this process without a word
        main()

    if shard.rank:  # the first speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        run_alone(watched)
    except SystemExit as exit:
        if exit.code:
            shard.fail(exit.code)
    except Exception as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            shard.watch()  # torchrun may know more, and must not wait
            shard.fail(shard.lost_contact(error))
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    shard.gather(None)  # none ends while another still expects to hear from it
    dist.destroy_process_group()


def run_command(main: Callable[[], None], watch: bool = True) -> None:
    """command.py's `run_command` for a command that torchrun may start in several processes.

    The first process speaks for all, and if one fails, all end. watch: end on signals at once; False: main takes them.
    """

    def together() -> None:
        shard = start()
        if shard.size == 1:
            main()
            return
        run_shard(main, shard, watch)

    run_alone(together)
