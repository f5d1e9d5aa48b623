"""Tensor parallelism in real processes that talk over gloo: the same logits and tokens as one process, and all of
them end together.

This file is also what the processes run: each world of 2 or 4 is started once, and its ranks leave what they found in
files.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import generate
import kernels
import ranks
from adapters import load_adapters, save_adapters
from checkpoint import load_model, save_checkpoint
from command import InputError
from generate import Decoder, Sampling
from model import ModelConfig

pytestmark = pytest.mark.slow


SHAPES = ["llama2", "codellama", "llama3", "llama3.2", "uneven", "tiny"]
WORLDS = [2, 4]
LONG = ["--prompt", "x" * 117]  # leaves room for 11 tokens: `auto` times few rounds
MAIN = {
    "auto": [*LONG, "--self_speculative", "--early_exit", "2", "--speculate_k", "auto"],
    "stop": ["--stop", "e", "3"],
    "bad exit": ["--self_speculative", "--early_exit", "9"],
}
PROMPT = [1, 17, 60, 33, 25, 8]
GRID = {
    "plain": {},
    "E=1 K=3": dict(exit_layer=1, k=3),
    "draft model": dict(draft_model=True, k=3),
    "E=2 K=1": dict(exit_layer=2, k=1),
    "E=3 K=2": dict(exit_layer=3, k=2, draft_head="full"),
    "E=1 K=6": dict(exit_layer=1, k=6),
}
DRAFTED = {  # name: the checkpoint, and how it drafts
    "int8 copy": ("llama3", dict(exit_layer=4, k=3, draft_precision="int8")),
    "int4 copy of an int8 model": ("int8", dict(exit_layer=2, k=2, draft_precision="int4")),
    "n-gram, then self": ("llama3", dict(exit_layer=1, k=2, ngram_k=4)),
    "adapter": ("llama3", dict(exit_layer=2, k=3)),
    "int8 copy and adapter": ("llama3", dict(exit_layer=3, k=2, draft_precision="int8")),
}
SAMPLED = {"plain": {}, "self-speculative": dict(exit_layer=2, k=3), "draft model": dict(draft_model=True, k=2)}


def load_whole(path, **how):
    """A model with the adapters beside it."""
    model = load_model(path, **how)
    load_adapters(path, model)
    return model


def tokens(n):
    return torch.randint(3, 64, (1, n), generator=torch.Generator().manual_seed(n))


@torch.inference_mode()
def logits(model):
    """Of a prompt's pass of many rows and of few, and of passes of one row and of several over the cache."""
    x = tokens(40)
    model.setup_caches(64)
    out = [model.logits(model(x)), model.logits(model(x[:, :12]))]
    model(x[:, :30])
    for begin, end in ((30, 31), (31, 35), (35, 40)):
        out.append(model.logits(model(x[:, begin:end], torch.arange(begin, end))))
    return torch.cat(out, dim=1)


def decode(model, draft, n=12, draft_model=False, **how):
    decoder = Decoder(model, draft_model=draft if draft_model else None, **how)
    return list(decoder.generate(PROMPT, n, model.config.eos_ids)), decoder.stats.accept_counts


def everything(load, names):
    """What a model's results are, by name, for each of the checkpoints `names`, which `load` loads."""
    found = {}
    for name in names:
        model, draft = load(name), load("draft" if name in ("int8", "int4") else name)
        found[name, "logits"] = logits(model)
        kernels.enabled = False
        found[name, "plain PyTorch's logits"] = logits(model)
        kernels.enabled = True
        for how, settings in GRID.items() if name in ("tiny", "int4") else list(GRID.items())[:3]:
            found[name, how] = decode(model, draft, **settings)
    for how, (name, settings) in DRAFTED.items():
        found["drafted", how], _ = decode(load(name), None, **settings)
    model = load("llama3")
    for how, settings in SAMPLED.items():
        found["sampled", how] = decode(model, load("draft"), sampling=Sampling(0.8, 50), seed=3, **settings)
    return found


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op._opname in ("all_gather_into_tensor", "all_reduce")
        return op(*args, **(kwargs or {}))


def status(key):
    """Bytes, by a key of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def memory(load):
    """((the most bytes while the checkpoint "large" is loaded, those it then takes), the bytes of each tensor)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    large = load("large", dtype=torch.bfloat16)
    used = status("VmHWM") - before, status("VmRSS") - before
    return used, {name: t.nbytes for name, t in large.state_dict().items()}


