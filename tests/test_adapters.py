"""Exit adapters: the text stays the model's, and so do the cache rows; their files; and how they are trained."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import freeze
import generate
import own_text
import quantize
import recipe
import tasks
import train
import tune
from adapters import adapters_path, load_adapters, save_adapters, state_of
from checkpoint import load_model, save_checkpoint
from command import InputError
from conftest import FAMILY, ROOT, call, torchrun, write_tokenizer
from drafters import SelfDrafter, make_drafter
from generate import Decoder
from model import ExitAdapter
from test_drafters import joint_counts, repeating_model
from test_generate import PROMPT, chi_square, run, tiny_model
from test_train import interrupt_after
from train_log import read_log

SETTINGS = {
    "self": dict(exit_layer=2, k=3),
    "self, fifteen drafts": dict(exit_layer=1, k=15),
    "int8": dict(exit_layer=2, k=4, draft_precision="int8"),
    "int4": dict(exit_layer=1, k=2, draft_precision="int4"),
    "n-gram, then self": dict(exit_layer=2, k=3, ngram_k=5),
    "n-gram, then int8": dict(exit_layer=1, k=6, draft_precision="int8", ngram_k=4),
}


def adapted(model, block=True, exits=(1, 2), seed=3):
    """The model, with random adapters that change the drafts but leave them right now and then."""
    generator = torch.Generator().manual_seed(seed)
    for number in exits:
        adapter = ExitAdapter(model.config, block)
        for weight in adapter.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = 1 + 0.3 * noise if weight.dim() == 1 else 0.08 * noise
        model.adapters[number] = (
            adapter.to(model.norm.weight.device, model.norm.weight.dtype).eval().requires_grad_(False)
        )
    return model


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_text_and_cache_rows_are_those_of_plain_decoding(name, block, dtype):
    plain, ours = repeating_model(dtype=dtype), adapted(repeating_model(dtype=dtype), block)
    text, _ = run(plain, 70)
    found, stats = run(ours, 70, **SETTINGS[name])
    assert found == text and len(set(text)) > 5 and sum(stats.accept_counts[1:]) > 0
    rows = len(PROMPT) + len(text) - 1  # the last token has none yet
    for a, b in zip(plain.layers, ours.layers, strict=True):
        for cache in ("k_cache", "v_cache"):
            wanted, own = (getattr(layer.attention, cache)[:, :, :rows] for layer in (a, b))
            assert torch.equal(wanted, own)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_adapters_cache_rows_are_those_of_the_text(name):
    """For every position, whoever drafted the round; a copy of the block writes them for the model's own states."""
    settings = SETTINGS[name]
    ours, alone = adapted(repeating_model()), adapted(repeating_model())
    text, _ = run(ours, 70, **settings)
    ids = torch.tensor([[*PROMPT, *text[:-1]]])
    drafter = make_drafter(alone, **settings)
    drafter = getattr(drafter, "otherwise", drafter)
    for model in drafter.models:
        model.setup_caches(ids.shape[1])
    drafter.fill(ids, None)
    number = settings["exit_layer"]
    for cache in ("k_cache", "v_cache"):
        a, b = (getattr(m.adapters[number].layers[0].attention, cache)[:, :, : ids.shape[1]] for m in (ours, alone))
        torch.testing.assert_close(a, b)


def test_drafts_come_through_the_adapter():
    """The drafts are those that the definition gives: block and norm behind the first layers, in float64."""
    model = adapted(tiny_model())
    drafter = make_drafter(model, exit_layer=2, k=3, draft_head="full")
    decoder = Decoder(model, drafter=drafter)
    with torch.inference_mode():
        x, start = drafter.fill(torch.tensor([PROMPT]), None)
        token = model.logits(model(x, None, start))[:, -1:].argmax(-1)
        tokens, _, _ = drafter.draft(decoder.pieces[drafter][0], token, torch.tensor([len(PROMPT)]), None)
        drafted = tokens[0].tolist()
    exact = adapted(tiny_model()).double()
    adapter = exact.adapters[2].double()
    ids = [*PROMPT, drafted[0]]
    for token in drafted[1:]:
        x = exact(torch.tensor([ids]), None, 0, 2)
        x = exact.run(adapter.layers, x, None)
        assert exact.head(adapter.norm(x))[0, -1].argmax().item() == token
        ids.append(token)


