"""torch.compile, where it works. On a machine that lacks what it needs, functions run as they are."""

import subprocess
from collections.abc import Callable
from typing import Any

import torch

from command import warn
from kernels.cpu import complaint, reason

works = True  # until it fails for want of something
RECOMPILE_LIMIT = 256  # the same functions again for each model, drafter and k


def compiled(function: Callable, dynamic: bool = False) -> Callable:
    """The function by torch.compile, in one graph; or as it is, with a warning, where there is no working compiler.

    dynamic: whether shapes may change without compiling again.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    fast = torch.compile(function, fullgraph=True, dynamic=dynamic)

    def run(*args: Any) -> Any:
        global works
        try:
            if works:
                return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            missing = what_is_missing(error)
            if not missing:
                raise
            works = False
            warn(f"decoding is not compiled, so --compile changes nothing: {missing}")
        return function(*args)  # nothing of it was done yet: compiling comes first

    return run


def what_is_missing(error: Exception) -> str | None:
    """What the machine lacks, if that is why compiling failed, and what to do; None if the reason is another."""
    from torch._inductor import exc

    cause = getattr(error, "inner_exception", error)
    advice = "install g++ and Python's headers (python3-dev), or name a compiler in CXX"
    if isinstance(cause, exc.CppCompileError):
        return f"{complaint(cause.output)}; {advice}"
    if isinstance(cause, (exc.InvalidCxxCompiler, OSError, subprocess.SubprocessError, UnicodeDecodeError)):
        return f"{reason(cause)}; {advice}"
    if isinstance(cause, (exc.TritonMissing, exc.GPUTooOldForTriton)):
        return str(cause)
    return None
