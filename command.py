"""What all commands share: how bad input ends them, and what they check before they begin."""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

import early
from values import Number, filled_path, whole

MOST_THREADS = 1024
DEVICES = ("cpu", "cuda", "mps", "xpu")
BROKEN_PIPE = 141  # the exit code of a command whose reader has left, as of one that SIGPIPE ends


class InputError(ValueError):
    """Something the user gave is wrong; the message is the one line to show them."""


def first_line(error: BaseException, otherwise: str) -> str:
    """The first line of an error's message; `otherwise` if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise


def warn(message: str) -> None:
    """Print a warning in one line, whatever a library's message has in it. That it can't be printed stops nothing."""
    with suppress(OSError):
        print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn any error of a library into an InputError: each has its own for damaged files, and Rust's are no Exceptions.

    what: what the message says is wrong. InputError passes, as does what isn't the input's fault.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, ModuleNotFoundError):
        raise
    except BaseException as error:
        if early.is_out_of_memory(error):
            raise
        raise InputError(f"{what} ({first_line(error, type(error).__name__)})") from None


@contextmanager
def unheard() -> Iterator[None]:
    """Drop what libraries write to standard error by themselves, as Rust does before its error arrives here."""
    try:
        kept = os.dup(2)
    except OSError:  # closed: there is nothing to drop
        yield
        return
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that it gives, so that what is under way is finished first. In other
    threads than the main one, which have no signals, it does nothing.
    """
    caught: list[int] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Help(argparse.HelpFormatter):
    """Help that is short: what an option takes is N for a whole number, X for another one, else PATH or TEXT."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    # What argparse's own MetavarTypeHelpFormatter overrides too.
    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return "N" if action.type.read is int else "X"
        return "PATH" if action.type is filled_path else "TEXT"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors: one line, as of all other bad input."""

    def __init__(self, *, formatter_class: Any = Help, **how: Any) -> None:
        super().__init__(formatter_class=formatter_class, **how)

    def error(self, message: str) -> NoReturn:
        """message: argparse's, such as "argument --steps: 0: must be ..."."""
        before, _, about = message.partition("argument ")
        if not before and about:
            message = about.replace(": ", " ", 1)
        raise InputError(message)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main()`. Bad input ends in one line on stderr and exit code 1, Ctrl-C in 130, SIGTERM in 143.

    While it runs, both are exceptions, so that half-written files are removed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    early.open_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what the terminal can't show is no reason to lose a run
    torch.set_num_threads(usable_threads())
    # What PyTorch says of itself when it reads a quantized tensor, which ends in an error.
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.quantize_per_tensor")
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        early.end_on_signals()


def run(main: Callable[[], None]) -> None:
    """Run `main` and write out what it has printed. Bad input becomes a SystemExit with its one line."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except InputError as error:
        sys.exit(error_line(str(error)))
    except BrokenPipeError:
        drop_output()
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        lack = early.what_is_lacking(error)
        if lack:
            sys.exit(error_line(lack))
        if not isinstance(error, OSError):
            raise
        drop_output()
        sys.exit(error_line(f"{error.filename or 'input or output'}: {error.strerror or error}"))


def error_line(message: str) -> str:
    """What a command says last. It is one line, also where a file's name has several."""
    return f"error: {' '.join(message.splitlines())}"


def drop_output() -> None:
    """If printing failed, drop what is still to be printed: at its end Python would try again, and complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())


def quota(cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' time this container may use, or None if nothing limits it or the system doesn't tell."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups v2, v1
        try:
            text = " ".join((cgroups / name).read_text() for name in names)
            allowed, period = map(float, text.split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if allowed > 0 and period > 0:
            return allowed / period
    return None


def usable_threads() -> int:
    """How many threads this process should compute with: PyTorch's number, which respects OMP_NUM_THREADS and the cores
    that the process may run on, but no more than the container's quota.
    """
    threads = torch.get_num_threads()
    allowed = quota()
    return threads if allowed is None else max(1, min(threads, int(allowed)))


def add_threads(add: Callable) -> None:
    """add: `add_argument` of a parser."""
    add(
        "--threads",
        type=whole(1, MOST_THREADS),
        default=usable_threads(),
        metavar="N",
        help="threads to compute with on the CPU (default here: %(default)s)",
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None if the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").is_file():
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    return None


def check_memory(nbytes: int, device: str | torch.device, what: str) -> None:
    """Raise InputError if `nbytes` more, for `what`, are not free on the device. Passes if the system doesn't tell."""
    device = torch.device(device)
    free = free_memory(device)
    if free is not None and nbytes > free:
        raise InputError(f"{what} needs {nbytes / 1e9:.2f} GB, but {device} has only {free / 1e9:.2f} GB free")


def check_device(device: str) -> None:
    """Raise InputError unless tensors can be put on the device."""
    if device.partition(":")[0] not in DEVICES:  # PyTorch knows more words, most of them for what is gone
        raise InputError(f"--device {device}: must be {', '.join(DEVICES)}, or one of several, such as cuda:1")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own
        reason = first_line(error, type(error).__name__)
        raise InputError(f"--device {device}: not available here ({reason})") from None
