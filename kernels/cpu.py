"""The CPU's kernels: builds cpu.cpp with g++ at first use, keeps the library for later, and loads it."""

import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(torch.__file__).parent

ready: bool | None = None  # whether the library is loaded; None: not tried yet


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or g++, or c++. Raises OSError if there is none."""
    command = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    words = shlex.split(command or "")
    if not words:
        raise OSError("no C++ compiler found")
    return words


def compile_flags(version: bytes) -> list[str]:
    """version: what the compiler says of itself."""
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    if platform.machine() == "x86_64" and b"clang" not in version:
        # GCC breaks up some chains of FMA on AMD. Then a row would be rounded differently beside other rows.
        flags.append("--param=avoid-fma-max-bits=0")
    return flags


def processor() -> str:
    """The features of this processor, which `-march=native` compiles for, where Linux lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return ""
    return next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")


def library_path(*inputs: object) -> Path:
    """Where the library is kept that was built from these inputs."""
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "layerskip-fast" / f"kernels-{key}.so"


def compile_library(compiler: list[str], flags: list[str], library: Path) -> None:
    include = TORCH / "include"
    headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        built = Path(work) / "kernels.so"
        command = [*compiler, *flags, *headers, str(SOURCE), "-o", str(built), *libraries]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(library)  # whole or not at all, also when two processes build at once


def build() -> Path:
    """Compile SOURCE for this processor and this PyTorch, unless that was done before. Returns the library's path."""
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    flags = compile_flags(version)
    source = SOURCE.read_text()
    library = library_path(source, compiler, flags, version, torch.__version__, platform.platform(), processor())
    if not library.is_file():
        compile_library(compiler, flags, library)
    return library


def load() -> None:
    torch.ops.load_library(build())


def prepare() -> bool:
    """Build and load the library, once. Returns whether it is there, and warns why if it isn't."""
    global ready
    if ready is None:
        try:
            load()
            ready = True
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[0])
            message = "decoding runs on plain PyTorch, which is slower: the C++ kernels can't be built"
            warnings.warn(f"{message} ({reason})", stacklevel=1)
            ready = False
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