def test_bytes_of_a_round():
    """K steps through the first layers, the block, the norm and the head's copy; and the block once more."""
    model = adapted(tiny_model())
    drafter = make_drafter(model, exit_layer=2, k=3, draft_head="full")
    layer = sum(weight.nbytes for weight in model.layers[0].parameters())
    step = 3 * layer + 48 * 4 + 64 * 48 * 4
    assert drafter.bytes_per_round() == 3 * step + layer and drafter.extra_bytes() == 0
    copy = make_drafter(model, exit_layer=2, draft_precision="int8", ngram_k=4)
    rounded = sum(tensor.nbytes for tensor in copy.otherwise.block[0].state_dict().values())
    assert copy.bytes_per_round() == rounded < layer / 2 and copy.extra_bytes() > 3 * rounded


@pytest.mark.parametrize("shape", FAMILY)
def test_greedy_text_is_that_of_transformers(shape, hf_folder, checkpoint):
    _, theirs = hf_folder(shape)
    prompt = torch.tensor([PROMPT * 2])
    how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = theirs.generate(prompt, **how)[0, prompt.shape[1] :].tolist()
    for block in (False, True):
        model = adapted(load_model(checkpoint(shape)), block)
        for settings in SETTINGS.values():
            assert run(model, 40, prompt[0].tolist(), model.config.eos_ids, **settings)[0] == expected


@pytest.mark.parametrize("options", [["--mode", "int8"], ["--mode", "int4", "--groupsize", 32]])
def test_of_a_quantized_model(options, checkpoint, tmp_path):
    """The block is rounded as the model is."""
    shutil.copytree(checkpoint("llama2").parent, tmp_path / "copy")
    result = call(quantize.main, "--checkpoint_path", tmp_path / "copy" / "model.pth", *options)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "copy").glob("model_int*.pth")
    model = adapted(load_model(path))
    plain, _ = run(model, 60)
    assert run(model, 60, exit_layer=2, k=3)[0] == plain
    drafter = make_drafter(model, exit_layer=2)
    assert drafter.block[0].ffn.w2.scale is not None and model.adapters[2].layers[0].ffn.w2.scale is None


def test_trusting_the_adapters_hidden_states_is_noticed(monkeypatch):
    """What the tests above look for: verification that goes on from what came out of the adapter's block."""
    model = adapted(tiny_model())
    plain, _ = run(model, 70)

    def wrong(self, tokens, states, pos):
        last = self.target.run(self.layers, tokens[:, -1:], pos[-1:])
        return torch.cat((*states, last), dim=1), self.exit_layer

    monkeypatch.setattr(SelfDrafter, "verify_from", wrong)
    assert run(model, 70, exit_layer=2, k=3)[0] != plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self", "n-gram, then int8"])
def test_sampled_tokens_have_the_models_distribution(name):
    counts, joint = joint_counts(adapted(tiny_model(vocab=12)), 2000, **SETTINGS[name])
    assert chi_square(counts, joint) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_is_eager():
    model = adapted(repeating_model())
    eager, stats = run(model, 60, **SETTINGS["n-gram, then self"])
    compiled, same = run(model, 60, compile=True, compile_prefill=True, **SETTINGS["n-gram, then self"])
    assert compiled == eager and same.rounds == stats.rounds


def test_acceptance_is_predicted_through_the_adapter():
    """From a text the tuner tells what decoding will count, at exits with and without adapters."""
    model = adapted(repeating_model(), exits=[2])
    text = list(Decoder(model, rows=90).generate(PROMPT, 64))
    decoder = Decoder(model, exit_layer=3, k=4, rows=90)
    chances = tune.exit_chances(decoder, PROMPT, text, [1, 2, 3])
    assert chances[2] != tune.exit_chances(Decoder(repeating_model(), exit_layer=3, k=4), PROMPT, text, [2])[2]
    for number in (1, 2, 3):
        stats = run(model, 60, exit_layer=number, k=4)[1]
        assert tune.expected_counts(chances[number], 4, 60) == stats.accept_counts


def test_exits_with_and_without_a_block_are_timed_apart(monkeypatch):
    """A block makes a round cost more, so between the two nothing is interpolated."""
    model, timed = adapted(repeating_model(), exits=[2]), []

    def corners(build, plain, prompt, exits, timed_ks, *_):
        timed.append(exits)
        return {exit: [1.0 + 9 * (exit == 2)] * len(timed_ks) for exit in exits}

    def build(precision, exit_layer, k, rows):
        return Decoder(model, exit_layer=exit_layer, k=k or 1, rows=rows)

    monkeypatch.setattr(tune, "time_corners", corners)
    found = tune.predict(build, [PROMPT], 30, {"same": [1, 2, 3]}, [2], [2], 1)
    assert timed == [[1, 3], [2]] and found["same", 2, 2][0] < 0.5 < found["same", 1, 2][0]


