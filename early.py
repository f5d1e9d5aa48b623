"""What a command sets up before the imports that take seconds. It imports nothing that takes long itself.

A command calls `begin` first of all. Importing the engine as a library changes nothing of this.
"""

import _signal  # `signal` without its enums, which take longer to import than all the rest
import errno
import os
import sys
from types import TracebackType

CODES = {_signal.SIGINT: 130, _signal.SIGTERM: 143}
NO_MEMORY = "can't allocate memory", "Cannot allocate memory", "out of memory"
NO_ROOM = "failed to map segment from shared object"  # a reason that isn't memory would follow it
HOW_TO_INSTALL = "pip install -r requirements.txt, and for scripts/ -r scripts/requirements.txt"


def begin() -> None:
    """Let signals end the process in silence, make sure of what it needs, and let imports fail in one line."""
    end_on_signals()
    open_streams()
    check_folder()
    find_modules()
    sys.excepthook = report


def end_on_signals() -> None:
    """SIGINT and SIGTERM end the process at once: for when there is nothing to clean up. What is ignored stays so."""
    for number in CODES:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, end)


def end(number: int, frame: object) -> None:
    os._exit(CODES[number])


def open_streams() -> None:
    """Open /dev/null for standard streams that are closed. Otherwise the next file to be opened would take their
    place, and what is meant for them would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def check_folder() -> None:
    """End in one line if the current folder is gone: libraries that PyTorch loads would end the process."""
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: the current folder: {error.strerror}; change to one that exists")


def find_modules() -> None:
    """Make what lies beside the running script importable, also with Python's options -P and -I."""
    folder = os.path.dirname(os.path.realpath(sys.argv[0]))
    if folder not in sys.path:
        sys.path.insert(0, folder)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that ends the process: in one line what the machine lacks, all else as Python does."""
    lack = what_is_lacking(error)
    if lack:
        print(f"error: {lack}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def what_is_lacking(error: BaseException) -> str | None:
    """What this machine lacks, and what to do, if that is the reason for an error; None if the reason is another."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name or error} is missing: {HOW_TO_INSTALL}"
    if is_out_of_memory(error):
        return "out of memory: take a smaller model, fewer --max_new_tokens, or a lower --precision"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no more threads can be started here: raise the limit on processes (ulimit -u)"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the CPU or a GPU. What PyTorch and the system's loader raise only its text tells apart."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (RuntimeError, ImportError)):
        return str(error).endswith(NO_ROOM) or any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError)
