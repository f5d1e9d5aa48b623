"""What torchrun leaves in the environment may be wrong, and what it started may be killed or stopped: one line each.

This file is also what the processes run. Those that need no torchrun are forked from one that has imported PyTorch.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import torch

import ranks
import tp
from command import InputError

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


def loop():
    """Sums without end, once all processes have met."""
    shard = ranks.start()
    os.write(1, f"ready {shard.rank} {os.getpid()}\n".encode())
    while True:
        tp.all_reduce(torch.ones(1, 4), shard)
        time.sleep(0.01)


def run_forked(folder, name, variables):
    """In a process of its own: `loop` with some variables of the environment, its stderr in folder/name."""
    os.environ.update(variables)
    os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), 2)
    code = 0
    try:
        ranks.run_command(loop)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        code = end.code if isinstance(end.code, int) else 1
    os._exit(code)


def fork(folder, patience, jobs):
    """Run jobs {name: variables} at the same time, and wait; leaves {name: exit code} in folder/codes.json.

    Keeps their store, as torchrun does, if they expect that.
    """
    ranks.PATIENCE = timedelta(seconds=patience)
    ranks.TIMEOUT = timedelta(seconds=2)
    ranks.GRACE = 2.0
    children = {}
    for name, variables in jobs.items():
        child = os.fork()
        if not child:
            run_forked(folder, name, variables)
        children[name] = child
    if "TORCHELASTIC_USE_AGENT_STORE" in variables:
        store = torch.distributed.TCPStore("127.0.0.1", int(variables["MASTER_PORT"]), is_master=True)
        assert store
    codes = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    if sys.argv[1:]:
        fork(Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        ranks.run_command(loop, watch="UNWATCHED" not in os.environ)
    sys.exit()

import tasks  # noqa: E402 (the processes above don't need it)


@pytest.fixture
def environment(monkeypatch):
    """Function: variables -> the environment has what torchrun sets, and these; None removes one."""
    before = signal.getsignal(signal.SIGTERM)

    def change(**variables):
        for name, value in {**ADDRESS, **variables}.items():
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)

    yield change
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("size", ["", "abc", "0", "-1", "1.5", " 2", "99999", "9" * 5000, "٢"])
def test_an_odd_world_size_is_one_line_everywhere(size, environment):
    environment(WORLD_SIZE=size)
    for command in (ranks.start.__wrapped__, lambda: tasks.check_machine("cpu")):
        with pytest.raises(InputError) as caught:
            command()
        assert str(caught.value).startswith(f"WORLD_SIZE is {size!r}, not a number from 1 to ")


def test_one_process_needs_nothing_else(environment):
    for size in ("1", None):
        environment(WORLD_SIZE=size, RANK="x", LOCAL_RANK=None, MASTER_ADDR=None, MASTER_PORT="x")
        assert ranks.start.__wrapped__() == ranks.Shard() and ranks.world_size() == 1
        tasks.check_machine("cpu")


def test_measuring_is_for_one_process(environment):
    environment(WORLD_SIZE="2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but the measuring scripts are for one process"):
        tasks.check_machine("cpu")


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("RANK", None, "RANK is not set"),
        ("RANK", "2", "RANK is '2', not a number from 0 to 1"),
        ("RANK", "-1", "RANK is '-1', not a number from 0 to 1"),
        ("RANK", "one", "RANK is 'one', not a number"),
        ("LOCAL_RANK", None, "LOCAL_RANK is not set"),
        ("LOCAL_RANK", "2", "LOCAL_RANK is '2', not a number from 0 to 1"),
        ("LOCAL_RANK", "", "LOCAL_RANK is '', not a number"),
        ("MASTER_ADDR", None, "MASTER_ADDR is ''"),
        ("MASTER_ADDR", "a..b", "MASTER_ADDR is 'a..b'"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http', not a number from 1 to 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT is '65536', not a number from 1 to 65535"),
    ],
)
def test_odd_variables_are_one_line(name, value, words, environment):
    environment(**{name: value})
    with pytest.raises(InputError) as caught:
        ranks.start.__wrapped__()
    message = str(caught.value)
    assert message.startswith("WORLD_SIZE is 2, but this is not one of 2 processes that torchrun started (")
    assert words in message and "\n" not in message


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.Shard(5, 8, local=1).device("cuda") == "cuda:1"
    assert ranks.Shard(5, 8, local=2).device("cpu") == "cpu" and ranks.Shard().device("cuda") == "cuda"
    with pytest.raises(InputError, match="--device cuda: 2 GPUs here, but at least 3 processes"):
        ranks.Shard(5, 8, local=2).device("cuda")


def test_a_message_names_who_is_silent(monkeypatch):
    """In a world of 4 of which 0 and 2 look for the others, without gloo's own address in its message."""
    monkeypatch.setattr(ranks, "ROLL_CALL", 0)
    store = torch.distributed.HashStore()
    store.set("lost/2", "")
    monkeypatch.setattr(torch.distributed.HashStore, "clone", lambda self: self, raising=False)
    monkeypatch.setattr(ranks, "deadline", lambda *args: None)
    error = RuntimeError("[/gloo/buffer.cc:78] Timed out waiting 2000ms for recv. And more\nframes")
    message = ranks.Shard(0, 4, store=store).lost_contact(error)
    reason = "Timed out waiting 2000ms for recv"
    assert message == f"error: lost contact with process 1, 3: killed, stopped, or too slow ({reason})"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def forked(folder, patience, jobs):
    command = [sys.executable, __file__, str(folder), str(patience), json.dumps(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def variables(port, size, rank):
    return {**ADDRESS, "WORLD_SIZE": str(size), "RANK": str(rank), "MASTER_PORT": str(port)}


def ready(process, count):
    """{rank: process id}, when so many are in their loop."""
    found = {}
    for line in process.stdout:
        if line.startswith("ready"):
            rank, pid = map(int, line.split()[1:])
            found[rank] = pid
        if len(found) == count:
            break
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_do_not_meet_end(tmp_path):
    """A port that something else listens at, without ever answering; one process of several; one of them twice."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken, twice = silent.getsockname()[1], free_port()
        jobs = {
            "taken by another": variables(taken, 2, 0),
            "silent": variables(taken, 2, 1),
            "first alone": variables(free_port(), 2, 0),
            "second alone": variables(free_port(), 2, 1),
            **{f"twice {i}": variables(twice, 3, rank) for i, rank in enumerate((0, 1, 1))},
        }
        forked(tmp_path, 4, jobs).wait(timeout=100)
    words = {
        "taken by another": "address already in use",
        "silent": "no answer; something else may use the port",
        "first alone": "1/2 clients joined",
        "second alone": "Connection refused",
    }
    texts = {name: (tmp_path / name).read_text() for name in jobs}
    assert set(json.loads((tmp_path / "codes.json").read_text()).values()) == {1}
    for name, text in texts.items():
        assert "Traceback" not in text and text.count("error: ") <= 1, text
        assert words.get(name, "") in text, text
    assert any("RANK is 1 in two processes" in text for text in texts.values()), texts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and stops what it forked")
@pytest.mark.parametrize("agent", [True, False])
def test_a_stopped_process_is_named(agent, tmp_path):
    """Except where it keeps the store, which torchrun does otherwise: then the others can't tell who it is."""
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"} if agent else {}
    port = free_port()
    process = forked(tmp_path, 60, {str(rank): {**variables(port, 3, rank), **more} for rank in range(3)})
    everyone = ready(process, 3)
    os.kill(everyone[0], signal.SIGSTOP)
    try:
        assert wait_until_gone(everyone[1], everyone[2])
    finally:
        os.kill(everyone[0], signal.SIGKILL)
    process.communicate(timeout=30)
    lines = [line for rank in "12" for line in (tmp_path / rank).read_text().splitlines() if "error: " in line]
    if agent:
        assert len(lines) == 1 and "lost contact with process 0: killed, stopped, or too slow (" in lines[0]
    else:
        assert len(lines) == 2 and all("lost contact with another process: " in line for line in lines)
    assert not any("gloo" in line for line in lines)
    assert json.loads((tmp_path / "codes.json").read_text()) == {"0": -signal.SIGKILL, "1": 1, "2": 1}


def is_gone(pid):
    """Whether a process has ended, be it that its parent hasn't asked yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def wait_until_gone(*pids):
    """Whether these processes end by themselves within 30 seconds, many times what it should take."""
    end = time.monotonic() + 30
    while not all(map(is_gone, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if not is_gone(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


def torchrun(errors, *options):
    """torchrun with two processes that run `loop`; errors: a file for their stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, __file__]
    with open(errors, "w") as stderr:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
@pytest.mark.parametrize("killed,watch", [(None, True), (1, True), (1, False)])
def test_a_killed_process_ends_all(killed, watch, tmp_path, monkeypatch):
    """None: torchrun itself. Between two sums the others sleep, in Python, where a signal's handler comes first."""
    if not watch:
        monkeypatch.setenv("UNWATCHED", "1")
    errors = tmp_path / "errors"
    process = torchrun(errors)
    everyone = ready(process, 2)
    os.kill(everyone.get(killed, process.pid), signal.SIGKILL)
    process.stdout.close()
    assert wait_until_gone(*everyone.values()) and len(everyone) == 2
    assert process.wait(timeout=60)
    lines = [text for text in errors.read_text().splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    if killed is None:
        assert lines[0] == "error: torchrun was killed"
    else:
        assert "lost contact with process 1" in lines[0] or "another process failed or was killed" in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_torchrun_may_start_them_again(tmp_path):
    process = torchrun(tmp_path / "errors", "--max_restarts=1")
    first = ready(process, 2)
    os.kill(first[1], signal.SIGKILL)
    second = ready(process, 2)
    process.kill()
    process.stdout.close()
    assert wait_until_gone(*first.values(), *second.values()) and len(second) == 2
    process.wait()