def test_what_was_measured_without_adapters_is_not_taken_with_them(folder):
    path, model = folder
    checkpoint, plain = path / "model.pth", tiny_model(vocab=300)
    keys = [tune.key(each, False, 0.0) for each in (plain, model)]
    tune.store(checkpoint, keys[1], 1, 2, "same")
    assert tune.stored(checkpoint, keys[1])[:2] == (1, 2) and tune.stored(checkpoint, keys[0]) is None
    tune.store(checkpoint, keys[0], 3, 4, "same")
    assert tune.stored(checkpoint, keys[0])[:2] == (3, 4) and tune.stored(checkpoint, keys[1])[:2] == (1, 2)
    args = SimpleNamespace(checkpoint_path=checkpoint, device="cpu")
    before = tasks.measured_with(args)
    (path / "adapters.pth").unlink()
    assert tasks.measured_with(args) != before


# Files.


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with adapters, and the model with them."""
    model = adapted(tiny_model(vocab=300))
    save_checkpoint(tmp_path / "model.pth", dict(model.state_dict()), model.config)
    write_tokenizer(tmp_path)
    save_adapters(adapters_path(tmp_path / "model.pth"), model.adapters, "a test", torch.float32)
    return tmp_path, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(dtype, folder):
    path, wanted = folder
    model = load_model(path / "model.pth", dtype=dtype)
    load_adapters(path / "model.pth", model)
    assert list(model.adapters) == [1, 2]
    for number, adapter in model.adapters.items():
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor, wanted.adapters[number].state_dict()[name].to(dtype))
    assert json.loads((path / "adapters.json").read_text())["exits"] == [1, 2]
    assert model.state_dict().keys() == tiny_model().state_dict().keys()  # no part of the checkpoint


def test_wrong_files_are_one_line(folder, tmp_path):
    path, wanted = folder
    model = load_model(path / "model.pth")
    whole = (path / "adapters.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(wanted.adapters[1].norm.weight.numpy().tobytes())] ^= 1
    (path / "adapters.pth").write_bytes(flipped)
    with pytest.raises(InputError, match="adapters.pth: damaged"):
        load_adapters(path / "model.pth", model)
    (path / "adapters.pth").write_bytes(whole)
    shallow = tiny_model(n_layer=2, vocab=300)
    with pytest.raises(InputError, match=r"adapters.pth: has an adapter for exit 2, but the model has 2 layers"):
        load_adapters(path / "model.pth", shallow)
    description = json.loads((path / "adapters.json").read_text())
    (path / "adapters.json").write_text(json.dumps({**description, "block": False}))
    with pytest.raises(InputError, match="adapters.pth: tensor 1.layers.0.attention.wo.weight is not part"):
        load_adapters(path / "model.pth", model)
    (path / "adapters.json").write_text(json.dumps({**description, "exits": ["2"]}))
    with pytest.raises(InputError, match="adapters.json: exits is"):
        load_adapters(path / "model.pth", model)


def test_the_command_uses_what_lies_beside_the_checkpoint(folder):
    path, _ = folder
    options = ["--checkpoint_path", path / "model.pth", "--temperature", 0, "--num_samples", 1, "--device", "cpu"]
    options += ["--max_new_tokens", 20, "--prompt", "ab"]
    plain = call(generate.main, *options)
    drafted = call(generate.main, *options, "--self_speculative", "--json", path / "result.json")
    assert plain.returncode == drafted.returncode == 0, drafted.stderr
    assert plain.stdout.split("Time")[0] == drafted.stdout.split("Time")[0]
    assert json.loads((path / "result.json").read_text())["settings"]["exit_layer"] == 1  # the lowest with an adapter


def test_a_draft_model_has_none(folder, tmp_path):
    """It may lie in the same folder, and have fewer layers than the adapters want."""
    path, _ = folder
    small = tiny_model(n_layer=1, vocab=300)
    save_checkpoint(path / "small.pth", dict(small.state_dict()), small.config)
    options = [
        "--checkpoint_path",
        path / "model.pth",
        "--draft_checkpoint_path",
        path / "small.pth",
        "--device",
        "cpu",
    ]
    result = call(generate.main, *options, "--num_samples", 1, "--max_new_tokens", 5, "--prompt", "ab")
    assert result.returncode == 0, result.stderr


# Training.


def make_objective(block, temperature=1.0):
    torch.manual_seed(0)
    model = tiny_model().double()
    adapters = adapted(model, block).adapters
    objective = freeze.AdapterLoss(model, adapters, temperature)
    for weight in objective.trained.parameters():
        weight.requires_grad_(True)
    return objective


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("logits", [1 << 25, 640])
def test_the_objective_by_hand(block, logits, monkeypatch):
    """Divergence, cross entropies and gradients in float64, whole and in pieces, against the definition."""
    monkeypatch.setattr(recipe, "LOGITS", logits)
    objective = make_objective(block, temperature=2.0)
    model = objective.model
    tokens, targets = torch.randint(0, 64, (2, 3, 11))
    loss, losses = objective(tokens, targets)
    found = torch.autograd.grad(loss, list(objective.trained.parameters()))
    teacher = (model.logits(model(tokens)) / 2).softmax(-1)
    total = 0
    for number, adapter in model.adapters.items():
        x = model(tokens, None, 0, number)
        for layer in adapter.layers:
            x = layer(x, *model.positions(11, None))
        logits = model.head(adapter.norm(x))
        student = (logits / 2).softmax(-1)
        total += 4 * (teacher * (teacher.log() - student.log())).sum(-1).mean() / 2
        entropy = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
        assert losses[number - 1].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert losses.isnan().tolist() == [False, False, True, True]
    for a, b in zip(found, torch.autograd.grad(total, list(objective.trained.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("logits", [1 << 25, 640])
def test_validation_is_through_the_adapters(logits, monkeypatch):
    """And of their exits and the last layer alone; no more logits exist at a time than may."""
    monkeypatch.setattr(recipe, "LOGITS", logits)
    objective, sizes = make_objective(True), []
    objective.model.head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    model, ids = objective.model, torch.randint(0, 64, (61,))
    context = torch.no_grad()
    result = recipe.evaluate(objective, ids, 20, 2, 60, context, torch.device("cpu"))
    assert result.losses.isnan().tolist() == [False, False, True, False] and max(sizes) <= max(640, logits)
    batch = ids[:60].view(3, 20)
    with torch.no_grad():
        x = model.run(model.adapters[1].layers, model(batch, None, 0, 1), None)
        logits = model.head(model.adapters[1].norm(x))
        agreement = (logits.argmax(-1) == model.logits(model(batch)).argmax(-1)).double().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[1:])
    assert result.losses[0].item() == pytest.approx(loss.item()) and result.agreement[3] == 1
    assert result.agreement[0].item() == pytest.approx(agreement.item())


@pytest.fixture
def base(tmp_path):
    """A checkpoint whose first layers alone predict badly, and a text for it."""
    torch.manual_seed(0)
    model = tiny_model(vocab=300, late=1.0)
    folder = tmp_path / "base"
    folder.mkdir()
    save_checkpoint(folder / "model.pth", dict(model.state_dict()), model.config)
    write_tokenizer(folder)
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x): return x * {n} + value\n" for n in range(150)))
    return folder / "model.pth"


OPTIONS = ["--freeze", "--context", "32", "--batch_size", "4", "--device", "cpu", "--precision", "float32"]
OPTIONS += ["--save_precision", "float32", "--eval_every", "0", "--warmup", "2", "--workers", "1"]


def fit(path, *args):
    return train.train(train.parse_args(["--checkpoint_path", str(path), *OPTIONS, *map(str, args)]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ["norm", "block"])
def test_adapters_learn_and_the_base_stays(kind, base, tmp_path, capsys):
    before = contents(base.parent)
    losses = fit(base, "--data", tmp_path / "text.txt", "--adapter", kind, "--exits", 1, 3, "--steps", 30, "--lr", 0.01)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = contents(base.parent)
    assert {name: after.pop(name) for name in before} == before and set(after) == {"adapters.pth", "adapters.json"}
    model, _ = generate.load(base, "cpu", "float32")
    assert list(model.adapters) == [1, 3] and len(model.adapters[1].layers) == (kind == "block")
    plain = run(model, 40)[0]
    assert run(model, 40, exit_layer=1, k=3)[0] == plain
    table = capsys.readouterr().out
    assert "adapters.pth: validation on" in table and "\n   3  " in table and "\n   2  " not in table
    with pytest.raises(InputError, match="adapters.pth: exists already"):
        fit(base, "--data", tmp_path / "text.txt", "--steps", 1)


def test_an_interrupted_run_resumes_exactly(base, tmp_path, monkeypatch):
    how = ["--generate", 60, "--val_fraction", 0.2, "--steps", 6, "--exits", 2, "--save_every", 2]
    whole = fit(base, *how)
    first = contents(base.parent)
    for name in ("adapters.pth", "adapters.json"):
        (base.parent / name).unlink()
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(SystemExit, match="stopped after step 3"):
            fit(base, *how)
    assert fit(base, *how, "--resume") == whole[3:]
    assert contents(base.parent) == first


@pytest.mark.slow
def test_two_processes_train_as_one(base, tmp_path):
    """By torchrun over gloo: the same losses, and the same adapters to rounding."""
    how = ["--data", tmp_path / "text.txt", "--exits", 1, 2, "--steps", 5, "--accumulate", 2]
    how = [*map(str, how), "--eval_every", "2"]
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(base.parent, folder)
        options = ["--checkpoint_path", str(folder / "model.pth"), *OPTIONS, *how]
        if name == "one":
            train.train(train.parse_args(options))
        else:
            process = torchrun(2, ROOT / "scripts" / "train.py", *options)
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
        model, _ = generate.load(folder / "model.pth", "cpu", "float32")
        lines = read_log(folder / "adapters" / "train_log.jsonl")
        found.append((state_of(model.adapters), [line["val_loss"] for line in lines if "val_loss" in line]))
    (one, losses), (two, same) = found
    assert len(losses) == 3 and losses[0][2] is None
    for a, b in zip(losses, same, strict=True):
        assert [x for x in a if x] == pytest.approx([x for x in b if x], rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_log_likelihoods_of_an_exit_are_through_its_adapter(base):
    from harness import Engine

    model, tokenizer = generate.load(base, "cpu", "float32")
    engine = Engine(adapted(model), tokenizer, 2, None, 4)
    text = [[5, 9, 3], [17, 60, 33, 25]]
    ((value, greedy),) = engine._loglikelihood_tokens([(None, *text)], disable_tqdm=True)
    exact = adapted(load_model(base)).double()
    adapter = exact.adapters[2].double()
    x = exact.run(adapter.layers, exact(torch.tensor([[*text[0], *text[1][:-1]]]), None, 0, 2), None)
    logprobs = exact.head(adapter.norm(x))[0, 2:].log_softmax(-1)
    assert value == pytest.approx(logprobs[range(4), text[1]].sum().item(), rel=1e-5)
    assert greedy == (logprobs.argmax(-1).tolist() == text[1])


def test_a_run_goes_on_in_another_process(base, tmp_path):
    """One that has written the texts with the engine's kernels, and one that finds them there: the same losses."""
    how = ["--generate", 60, "--val_fraction", 0.2, "--steps", 6, "--exits", 2, "--log_every", 1]
    options = ["--checkpoint_path", base, *OPTIONS, *how, "--packed", tmp_path / "packed"]
    for name in ("first", "second"):
        command = [sys.executable, ROOT / "scripts" / "train.py", *options, "--out", tmp_path / name]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        for file in ("adapters.pth", "adapters.json"):
            (base.parent / file).unlink()
    first, second = (read_log(tmp_path / name / "train_log.jsonl") for name in ("first", "second"))
    for name in ("exit_loss", "val_loss", "gradient_norm"):
        assert [line.get(name) for line in first] == [line.get(name) for line in second]


