"""The CPU's kernels: cpu.cpp, built with g++ at first use and cached, which has all of a model's layers as one operation."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def build():
    """Compile SOURCE for this processor and this PyTorch, once; returns the path of the shared library."""
    torch_dir = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
    if not compiler:
        raise OSError("no C++ compiler found")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if platform.machine() == "x86_64" and b"clang" not in version:
        flags.append("--param=avoid-fma-max-bits=0")  # GCC breaks up some chains of FMA on AMD: rows would round differently
    cpuinfo = Path("/proc/cpuinfo")
    native = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "") if cpuinfo.is_file() else ""
    key = hashlib.sha256(repr((SOURCE.read_text(), compiler, flags, version, torch.__version__, platform.platform(), native)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip-fast"
    library = folder / f"kernels-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / "kernels.so"
            include = torch_dir / "include"
            subprocess.run([*compiler, *flags, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(built),
                            f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True)
            built.replace(library)  # whole or not at all, also when two processes build at once
    return library


ready = None  # whether the CPU library is loaded; None: not tried yet


def prepare():
    """Build and load the CPU library, once; returns whether it is there. Says why if it isn't."""
    global ready
    if ready is None:
        try:
            torch.ops.load_library(build())
            torch.library.register_fake("layerskip::linear", lambda x, w, scale=None, zero=None: x.new_empty(*x.shape[:-1], w.shape[0]))
            torch.library.register_fake("layerskip::layers", lambda x, *_: torch.empty_like(x))
            torch.library.register_fake("layerskip::norm", lambda x, w, eps: torch.empty_like(x))
            ready = True
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[0])
            warnings.warn(f"decoding runs on plain PyTorch, which is slower: the C++ kernels can't be built ({reason})")
            ready = False
    return ready
