"""The LayerSkip recipe against values worked out by hand; and training runs that learn, stop, and resume exactly."""

import json
import math
import os
import shutil
import signal
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import first_model
import optimizers
import plot_training
import recipe
import train
import train_log
from checkpoint import load_model
from command import InputError
from conftest import ROOT, call, torchrun
from data import is_held_out
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from train_log import read_log

TINY = [
    "--n_layer",
    "4",
    "--dim",
    "32",
    "--n_head",
    "2",
    "--intermediate_size",
    "48",
    "--context",
    "32",
    "--batch_size",
    "4",
    "--vocab_size",
    "300",
    "--warmup",
    "2",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--save_precision",
    "float32",
    "--val_fraction",
    "0.2",
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(30):
        (folder / f"file{i}.py").write_text(
            "".join(f"def add_{i}_{j}(x):\n    return x + {j * i}\n\n" for j in range(20))
        )
    (folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    (folder / "notes.txt").write_text("not wanted")
    return folder


def run(data, out, *args):
    return train.train(
        train.parse_args(["--data", str(data), "--include", "*.py", "--out", str(out), *TINY, *map(str, args)])
    )


def test_dropout_probabilities():
    """p(l, t) = S(t) D(l) p_max, with D = 0, 2^(1/2) - 1, 1 over three layers, and S = 0, 2^(1/4) - 1, ..., 1 over
    five steps.
    """
    root = math.sqrt(2)
    torch.testing.assert_close(
        recipe.dropout_probabilities(3, 0, 5, 0.1, False), torch.tensor([0, 0.1 * (root - 1), 0.1])
    )
    torch.testing.assert_close(recipe.dropout_probabilities(3, 0, 5, 0.1, True), torch.zeros(3))
    torch.testing.assert_close(
        recipe.dropout_probabilities(3, 2, 5, 0.2, True), 0.2 * (root - 1) * torch.tensor([0, root - 1, 1])
    )
    torch.testing.assert_close(recipe.dropout_probabilities(3, 4, 5, 0.2, True), 0.2 * torch.tensor([0, root - 1, 1]))


def test_exit_weights():
    """e = scale * (0, 1, 3, 6, ...), the last L - 1 + scale * sum(0..L-2); over the enabled ones they sum to one."""
    every = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(recipe.exit_weights(every, 1.0), torch.tensor([0, 1, 3, 6]) / 10)
    torch.testing.assert_close(recipe.exit_weights(every, 0.2), torch.tensor([0, 0.2, 0.6, 3.6]) / 4.4)
    torch.testing.assert_close(
        recipe.exit_weights(torch.tensor([True, True, False, True]), 0.5), torch.tensor([0, 0.5, 0, 4.5]) / 5
    )
    torch.testing.assert_close(recipe.exit_weights(every, 0.5, 0.0), torch.tensor([0.5, 0.5, 0.5, 1]) / 2.5)
    torch.testing.assert_close(recipe.exit_weights(every, 2.0, -1.0), torch.tensor([2, 1, 2 / 3, 1]) / (14 / 3))


def test_curricula():
    rotational = [recipe.enabled_exits(6, step, 100, "rotational", 3).nonzero().flatten().tolist() for step in range(4)]
    assert rotational == [[0, 3, 5], [1, 4, 5], [2, 5], [0, 3, 5]]
    gradual = [
        recipe.enabled_exits(4, step, 16, "gradual", 0).nonzero().flatten().tolist() for step in range(9)
    ]  # one more every 2 steps
    assert gradual == [[3], [3], [2, 3], [2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def make_objective(layers=3):
    from test_generate import tiny_model

    model = tiny_model(n_layer=layers).requires_grad_(True).train()
    tokens = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    return recipe.LayerSkipLoss(model), tokens[:, :-1], tokens[:, 1:]


def test_loss_is_the_weighted_sum_over_exits_of_kept_layers():
    """Against the definition: one sequence at a time, skipping what is dropped; a layer that all drop is not
    computed.
    """
    objective, tokens, targets = make_objective()
    model, calls = objective.model, [0, 0, 0]
    keep = torch.tensor([[True, True, True, True], [True, False, True, False], [False, False, False, False]])
    weights = torch.tensor([0.25, 0.0, 0.75])
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    total, losses = objective(tokens, targets, keep, weights, keep.any(1))
    assert calls == [1, 1, 0] and losses[1].isnan()
    expected = 0
    for b in range(4):
        x = model.embed(tokens[b : b + 1])
        for i in range(len(model.layers)):
            if keep[i, b]:
                x = model(x, None, i, i + 1) if i else model(tokens[b : b + 1], None, 0, 1)
            logp = model.logits(x)[0].double().log_softmax(-1)
            expected += weights[i].item() * -logp.gather(1, targets[b, :, None]).mean() / 4
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    total.backward()
    assert model.layers[2].ffn.w2.weight.grad is None and model.layers[1].ffn.w2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_a_tiny_run_learns_and_its_checkpoint_loads(optimizer, data, tmp_path, capsys):
    losses = run(data, tmp_path / "out", "--steps", 60, "--lr", 3e-3, "--optimizer", optimizer, "--eval_every", 0)
    assert sum(losses[:5]) / 5 > 5 and sum(losses[-5:]) / 5 < 2.5
    model = load_model(tmp_path / "out" / "model.pth")
    record = json.loads((tmp_path / "out" / "train_log.jsonl").read_text().splitlines()[-1])
    assert record["agreement"][-1] == 1 and len(record["val_loss"]) == 4 and record["tokens_seen"] == 60 * 4 * 32
    # The reported validation loss is that of the saved model, worked out anew in float64 on the held-out files.
    tokenizer = Tokenizer.load(tmp_path / "out")
    ids = []
    for path in sorted(data.glob("file*.py")):
        if is_held_out(path.name, 0.2):
            ids += [*tokenizer.encode(path.read_text()), tokenizer.eos_id]
    ids = torch.tensor(ids)
    count = (len(ids) - 1) // 32
    batch = torch.stack([ids[s : s + 33] for s in torch.linspace(0, len(ids) - 33, count).long().tolist()]).long()
    logp = model.double().logits(model(batch[:, :-1])).log_softmax(-1)
    assert -logp.gather(2, batch[:, 1:, None]).mean().item() == pytest.approx(record["val_loss"][-1], rel=1e-4)
    assert not list((tmp_path / "out").glob("train_state*"))
    assert "agreement" in capsys.readouterr().out


def test_a_tokenizer_gives_back_every_byte(data, tmp_path):
    text = "def  x():\n\t\treturn 'é漢' \n\n    # 12345  "
    tokenizer = train.train_tokenizer([d.read_text() for d in data.glob("file*.py")], 300, tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def interrupt_after(step, monkeypatch):
    """Have the process receive Ctrl-C while that step is being computed."""
    original, seen = recipe.enabled_exits, []

    def counting(*args):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(recipe, "enabled_exits", counting)


def test_muon_equals_pytorchs():
    """PyTorch's works in bfloat16, hence the tolerance."""
    torch.manual_seed(0)
    for shape in ((24, 60), (60, 24), (32, 32)):
        ours = torch.nn.Parameter(torch.randn(shape) / 10)
        theirs = torch.nn.Parameter(ours.detach().clone())
        first = ours.detach().clone()
        both = (
            optimizers.Muon([ours], 3e-3, 0.1),
            torch.optim.Muon([theirs], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        )
        for _ in range(5):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for optimizer in both:
                optimizer.step()
        assert (ours - theirs).norm() < 0.03 * (ours - first).norm()


def test_a_model_grows_from_a_trained_one(data, tmp_path):
    """New layers begin as the identity: before the first step nothing changes, and then they learn."""
    run(data, tmp_path / "small", "--steps", 2, "--save_precision", "float32")
    small = load_model(tmp_path / "small" / "model.pth")
    grown, x = first_model.restack(small, [1, 0, 2, 3, 4, 0]).eval(), torch.randint(0, 280, (1, 20))
    with torch.no_grad():
        assert grown.config.n_layer == 6 and torch.equal(grown.logits(grown(x)), small.logits(small(x)))
        first, second, third, fourth = small.layers
        small.layers = torch.nn.ModuleList([second, first, fourth])
        assert torch.equal(small(x), first_model.restack(load_model(tmp_path / "small" / "model.pth"), [2, 1, 4])(x))
    run(
        data,
        tmp_path / "large",
        "--checkpoint_path",
        tmp_path / "small" / "model.pth",
        "--layers",
        1,
        2,
        3,
        4,
        0,
        0,
        "--steps",
        3,
    )
    large = load_model(tmp_path / "large" / "model.pth")
    assert len(large.layers) == 6 and all(layer.ffn.w2.weight.abs().sum() > 0 for layer in large.layers)
    for wrong, message in (
        (("--layers", 1), "--layers: needs --checkpoint_path"),
        (
            ("--layers", 5, "--checkpoint_path", tmp_path / "small" / "model.pth"),
            "--layers 5: the checkpoint has layers 1 to 4",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run(data, tmp_path / "none", *wrong)
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_resumes_exactly(optimizer, data, tmp_path, monkeypatch):
    how = ("--steps", 12, "--max_dropout", 0.3, "--optimizer", optimizer)
    whole = run(data, tmp_path / "whole", *how)
    with monkeypatch.context() as m:
        interrupt_after(5, m)
        with pytest.raises(SystemExit, match="stopped after step 5"):
            run(data, tmp_path / "parts", *how)
    with pytest.raises(InputError, match="unfinished run"):
        run(data, tmp_path / "parts", *how)
    with pytest.raises(InputError, match="--resume: weight_decay was 0.1"):
        run(data, tmp_path / "parts", *how, "--weight_decay", 0.2, "--resume")
    assert run(data, tmp_path / "parts", *how, "--resume") == whole[5:]
    a, b = (load_model(tmp_path / name / "model.pth").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_continues_a_converted_checkpoint(checkpoint, data, tmp_path):
    losses = run(
        data,
        tmp_path / "out",
        "--steps",
        30,
        "--checkpoint_path",
        checkpoint("llama3.2"),
        "--curriculum",
        "gradual",
        "--lr",
        1e-3,
    )
    assert losses[-1] < losses[0]
    assert load_model(tmp_path / "out" / "model.pth").config.rope_scaling


def train_by_two(data, out, *args, script=ROOT / "scripts" / "train.py", processes=2):
    """(torchrun's exit code, its stderr)."""
    process = torchrun(processes, script, "--data", data, "--include", "*.py", "--out", out, *TINY, *args)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.mark.parametrize("how", [("--accumulate", "2"), ("--fsdp", "--accumulate", "2", "--activation_checkpointing")])
@pytest.mark.slow
def test_two_processes_train_as_one(how, data, tmp_path):
    """DDP and FSDP over gloo, in pieces: the same losses as one process with the whole batch at once, and a checkpoint
    that one process loads.
    """
    settings = [
        "--steps",
        "5",
        "--max_dropout",
        "0.9",
        "--eval_every",
        "2",
        "--log_every",
        "1",
    ]  # so much that a process has layers without any sequence
    run(data, tmp_path / "one", *settings)
    code, errors = train_by_two(data, tmp_path / "two", *settings, *how)
    assert code == 0, errors
    logs = [read_log(tmp_path / name / "train_log.jsonl") for name in ("one", "two")]
    for field, count in (("val_loss", 3), ("exit_loss", 5)):
        one, two = ([line[field] for line in lines if field in line] for lines in logs)
        assert len(one) == len(two) == count
        for a, b in zip(one, two, strict=True):
            assert [x is None for x in a] == [x is None for x in b]
            assert [x for x in a if x] == pytest.approx([x for x in b if x], rel=1e-3)
    a, b = (load_model(tmp_path / name / "model.pth") for name in ("one", "two"))
    tokens = torch.randint(0, 280, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(a.logits(a(tokens)), b.logits(b(tokens)), atol=1e-3, rtol=1e-2)


INTERRUPTED = """
import os, signal
import recipe, train
original, steps = recipe.enabled_exits, []
def counting(*args):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
recipe.enabled_exits = counting
train.run_command(lambda: train.train(train.parse_args()), watch=False)
"""


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_resumes_exactly(data, tmp_path):
    """With FSDP; each process has written its part of the state."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    how = ("--steps", "6", "--max_dropout", "0.3", "--fsdp")
    assert train_by_two(data, tmp_path / "whole", *how)[0] == 0
    code, errors = train_by_two(data, tmp_path / "parts", *how, script=script)
    assert code and errors.count("stopped after step 3") == 1
    first, second = (load_file(part) for part in sorted((tmp_path / "parts" / "train_state" / "step-3").iterdir()))
    rows = [part["model.embed.weight"].shape[0] for part in (first, second)]
    assert min(rows) > 0 and sum(rows) == load_model(tmp_path / "whole" / "model.pth").config.vocab_size
    assert len(first.keys() ^ second.keys()) == len([name for name in first | second if name.endswith(".step")])
    code, errors = train_by_two(data, tmp_path / "parts", *how, "--resume")
    assert code == 0, errors
    a, b = (load_model(tmp_path / name / "model.pth").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    alone = call(train.main, "--data", data, "--out", tmp_path / "none", *TINY, "--fsdp")
    assert alone.returncode == 1 and alone.stderr.count("\n") == 1 and "--fsdp" in alone.stderr


KILLED = """
import os, signal
import train, train_state
write_part = train_state.write_part
def killed(path, pieces):
    if path.parent.name == "step-4":
        if os.environ["RANK"] == "0":
            write_part(path, pieces)
        else:
            path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return write_part(path, pieces)
train_state.write_part = killed
train.run_command(lambda: train.train(train.parse_args()), watch=False)
"""


def logged(out):
    """Of the steps behind the second: [norm of the gradient], and of the validations [[each exit's loss]]."""
    lines = [line for line in read_log(out / "train_log.jsonl") if line["step"] > 2]
    norms = [line["gradient_norm"] for line in lines if "gradient_norm" in line]
    return norms, [line["val_loss"] for line in lines if "val_loss" in line]


@pytest.mark.slow
def test_one_and_four_processes_resume_what_two_saved(data, tmp_path):
    """Two are killed while they save. What they had saved before goes on in another number of processes as it would
    have in one all along; and a damaged part is one line, whichever process finds it.
    """
    how = ("--steps", "7", "--max_dropout", "0.3", "--save_every", "2", "--log_every", "1", "--eval_every", "1")
    run(data, tmp_path / "whole", *how)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    code, errors = train_by_two(data, tmp_path / "two", *how, "--fsdp", script=script)
    folder = tmp_path / "two" / "train_state"
    assert code and {path.name for path in folder.iterdir()} == {"step-2", "step-4"}, errors
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    run(data, tmp_path / "one", *how, "--resume")
    code, errors = train_by_two(data, tmp_path / "four", *how, "--fsdp", "--resume", processes=4)
    assert code == 0, errors
    norms, losses = logged(tmp_path / "whole")
    assert len(norms) == 5 and len(losses) == 5
    for name in ("one", "four"):
        found_norms, found_losses = logged(tmp_path / name)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=1e-5, atol=0)
        assert not list((tmp_path / name).glob("train_state*"))
    part = folder / "step-2" / "part-2-of-2.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    code, errors = train_by_two(data, tmp_path / "two", *how, "--fsdp", "--resume")
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code and lines == [f"error: --resume: {part}: damaged (it has another checksum); start the run anew"]


@pytest.mark.parametrize(
    "args,words",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--include", "*.c"], "no UTF-8 text files"),
        (["--vocab_size", "100000"], "--vocab_size 100000"),
        (["--context", "100000"], "too little text"),
        (["--resume"], "--resume"),
        (["--checkpoint_path", "nowhere.pth"], "nowhere.pth"),
        (["--dim", "30", "--n_head", "4"], "--dim 30"),
        (["--steps", "0"], "--steps 0"),
    ],
)
def test_bad_input(args, words, data, tmp_path):
    with pytest.raises(InputError) as error:
        run(data, tmp_path / "out", *args)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args", [["--accumulate", 2], ["--accumulate", 4], ["--activation_checkpointing"], ["small logits"]]
)
def test_saving_memory_changes_no_loss(args, data, tmp_path, monkeypatch):
    how = ["--steps", 4, "--max_dropout", 0.5]
    wanted = run(data, tmp_path / "all", *how)
    if args == ["small logits"]:
        monkeypatch.setattr(recipe, "LOGITS", 300 * 7)  # seven rows at a time
        args = []
    assert run(data, tmp_path / "less", *how, *args) == pytest.approx(wanted, rel=1e-5)


def double_model(vocab_size):
    """Three random layers in float64."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocab_size, dim=16, n_layer=3, n_head=2, n_kv_head=2, head_dim=8, intermediate_size=24, context=64
    )
    model = Transformer(config)
    first_model.initialize(model)
    return model.double()


def test_logits_are_there_piece_by_piece():
    """Of many exits, the losses' gradients against PyTorch's own from all logits, in float64."""
    model = double_model(1000)
    tokens, targets = torch.randint(0, 1000, (2, 4, 20))
    keep, weights = torch.ones(3, 4, dtype=torch.bool), torch.tensor([0.2, 0.3, 0.5])
    sizes = []
    model.head.register_forward_hook(lambda module, args, logits: sizes.append(logits.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LOGITS", 11_000)
        loss, losses = recipe.LayerSkipLoss(model)(tokens, targets, keep, weights, keep[:, 0])
        loss.backward()
    assert max(sizes) == 11_000
    found = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    x, wanted = model.embed(tokens), []
    for layer in model.layers:
        x = layer(x, *model.positions(20, None))
        wanted.append(torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(losses, torch.stack(wanted), check_dtype=False)
    sum(w * loss for w, loss in zip(weights, wanted, strict=True)).backward()
    for name, w in model.named_parameters():
        torch.testing.assert_close(found[name], w.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moment", [3, 6])
def test_a_validation_that_was_due_when_a_run_stopped_comes_later(moment, data, tmp_path, monkeypatch):
    how = ["--steps", 8, "--eval_every", 3]
    run(data, tmp_path / "whole", *how)
    interrupt_after(moment, monkeypatch)
    with pytest.raises(SystemExit):
        run(data, tmp_path / "parts", *how)
    monkeypatch.undo()
    run(data, tmp_path / "parts", *how, "--resume")
    whole, parts = (read_log(tmp_path / name / "train_log.jsonl") for name in ("whole", "parts"))
    assert [line["step"] for line in whole if "val_loss" in line] == [3, 6, 8]
    assert [line.get("val_loss") for line in whole] == [line.get("val_loss") for line in parts]


def test_the_log_and_its_picture(data, tmp_path, monkeypatch):
    """A resumed run's log is that of a whole run; TensorBoard gets the same numbers."""
    how = ["--steps", 8, "--log_every", 1, "--eval_every", 3, "--rotation", 2]
    run(data, tmp_path / "whole", *how)
    interrupt_after(5, monkeypatch)
    with pytest.raises(SystemExit):
        run(data, tmp_path / "parts", *how)
    monkeypatch.undo()
    path = tmp_path / "parts" / "train_log.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "exit_loss": [1, 2, 3, 4]}\n{"step": 7, "ex')  # a killed run's
    added = []
    board = SimpleNamespace(add_scalar=lambda *values: added.append(values), flush=lambda: None)
    monkeypatch.setattr(train_log, "open_board", lambda *_: board)
    run(data, tmp_path / "parts", *how, "--resume", "--tensorboard")
    timing = {"seconds", "tokens_per_second"}
    logs = []
    for name in ("whole", "parts"):
        lines = read_log(tmp_path / name / "train_log.jsonl")
        logs.append([{field: line[field] for field in line if field not in timing} for line in lines])
    assert logs[0] == logs[1]
    steps = [line for line in logs[0] if "exit_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)) and None in steps[1]["exit_loss"]
    assert all(line["gradient_norm"] > 0 and line["learning_rate"] > 0 for line in steps)
    assert ("exit_loss/exit 4", logs[1][-2]["exit_loss"][3], 8) in added and min(added, key=itemgetter(2))[2] == 6
    picture = tmp_path / "picture.png"
    result = call(plot_training.main, tmp_path / "whole", path, "--out", picture)
    assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG"), result.stderr
    picture.unlink()
    result = call(plot_training.main, *[tmp_path / "whole"] * 5, "--compare", 2, "--out", picture)
    assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG"), result.stderr
    result = call(plot_training.main, path, "--compare", 5, "--out", picture)
    assert result.returncode == 1 and "--compare 5: " in result.stderr and "no such exit" in result.stderr
    result = call(plot_training.main, data, "--out", picture)
    assert result.returncode == 1 and "train_log.jsonl: not found" in result.stderr


@pytest.mark.parametrize("logits", [1 << 25, 2_000])
def test_distillation_by_hand(logits, monkeypatch):
    """Against the definition in float64: early exits move toward the last layer's distribution, which stays."""
    monkeypatch.setattr(recipe, "LOGITS", logits)
    model = double_model(50)
    tokens, targets = torch.randint(0, 50, (2, 4, 20))
    keep, weights = torch.ones(3, 4, dtype=torch.bool), torch.tensor([0.3, 0.0, 0.7])
    loss, losses = recipe.LayerSkipLoss(model, distill=0.25, temperature=2.0)(
        tokens, targets, keep, weights, keep[:, 0]
    )
    x, outs = model.embed(tokens), []
    for layer in model.layers:
        x = layer(x, *model.positions(20, None))
        outs.append(model.logits(x).flatten(0, 1))
    texts = [-out.log_softmax(-1)[range(80), targets.flatten()].mean() for out in outs]
    teacher, student = (outs[2].detach() / 2).softmax(-1), (outs[0] / 2).softmax(-1)
    divergence = 4 * (teacher * (teacher.log() - student.log())).sum(-1).mean()
    wanted = 0.3 * (0.75 * texts[0] + 0.25 * divergence) + 0.7 * texts[2]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert losses.isnan().tolist() == [False, True, False] and losses[0].item() == pytest.approx(
        texts[0].item(), rel=1e-5
    )
    found = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(found, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_help_fits_on_two_screens(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    out = capsys.readouterr().out
    assert out.count("\n") <= 100 and out.count("\n\n") >= 7 and "--freeze" in out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_says_what_to_lower(error, data, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "compute_gradients", fail)
    result = call(train.main, "--data", data, "--out", tmp_path / "out", *TINY)
    assert result.returncode == 1 and result.stderr.startswith("error: out of memory: lower --batch_size")