def test_a_base_that_changed_is_noticed(base, tmp_path, monkeypatch):
    original = train.optimizer_step

    def careless(*args):
        original(*args)
        changed[0].norm.weight.data[0] += 1

    changed = []
    make = train.make_objective
    monkeypatch.setattr(
        train, "make_objective", lambda args, model, *rest: changed.append(model) or make(args, model, *rest)
    )
    monkeypatch.setattr(train, "optimizer_step", careless)
    with pytest.raises(InputError, match="model.pth: norm.weight is not what was loaded"):
        fit(base, "--data", tmp_path / "text.txt", "--steps", 2)
    assert not adapters_path(base).exists()


# The model's own text.


INSTRUCTIONS = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}][/]{% endif %}{% endfor %}"


def test_a_template_whose_turn_is_no_eos(base):
    """As Llama 2's: when the model itself closes the user's words, it is answering; the turn isn't written again."""
    (base.parent / "chat_template.jinja").write_text(INSTRUCTIONS)
    model, tokenizer = generate.load(base, "cpu", "float32")
    opening, turn = own_text.frame(model, tokenizer, base)
    page = own_text.Page(list(opening), [], False, frozenset({2}))
    for token in [9, 8, *turn, 7, 2, 5]:
        page.add(token, turn, 100)
    assert page.ids == [*opening, 9, 8, *turn, 7, 2] and page.done


