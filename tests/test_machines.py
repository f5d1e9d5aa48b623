"""Odd machines: no compiler or a broken one, no place for the library, a damaged library; torch.compile without g++."""

import io
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from functools import partial

import pytest
import torch
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

import generate
import kernels
from conftest import ROOT, call
from kernels import compiler, cpu

# Compilers that are shell scripts. The last argument but two of a command is the library that it writes.
VERSION = 'case "$*" in *--version*) echo "g++ 12.2.0"; exit 0;; esac\n'
BROKEN = {
    "fails at once": ("echo 'illegal instruction' >&2; exit 132", "illegal instruction; install g++"),
    "fails without a word": ("exit 3", "exit code 3; install g++"),
    "fails at the source": (VERSION + "echo one; echo 'x.cpp: error: no such header' >&2; exit 1", "no such header;"),
    "speaks Latin-1": (VERSION + "printf 'Fehler: error: ung\\374ltig\\n' >&2; exit 1", "ung\ufffdltig; install g++"),
    "has no room": (VERSION + "echo 'error: x.s: No space left on device'; exit 1", "set TMPDIR to a folder with room"),
    "writes nothing": (VERSION, "wrote no library; install g++"),
    "writes no library": (VERSION + "echo text > $out", "can't be built"),
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A folder with a source that takes no time to compile; nothing is built yet, and what is will be kept in cache/"""
    (tmp_path / "small.cpp").write_text("int answer() { return 42; }\n")
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "small.cpp")
    monkeypatch.setattr(cpu, "ready", None)
    monkeypatch.setattr(torch.ops, "loaded_libraries", set())
    monkeypatch.setattr(tempfile, "tempdir", None)  # looked up again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def prepare():
    """(whether the library is loaded, the warning without its end)"""
    with redirect_stderr(io.StringIO()) as said:
        ready = cpu.prepare()
        assert cpu.prepare() == ready, "a second time, and no second warning"
    lines = said.getvalue().splitlines()
    assert len(lines) <= 1 and all(line.startswith("warning: ") for line in lines), lines
    return ready, "".join(lines)


def kept(machine):
    return sorted(machine.glob("cache/layerskip-fast/kernels-*.so"))


def script(machine, text):
    """A compiler: the path of a program that runs the shell commands; $out is where it should write."""
    path = machine / "compiler"
    path.write_text(f'#!/bin/sh\nfor word; do [ "$last" = -o ] && out=$word; last=$word; done\n{text}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_compiler_is_one_line(case, machine, monkeypatch):
    text, words = BROKEN[case]
    monkeypatch.setenv("CXX", script(machine, text))
    ready, line = prepare()
    assert not ready and "plain PyTorch, which is slower" in line and words in line
    assert not kept(machine) or case == "writes no library"


@pytest.mark.parametrize("first", ["", VERSION])
@pytest.mark.slow
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(first, machine, monkeypatch):
    os.mkfifo(machine / "alive")
    alive = os.open(machine / "alive", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("CXX", script(machine, first + f"exec 3> {machine}/alive; sleep 600 & sleep 600"))
    for limit in ("ANSWER_SECONDS", "BUILD_SECONDS"):
        monkeypatch.setattr(cpu, limit, 3)
    ready, line = prepare()
    assert not ready and "did not end within 3 seconds; install g++" in line
    assert select.select([alive], [], [], 20)[0], "a process still has the pipe open"
    os.close(alive)


@pytest.mark.parametrize(
    "variable,value,words",
    [
        ("CXX", "/no/such/g++", "/no/such/g++: No such file or directory; install g++"),
        ("CXX", "/no/such/g++ -O2", "/no/such/g++: No such file or directory; install g++"),
        ("CXX", "g++ '-O2", "No closing quotation; correct CXX"),
        ("CXX", "/", "/: Permission denied; install g++"),
        ("CXX", str(ROOT / "README.md"), "README.md: Permission denied; install g++"),
        ("CXX", "cat", "install g++"),
        ("CXXFLAGS", "'", "No closing quotation; correct CXXFLAGS"),
        ("CXXFLAGS", "-march=abacus", "abacus"),
        ("PATH", "/no/such/folder", "no C++ compiler found; install g++"),
    ],
)
def test_odd_variables_are_one_line(variable, value, words, machine, monkeypatch):
    monkeypatch.setenv(variable, value)
    ready, line = prepare()
    assert not ready and words in line and not kept(machine)


def test_a_library_is_built_once_and_by_all_its_inputs(machine, monkeypatch):
    for flags in ("", "-DONE", "-march=x86-64" if os.uname().machine == "x86_64" else "-O1", ""):
        monkeypatch.setenv("CXXFLAGS", flags)
        monkeypatch.setattr(cpu, "ready", None)
        assert prepare() == (True, "")
    assert len(kept(machine)) == 3
    stamps = [library.stat().st_mtime_ns for library in kept(machine)]
    monkeypatch.setenv("CXX", "g++ -DTWO")
    monkeypatch.setattr(cpu, "ready", None)
    assert prepare() == (True, "") and len(kept(machine)) == 4
    assert set(stamps) < {library.stat().st_mtime_ns for library in kept(machine)}


def test_cxxflags_have_the_last_word(machine, monkeypatch):
    monkeypatch.setenv("CXX", script(machine, VERSION + f'echo "$@" > {machine}/said; exit 1'))
    monkeypatch.setenv("CXXFLAGS", "-march=x86-64 -DNAME='two words'")
    assert not prepare()[0]
    said = (machine / "said").read_text()
    assert said.index("-march=native") < said.index("-march=x86-64 -DNAME=two words") < said.index("small.cpp")


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "a folder"])
def test_a_damaged_library_is_never_loaded(damage, machine, monkeypatch):
    """The first would be an error, the second end the process by SIGBUS."""
    assert prepare() == (True, "")
    (library,) = kept(machine)
    whole = library.read_bytes()
    library.unlink()  # and is not overwritten: this process has it in its memory
    if damage == "a folder":
        library.mkdir()
    else:
        flipped = bytes([whole[999] ^ 1])
        library.write_bytes(
            dict(empty=b"", truncated=whole[:5000]).get(damage, whole[:999] + flipped + whole[1000:]),
        )
    monkeypatch.setattr(cpu, "ready", None)
    ready, line = prepare()
    assert ready
    if damage == "a folder":
        assert "is a folder" in line
    else:
        assert not line and [path.read_bytes() for path in kept(machine)] == [whole]


def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.mark.parametrize(
    "home,cache",
    [
        ("FILE/home", None),  # can't be made
        ("FILE/home", ""),
        ("FILE/home", "relative"),
        ("relative", None),
        (None, None),  # and the user is in no list
        ("FOLDER", "FILE/cache"),
    ],
)
def test_without_a_place_to_keep_it_each_process_builds(home, cache, machine, monkeypatch):
    (machine / "file").touch()
    (machine / "work").mkdir()
    monkeypatch.chdir(machine / "work")
    for variable, value in (("HOME", home), ("XDG_CACHE_HOME", cache)):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            value = value.replace("FILE", str(machine / "file")).replace("FOLDER", str(machine))
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setenv("TMPDIR", str(machine / "tmp"))
    (machine / "tmp").mkdir()
    ready, line = prepare()
    assert ready and "set XDG_CACHE_HOME to a folder that can be written" in line
    assert not list((machine / "work").iterdir()) and not list((machine / "tmp").iterdir()), "something is left"


def test_a_named_cache_needs_no_home(machine, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    assert prepare() == (True, "") and len(kept(machine)) == 1


@pytest.mark.parametrize("cache", ["", "relative"])
def test_a_cache_that_is_no_whole_path_is_the_homes(cache, machine, monkeypatch):
    monkeypatch.setenv("HOME", str(machine))
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert prepare() == (True, "") and len(list(machine.glob(".cache/layerskip-fast/*.so"))) == 1


def test_a_full_disk_for_the_cache(machine, monkeypatch):
    def copyfile(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(cpu.shutil, "copyfile", copyfile)
    ready, line = prepare()
    assert ready and "No space left on device" in line and not kept(machine)
    assert [path.suffix for path in (machine / "cache" / "layerskip-fast").iterdir()] in ([], [".lock"])


def no_temporary_folder():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


def test_without_a_temporary_folder_it_is_built_where_it_is_kept(machine, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", no_temporary_folder)
    monkeypatch.setenv("CXX", script(machine, f'{VERSION}echo "$out" > {machine}/said; exec g++ "$@"'))
    assert prepare() == (True, "") and len(kept(machine)) == 1
    assert str(cpu.cache_folder()) in (machine / "said").read_text()
    assert {path.suffix for path in kept(machine)[0].parent.iterdir()} <= {".so", ".lock"}


def test_nowhere_to_write_at_all(machine, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", no_temporary_folder)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.delenv("XDG_CACHE_HOME")
    ready, line = prepare()
    assert not ready and "No usable temporary directory" in line


@contextmanager
def says_so(guarded, path, group):
    with guarded(group):
        with open(path, "a") as file:
            file.write("x")
        yield


def test_a_killed_build_leaves_no_compiler_and_its_folder_is_cleared(machine, monkeypatch):
    """The compiler has one of its own, as g++ has, and both hold the pipe open."""
    monkeypatch.setenv("TMPDIR", str(machine / "tmp"))
    (machine / "tmp").mkdir()
    os.mkfifo(machine / "alive")
    alive = os.open(machine / "alive", os.O_RDONLY | os.O_NONBLOCK)
    hangs = f"exec 3> {machine}/alive; echo > $out; (echo started >&3; sleep 600) & sleep 600"
    monkeypatch.setenv("CXX", script(machine, VERSION + hangs))
    monkeypatch.setattr(cpu, "guarded", partial(says_so, cpu.guarded, machine / "guards"))
    child = os.fork()
    if child == 0:
        try:
            cpu.prepare()
        finally:
            os._exit(0)
    assert select.select([alive], [], [], 60)[0] and os.read(alive, 99) == b"started\n"
    while (machine / "guards").read_text() != "xx":  # of --version, and of the build
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([alive], [], [], 20)[0] and os.read(alive, 99) == b"", "a compiler goes on"
    os.close(alive)
    assert len(list((machine / "tmp").iterdir())) == 1, "a killed process can't delete it itself"
    monkeypatch.delenv("CXX")
    assert prepare() == (True, "") and not list((machine / "tmp").iterdir())


def test_a_warning_is_a_line_whatever_python_makes_of_warnings(machine, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/g++")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as PYTHONWARNINGS=error does
        ready, line = prepare()
    assert not ready and line.startswith("warning: decoding runs on plain PyTorch")


class NoLock:
    def __init__(self, path, timeout):
        pass

    def __enter__(self):
        raise NotImplementedError("no flock here")

    def __exit__(self, *error):
        pass


def test_a_file_system_without_locks(machine, monkeypatch):
    monkeypatch.setattr(cpu, "FileLock", NoLock)
    assert prepare() == (True, "") and len(kept(machine)) == 1


def test_one_builds_and_others_wait(machine, monkeypatch):
    real = f'{VERSION}echo once >> {machine}/said; sleep 0.5; exec g++ "$@"'
    monkeypatch.setenv("CXX", script(machine, real))
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(cpu.load) for _ in range(3)]:
            done.result()
    assert (machine / "said").read_text() == "once\n" and len(kept(machine)) == 1
    assert torch.ops.loaded_libraries == {str(kept(machine)[0])}


def test_no_processor_is_described(machine, monkeypatch):
    class Unreadable(type(machine)):
        def read_text(self, *args, **how):
            raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(cpu, "Path", Unreadable)
    assert cpu.processor() == ""


# torch.compile.


def fail(error, graph, inputs):
    raise error


MISSING = [
    (InvalidCxxCompiler(), "No working C++ compiler"),
    (
        CppCompileError(["g++"], "one\nx.cpp:1: fatal error: Python.h: No such file\n"),
        "Python.h: No such file; install",
    ),
    (PermissionError(13, "Permission denied", "/cache"), "/cache: Permission denied; install"),
    (subprocess.CalledProcessError(1, ["gcc"]), "install g++ and Python's headers"),
    (UnicodeDecodeError("utf-8", b"\xfc", 0, 1, "invalid start byte"), "install g++ and Python's headers"),
]


@pytest.mark.parametrize("error,words", MISSING)
def test_without_a_compiler_functions_run_as_they_are(error, words, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "works", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=partial(fail, error)))
    assert kernels.can_compile(torch.ones(1, device="meta"))
    first, second = compiler.compiled(torch.neg), compiler.compiled(torch.abs)
    for _ in range(2):
        assert first(torch.ones(3)).eq(-1).all() and second(-torch.ones(3)).eq(1).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and words in line and "--compile changes nothing" in line
    assert not kernels.can_compile(torch.ones(1, device="meta"))


def test_what_is_wrong_with_the_code_is_no_want_of_a_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "works", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=partial(fail, ValueError("wrong"))))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="wrong"):
        compiler.compiled(torch.neg)(torch.ones(3))
    assert compiler.works


@pytest.fixture
def no_inductor(plain_pytorch, monkeypatch):
    """torch.compile as it is where its compiler is missing."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiler, "works", True)
    missing = {"cpp.cxx": (None, "/no/such/g++"), "force_disable_caches": True}
    with torch._inductor.config.patch(missing):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_generating_goes_on_without_torch_compile(checkpoint, no_inductor):
    args = ("--checkpoint_path", checkpoint("llama2"), "--num_samples", 2, "--max_new_tokens", 8, "--temperature", 0)
    plain = call(generate.main, *args)
    options = ("--compile", "--compile_prefill", "--self_speculative", "--early_exit", "1")
    result = call(generate.main, *args, *options)
    assert result.returncode == 0 and "note: --compile" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if "--compile" in line]
    assert len(lines) == 1 and "No working C++ compiler" in lines[0] and "install g++" in lines[0]
    text = plain.stdout.partition("\n")[2].partition("Time for inference")[0]
    assert len(text) > 20 and result.stdout.count(text) == 2


@pytest.mark.slow
def test_a_bare_machine(checkpoint, tmp_path):
    """No compiler, no home, no cache, an odd language: a warning for the kernels, one for --compile, and the text."""
    (tmp_path / "file").touch()
    command = [sys.executable, "generate.py", "--checkpoint_path", checkpoint("llama2"), "--compile"]
    result = subprocess.run(
        [*command, "--num_samples", "1", "--max_new_tokens", "8"],
        cwd=ROOT,
        env=dict(
            PATH="/no/such/folder",
            HOME=str(tmp_path / "file" / "home"),
            LANG="tr_TR.ISO-8859-9",
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        ),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "Average tokens/sec" in result.stdout, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") for line in lines), result.stderr
    assert "install g++" in lines[0] and "No working C++ compiler" in lines[1]
