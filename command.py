"""What all commands share: how bad input ends them, and what they check before they begin."""

import os
import signal
import sys
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user gave is wrong; the message is the one line to show them."""


def run_command(main):
    """Run a command's `main()`; bad input ends in one line on stderr and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clears away what is half-written
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            sys.exit("error: out of memory: take a smaller model, fewer --max_new_tokens, or a lower --precision")
        raise
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the package {error.name} is missing: pip install -r requirements.txt, and for scripts/ -r scripts/requirements.txt"
        )
    except KeyboardInterrupt:
        sys.exit(130)


def check_memory(nbytes, device, what):
    """Raise InputError if `nbytes` more, for `what`, are not free on the device, where the system tells."""
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").is_file():
        free = next(
            (int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable")), nbytes
        )
    else:
        return
    if nbytes > free:
        raise InputError(f"{what} needs {nbytes / 1e9:.2f} GB, but {device} has only {free / 1e9:.2f} GB free")


def check_device(device):
    """Raise InputError unless tensors can be put on the device."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own
        raise InputError(
            f"--device {device}: not available here ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def check_writable(option, path):
    """Raise InputError unless a file can be written at `path`, which is left as it was. For results that come late."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: can't be written; name a file in an existing, writable folder")