@pytest.mark.parametrize(
    "template,words", [("hello", "doesn't show what a user says"), ("{{ messages[0].content }}!", "")]
)
def test_odd_templates(template, words, base):
    (base.parent / "chat_template.jinja").write_text(template)
    model, tokenizer = generate.load(base, "cpu", "float32")
    if words:
        with pytest.raises(InputError, match=words):
            own_text.Author(model, tokenizer, base, 40, seed=0)
    else:
        assert own_text.Author(model, tokenizer, base, 40, seed=0).opening == [tokenizer.bos_id]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"


@pytest.mark.parametrize("chat", [False, True])
def test_own_texts_are_drawn_from_the_model(chat, base):
    """Token for token by inverse CDF, from whole passes in float64; what the template has stands where it belongs."""
    if chat:
        (base.parent / "chat_template.jinja").write_text(TEMPLATE)
    model, tokenizer = generate.load(base, "cpu", "float32")
    author = own_text.Author(model, tokenizer, base, 60, seed=5)
    names = list(own_text.OwnTexts(3).documents())
    with author:
        texts = author.batch(names)
    exact = load_model(base).double()
    opening, turn = own_text.frame(model, tokenizer, base)
    random = torch.Generator().manual_seed(5 * 1_000_003)
    drawn = [torch.rand(3, dtype=torch.float64, generator=random) for _ in range(60 - len(opening))]
    ends = set(model.config.eos_ids)
    for row, text in enumerate(texts):
        assert text[: len(opening)] == opening and len(text) <= 60
        place, forced = len(opening), []
        answering = not turn
        while place < len(text):
            if not forced:
                logits = exact.logits(exact(torch.tensor([text[:place]])))[0, -1]
                token = int((logits.softmax(-1).cumsum(-1) <= drawn[place - len(opening)][row]).sum())
                if not answering and (token in ends or place >= 30):
                    answering, forced = True, list(turn)
                else:
                    assert text[place] == token
                    place += 1
                    assert token not in ends or place == len(text)
                    continue
            assert text[place] == forced.pop(0)
            place += 1
        assert len(text) == 60 or text[-1] in ends
    with own_text.Author(model, tokenizer, base, 60, seed=5) as again:
        assert again.batch(names) == texts


