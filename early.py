"""What a command sets up before the imports that take seconds. It imports nothing that takes long itself.

A command calls `begin` first of all. Importing the engine as a library changes nothing of this.
"""

import os
import signal
import sys

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def begin() -> None:
    """Make sure of the standard streams, and let signals end the process in silence."""
    open_streams()
    end_on_signals()


def end_on_signals() -> None:
    """SIGINT and SIGTERM end the process at once: for when there is nothing to clean up. What is ignored stays so."""
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def end(number: int, frame: object) -> None:
    os._exit(CODES[signal.Signals(number)])


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
