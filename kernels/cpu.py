"""The CPU's kernels: builds cpu.cpp with g++ at first use, keeps the library for later, and loads it."""

import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from command import InputError, warn
from files import replacing, scratch_folder

SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(torch.__file__).parent
ANSWER_SECONDS, BUILD_SECONDS = 60, 900  # a compiler that takes longer to say its version, or to compile, hangs
LONGEST_REASON = 300  # characters of a compiler's message
ANOTHER = "install g++ 11 or newer, or name another compiler in CXX"

ready: bool | None = None  # whether the library is loaded; None: not tried yet


class BuildError(Exception):
    """Why the library can't be built, and what to do."""


def words_of(variable: str) -> list[str]:
    """The words in an environment variable, as a shell would take them. Raises BuildError if it wouldn't."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildError(f"{variable}={text}: {error}; correct {variable}, or unset it") from None


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or g++, or c++. Raises BuildError if there is none."""
    named = words_of("CXX")
    if named:
        return named
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        raise BuildError("no C++ compiler found; install g++")
    return [found]


@contextmanager
def guarded(group: int) -> Iterator[None]:
    """Kill a group of processes if the body fails or this process ends in it, by whatever signal.

    A shell sees to it: it waits for the end of a pipe, which no process outlives.
    """
    command = ["/bin/sh", "-c", f"read line; kill -KILL -{group}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as shell:
        yield
        shell.kill()


def run(command: list[str], seconds: int, **environment: str) -> str:
    """What a compiler says. Raises BuildError if it fails, or takes longer."""
    try:
        with (
            subprocess.Popen(
                command,
                env={**os.environ, "LC_ALL": "C", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
            guarded(process.pid),
        ):
            output = process.communicate(timeout=seconds)[0].decode(errors="replace").strip()
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}; {ANOTHER}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]}: did not end within {seconds} seconds; {ANOTHER}") from None
    if process.returncode:
        advice = "make room, or set TMPDIR to a folder with room" if "No space left" in output else ANOTHER
        raise BuildError(f"{command[0]}: {complaint(output) or f'exit code {process.returncode}'}; {advice}")
    return output


def complaint(output: str) -> str:
    """The one line that the messages of a compiler that failed come down to."""
    lines = output.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[0])[:LONGEST_REASON]


def compile_flags(version: str) -> list[str]:
    """version: what the compiler says of itself. Raises BuildError for CXXFLAGS that can't be read."""
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    if platform.machine() == "x86_64" and "clang" not in version:
        # GCC breaks up some chains of FMA on AMD. Then a row would be rounded differently beside other rows.
        flags.append("--param=avoid-fma-max-bits=0")
    return flags + words_of("CXXFLAGS")


def processor() -> str:
    """The features of this processor, which `-march=native` compiles for, where Linux lists them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):  # x86's name, ARM's
                return line
    return ""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compile_library(compiler: list[str], flags: list[str], work: Path) -> Path:
    """Compile SOURCE in the folder. Returns the library's path. Raises BuildError."""
    include, built = TORCH / "include", work / "kernels.so"
    headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    command = [*compiler, *flags, *headers, str(SOURCE), "-o", str(built), *libraries]
    run(command, BUILD_SECONDS, TMPDIR=str(work))
    if not built.is_file():
        raise BuildError(f"{compiler[0]} wrote no library; {ANOTHER}")
    return built


# Libraries are kept as kernels-INPUTS-CONTENT.so: digests of what they were built from, and of the file itself. So one
# that is damaged, which would end the process when it is loaded, is known by its name.


def cache_folder() -> Path | None:
    """Where libraries are kept, or None if this user has no such place."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # the standard of that variable ignores others
        with suppress(RuntimeError):  # no home folder is known
            caches = Path.home() / ".cache"
    return caches / "layerskip-fast" if caches.is_absolute() else None


def find(folder: Path | None, inputs: str) -> Path | None:
    """The library that was built from these inputs, if it is in the folder and whole."""
    with suppress(OSError):
        for library in folder.glob(f"kernels-{inputs}-*.so") if folder else ():
            if library.stem.endswith(digest(library.read_bytes())):
                return library
            library.unlink()
    return None


def keep(built: Path, folder: Path | None, inputs: str) -> Path:
    """Move a library to the folder; returns where it is. Where that can't be done, says so and leaves it."""
    try:
        if folder is None:
            raise InputError("there is no home folder")
        library = folder / f"kernels-{inputs}-{digest(built.read_bytes())}.so"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(library) as partial:
            shutil.copyfile(built, partial)
        return library
    except (InputError, OSError) as error:
        advice = "set XDG_CACHE_HOME to a folder that can be written"
        warn(f"the C++ kernels can't be kept, so each process builds them again ({reason(error)}); {advice}")
        return built


def scratch(otherwise: Path | None) -> AbstractContextManager[Path]:
    """A folder to build in: a temporary one, in `otherwise` where the system's can't be written.

    Raises OSError if none can be.
    """
    try:
        beside = Path(tempfile.gettempdir())
    except OSError:
        if otherwise is None:
            raise
        beside = otherwise
    return scratch_folder(beside, "kernels")


def load() -> None:
    """Load the library, which is compiled for this processor and this PyTorch unless that was done before.

    Raises BuildError if it can't be compiled, OSError if no file can be written or the library not be loaded.
    """
    compiler = find_compiler()
    version = run([*compiler, "--version"], ANSWER_SECONDS)
    flags = compile_flags(version)
    built_from = SOURCE.read_bytes(), compiler, flags, version, torch.__version__, platform.platform(), processor()
    inputs, folder = digest(repr(built_from).encode()), cache_folder()
    library = find(folder, inputs)
    if library:
        torch.ops.load_library(library)
        return
    with ExitStack() as stack:
        if folder:
            with suppress(OSError, NotImplementedError):  # without a lock several processes build it, each for itself
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(folder / f"kernels-{inputs}.lock", timeout=BUILD_SECONDS))
        library = find(folder, inputs)  # built by another process meanwhile
        if not library:
            work = stack.enter_context(scratch(folder))
            library = keep(compile_library(compiler, flags, work), folder, inputs)
        torch.ops.load_library(library)


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def prepare() -> bool:
    """Build and load the library, once. Returns whether it is there, and warns why if it isn't."""
    global ready
    if ready is None:
        ready = False
        try:
            load()
            ready = True
        except (BuildError, OSError) as error:
            warn(f"decoding runs on plain PyTorch, which is slower: the C++ kernels can't be built ({reason(error)})")
    return ready


def takes(x: Tensor) -> bool:
    """Whether the library is loaded, and computes with tensors of x's device and dtype."""
    return bool(ready) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def huge_pages(nbytes: int) -> Tensor:
    """Memory (nbytes,) uint8 that the system may back by huge pages. In pages of 4 KB weights stream a fifth slower."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