def test_texts_together_have_caches_that_fit(base, monkeypatch):
    model = load_model(base)
    row = 2 * 4 * 2 * 12 * 4  # keys and values of four layers with two heads of twelve float32
    assert own_text.texts_together(model, 50) == 16
    monkeypatch.setattr(own_text, "MOST_BYTES", 5 * 50 * row)
    assert own_text.texts_together(model, 50) == 4


@pytest.mark.parametrize(
    "args,words",
    [
        (["--generate", 4, "--context", 3], "--context 3: texts that"),
        (["--generate", 4, "--data", "x"], "--data, or let the checkpoint write them"),
        ([], "--data, or let the checkpoint write them"),
        (["--generate", 4, "--exits", 4], "--exits 4: the model has 4 layers; exits that can be trained: 1 to 3"),
        (["--generate", 4, "--layers", 1], "--layers: not with --freeze"),
        (["--generate", 4, "--activation_checkpointing"], "--activation_checkpointing: not with --freeze"),
        (["--generate", 4, "--exits", 2, "--exit_layer", 1], "--exit_layer 1: with --freeze it must be one of --exits"),
    ],
)
def test_bad_input(args, words, base):
    with pytest.raises(InputError) as error:
        fit(base, *args)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not adapters_path(base).exists()


def test_the_default_exits():
    assert [freeze.default_exits(n) for n in (2, 3, 4, 16, 30)] == [[1], [1, 2], [1, 2, 3], [4, 8, 12], [7, 15, 22]]