def printed(path, args):
    """What generate.py prints, an error included."""
    common = ["--prompt", "def", "--num_samples", "1", "--max_new_tokens", "12", "--json", "-"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            generate.main(["--checkpoint_path", str(path), *common, *args])
        except InputError as error:
            print(error)
    return output.getvalue()


def worker(folder):
    """One rank: everything that the tests below look at, into folder/RANK.pt."""
    shard = ranks.start()

    def load(name, **how):
        return load_whole(folder / name / "model.pth", shard=shard, **how)

    found = everything(load, [*SHAPES, "int8", "int4"])
    model = load("llama3")
    found["seedless"] = decode(model, None, sampling=Sampling(1.0))
    kernels.enabled = False  # the other way they are called by the C++ operation, out of sight
    for rows in (1, 5, 40):
        with torch.inference_mode(), Counting() as mode:
            model.logits(model(tokens(rows), torch.arange(rows)))
        found["collectives", rows] = mode.count
    kernels.enabled = True
    if shard.size == 2:  # what takes a while
        small = Decoder(load("small"), exit_layer=1, k=2, sampling=Sampling(1.2, top_k=8), seed=0, rows=8)
        found["counts"] = torch.bincount(
            torch.tensor([list(small.generate([3, 4, 5], 2)) for _ in range(400)]) @ torch.tensor([12, 1]),
            minlength=144,
        )
        short = load("short")  # layers take long to compile
        kernels.enabled = False  # with the CPU's kernels there is nothing to compile
        torch.compile = partial(torch.compile, backend="eager")
        found["compiled"] = decode(short, None, exit_layer=1, k=2, compile=True, compile_prefill=True)
        kernels.enabled = True

    found["memory"], found["bytes"] = memory(load)
    for name, args in list(MAIN.items())[shard.size // 4 :]:  # auto takes a while
        found["main", name] = printed(folder / "llama3" / "model.pth", args)
    torch.save(found, folder / f"{shard.size}-{shard.rank}.pt")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    sys.exit()

# The processes above need no transformers.
from conftest import call, make_hf_model, torchrun, write_tokenizer  # noqa: E402
from test_adapters import adapted  # noqa: E402
from test_generate import chi_square, reference_distribution, tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A folder of checkpoints: name/model.pth."""
    from benchmark import random_model
    from convert_hf_checkpoint import convert
    from quantize import quantize_checkpoint

    folder = tmp_path_factory.mktemp("tp")
    for name in SHAPES[:4]:
        shutil.copytree(checkpoint(name).parent, folder / name)
    model = adapted(load_model(folder / "llama3" / "model.pth"), exits=(2, 3))
    save_adapters(folder / "llama3" / "adapters.pth", model.adapters, "a test", torch.float32)
    # 11 groups of 32: on 4 processes 2, 3, 3 and 3 of them. The float width of 98 is 24, 25, 24 and 25.
    for name, how in {
        "uneven": dict(shape="codellama", intermediate_size=98),
        "draft": dict(shape="llama3", head_dim=32, intermediate_size=352),
    }.items():
        (folder / name).mkdir()
        make_hf_model(**how).save_pretrained(folder / name)
        write_tokenizer(folder / name)
        convert(folder / name)
    models = {
        "tiny": tiny_model(),
        "small": tiny_model(vocab=12, n_layer=2),
        "short": tiny_model(n_layer=2),
        "large": random_model("100M", "int8", 6, 128, "cpu", torch.bfloat16),
    }
    for name, model in models.items():
        (folder / name).mkdir()
        save_checkpoint(folder / name / "model.pth", dict(model.state_dict()), model.config)
    for mode in ("int8", "int4"):
        (folder / mode).mkdir()
        quantize_checkpoint(folder / "draft" / "model.pth", folder / mode / "model.pth", mode, 32)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return everything(lambda name: load_whole(folder / name / "model.pth"), [*SHAPES, "int8", "int4"])


@pytest.fixture(scope="module", params=WORLDS)
def world(request, folder):
    """What each rank of a world found."""
    process = torchrun(request.param, __file__, folder)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def test_logits_equal_those_of_one_process(world, one):
    names = [name for name in one if "logits" in name[1]]
    assert len(names) == 16
    for name in names:
        assert all(torch.equal(rank[name], world[0][name]) for rank in world)
        torch.testing.assert_close(
            world[0][name],
            one[name],
            atol=1e-5 * one[name].abs().max().item(),
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_greedy_tokens_equal_those_of_one_process(world, one):
    names = [name for name in one if name[1] in GRID and name[0] != "sampled"]
    assert len(names) == 2 * len(GRID) + 6 * 3
    for name in names:
        assert all(rank[name] == one[name] for rank in world), name
        assert one[name][0] == one[name[0], "plain"][0]
    assert (
        sum(one["tiny", "E=1 K=3"][1][1:]) > 0 and sum(one["tiny", "E=1 K=3"][1][:-1]) > 0
    )  # drafts were sometimes right, sometimes wrong


def test_copies_and_ngrams_change_no_token(world, one):
    for how, (name, _) in DRAFTED.items():
        plain, _ = one[name, "plain"]
        assert one["drafted", how] == plain and all(rank["drafted", how] == plain for rank in world), how


def test_sampled_tokens_are_everyones(world, one, folder):
    for name in SAMPLED:
        assert all(rank["sampled", name] == one["sampled", name] for rank in world), (
            name
        )  # the same seed, the same text
    assert len({tuple(rank["seedless"][0]) for rank in world}) == 1


def test_sampled_tokens_have_the_models_distribution(world, folder):
    if len(world) > 2:
        return
    assert torch.equal(world[0]["counts"], world[1]["counts"])
    model = load_model(folder / "small" / "model.pth").double()

    def row(ids):
        return reference_distribution(model.logits(model(torch.tensor([ids])))[0, -1], 1.2, 8, 1.0).double()

    joint = torch.stack([pa * row([3, 4, 5, a]) for a, pa in enumerate(row([3, 4, 5]))])
    assert chi_square(world[0]["counts"], joint.flatten()) > 1e-3


def test_compiled_equals_eager(world, folder):
    if len(world) == 2:
        plain, _ = decode(load_model(folder / "short" / "model.pth"), None)
        assert all(rank["compiled"][0] == plain for rank in world)


def test_two_sums_per_layer_and_one_head(world):
    for rank in world:
        assert {rank["collectives", rows] for rows in (1, 5, 40)} == {2 * 4 + 1}


def test_a_rank_holds_and_reads_its_part_only(world, folder):
    whole = load_model(folder / "large" / "model.pth", dtype=torch.bfloat16).state_dict()
    replicated = sum(t.nbytes for name, t in whole.items() if "embed" in name or "norm" in name)
    split = sum(t.nbytes for t in whole.values()) - replicated
    rows = sum(
        t.nbytes for name, t in whole.items() if name.endswith(("wo.scale", "w2.scale"))
    )  # scales of a row that all have parts of
    for rank in world:
        assert sum(rank["bytes"].values()) == pytest.approx(replicated + rows + (split - rows) / len(world), rel=0.001)
        peak, after = rank["memory"]
        largest = max(t.nbytes for name, t in whole.items())
        own = sum(rank["bytes"].values())
        assert after < 1.05 * own + 4e6 and peak < 1.05 * own + largest + 4e6
    assert sum(rank["bytes"]["layers.0.ffn.w2.weight"] for rank in world) == whole["layers.0.ffn.w2.weight"].nbytes


def test_the_command_line_in_a_world(world):
    for rank in world:
        for name in list(MAIN)[len(world) // 4 : -1]:
            report, first = (json.loads(r["main", name].splitlines()[-1]) for r in (rank, world[0]))
            assert report["samples"][0]["tokens"] == first["samples"][0]["tokens"] and report["settings"][
                "processes"
            ] == len(world)
            assert (
                report["settings"]["exit_layer"] == first["settings"]["exit_layer"]
                and report["memory_gb"] == first["memory_gb"]
            )
        assert "--early_exit 9" in rank["main", "bad exit"] and rank["main", "bad exit"].count("\n") == 1


def settle(process, timeout=100, **how):
    output, errors = process.communicate(timeout=timeout, **how)
    return process.returncode, output, [line for line in errors.splitlines() if line.startswith("error: ")]


def test_torchrun_prints_once(folder, tmp_path):
    args = [
        ROOT / "generate.py",
        "--checkpoint_path",
        folder / "llama3" / "model.pth",
        "--prompt",
        "def",
        "--num_samples",
        "2",
        "--max_new_tokens",
        "20",
        "--temperature",
        "0.9",
        "--self_speculative",
        "--early_exit",
        "2",
        "--json",
        "-",
        "--profile",
        tmp_path / "trace.json",
    ]
    code, output, errors = settle(
        torchrun(2, *args, threads=2)
    )  # in a team of threads one of them talks to the other processes
    assert code == 0 and not errors and output.count("Average tokens/sec") == output.count('"samples"') == 1
    single = call(generate.main, *args[1:])
    ours, theirs = (json.loads(text.splitlines()[-1])["samples"] for text in (output, single.stdout))
    assert [s["tokens"] for s in ours] == [s["tokens"] for s in theirs] and "traceEvents" in json.loads(
        (tmp_path / "trace.json").read_text()
    )
    assert "GB/s of weights by each process" in output and "by each process at most" in output


def test_interactive(folder):
    process = torchrun(
        2,
        ROOT / "generate.py",
        "--checkpoint_path",
        folder / "llama3" / "model.pth",
        "--interactive",
        "--self_speculative",
        "--max_new_tokens",
        "8",
    )
    code, output, errors = settle(process, input="def f1\n" + "x" * 2000 + "\nreturn\n")
    assert (
        code == 0
        and not errors
        and output.count("tokens/sec") + output.count("no decoding step") == 2
        and output.count("there is room for 128") == 1
    )


def ranks_of(process):
    """The process ids of what torchrun started, in the order of the ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"\nPPid:\t{process.pid}\n" in (entry / "status").read_text()
            if ours and "generate.py" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all(killed, interactive, folder):
    args = ["--interactive"] if interactive else ["--num_samples", "100000"]
    process = torchrun(
        2,
        ROOT / "generate.py",
        "--checkpoint_path",
        folder / "llama3" / "model.pth",
        "--prompt",
        "def",
        *args,
        threads=2,
    )
    try:
        for line in process.stdout:
            if line.startswith(("Time for inference 1", "Type a prompt")):
                break
        everyone = ranks_of(process)
        began = time.monotonic()
        os.kill(everyone[killed], signal.SIGKILL)
        code, _, errors = settle(process, 30)
        assert code and time.monotonic() - began < 30
        assert len(errors) == 1 and (
            "lost contact with" in errors[0] or "another process failed or was killed" in errors[0]
        ), errors
        assert not any(Path(f"/proc/{pid}").exists() for pid in everyone)
    finally:
        process.kill()


def test_a_signal_is_told_once_even_while_python_runs(monkeypatch):
    """The handler of a command that runs alone would end the process first, without a word."""
    shard, told, failed = ranks.Shard(0, 2), [], threading.Event()

    def fail(why):
        told.append(why)
        failed.set()

    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        assert failed.wait(30)

    for thing, name, value in (
        (ranks, "start", lambda: shard),
        (shard, "fail", fail),
        (shard, "gather", lambda value: None),
        (ranks.dist, "destroy_process_group", lambda: None),
    ):
        monkeypatch.setattr(thing, name, value)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ranks.run_command(main)
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, handler)
    assert told == ["error: another process failed or was killed, or torchrun was told to stop"]


def test_bad_input_ends_all_in_one_line(folder):
    path = folder / "llama3" / "model.pth"
    code, _, errors = settle(torchrun(3, ROOT / "generate.py", "--checkpoint_path", path))
    assert code == 1 and len(errors) == 1 and "can't be split over 3 processes" in errors[0]


def test_an_error_of_one_rank_is_everyones(folder, tmp_path):
    """Here: rank 1 alone finds no checkpoint."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, generate\n"
        "name = ('llama3', 'none')[int(os.environ['RANK'])]\n"
        "sys.argv.append(f'--checkpoint_path={sys.argv.pop()}/{name}/model.pth')\n"
        "generate.run_command(generate.main)\n"
    )
    code, _, errors = settle(torchrun(2, script, folder))
    assert code == 1 and len(errors) == 1 and "none/model.pth: not found" in errors[0]


@pytest.mark.parametrize(
    "name,size,words",
    [
        ("llama3", 3, "4 query and 2 key/value heads can't be split over 3 processes"),
        ("llama3", 8, "4 query and 2 key/value heads can't be split over 8 processes"),
        ("vocabulary", 2, "a vocabulary of 333 can't be split over 2 processes"),
        ("narrow", 4, "a feed-forward width of 96 in units of 32 can't be split over 4 processes"),
        (
            "groups",
            4,
            "groups of 64 can't be split over 4 processes, which have 32 columns of wo each: "
            "quantize with --groupsize 32",
        ),
        ("heads", 4, "which have 24 columns of wo each: quantize with --mode int8"),
    ],
)
def test_what_does_not_divide_is_one_line(name, size, words, folder, tmp_path):
    config = ModelConfig(
        vocab_size=48, dim=64, n_layer=1, n_head=4, n_kv_head=2, head_dim=32, intermediate_size=128, context=64
    )
    configs = {
        "vocabulary": dict(vocab_size=333),
        "narrow": dict(intermediate_size=96, quantization="int4", groupsize=32),
        "groups": dict(quantization="int4", groupsize=64),
        "heads": dict(head_dim=24, quantization="int4", groupsize=32),
    }
    path = folder / name / "model.pth"
    if name in configs:
        from dataclasses import replace

        from model import Transformer

        config, path = replace(config, **configs[name]), tmp_path / "model.pth"
        save_checkpoint(path, dict(Transformer(config).state_dict()), config)
    with pytest.raises(InputError) as error:
        load_model(path, shard=ranks.Shard(1, size))
    assert words in str(error.value) and "\n" not in str(error.value)
