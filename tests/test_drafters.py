"""Drafts by n-grams and by quantized copies: the text stays the target's, whoever drafts, and so do the cache rows."""

import random

import pytest
import torch
import torch.nn.functional as F

import generate
from checkpoint import load_model
from command import InputError
from conftest import FAMILY
from drafters import LONGEST_PAUSE, Drafter, NgramDrafter, QuantizedDrafter, SelfDrafter, make_drafter
from generate import Decoder, Sampling, acceptance
from kernels import cpu
from model import Linear
from test_generate import PROMPT, chi_square, reference_distribution, run, tiny_model

INT8, INT4 = dict(draft_precision="int8"), dict(draft_precision="int4")
NGRAM = dict(ngram_k=5)
DRAFTERS = {
    "int8": dict(exit_layer=4, k=3, **INT8),
    "int4, first layer": dict(exit_layer=1, k=2, **INT4),
    "int4, fifteen drafts": dict(exit_layer=4, k=15, **INT4),
    "n-gram": NGRAM,
    "n-gram, one token": dict(ngram_k=1, ngram_max=1),
    "n-gram, fifteen drafts": dict(ngram_k=15),
    "n-gram, then self": dict(exit_layer=2, k=3, **NGRAM),
    "n-gram, then int8": dict(exit_layer=4, k=6, **INT8, **NGRAM),
}


def repeating_model(**how):
    """A model whose greedy text repeats itself now and then: it hears little but the last token."""
    model = tiny_model(**how)
    model.layers[0].attention.wo.weight *= 0.15
    return model


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_text_is_that_of_plain_decoding(name, dtype):
    accepted = 0.0
    for model in (tiny_model(dtype=dtype), repeating_model(dtype=dtype)):
        plain, _ = run(model, 80)
        ours, stats = run(model, 80, **DRAFTERS[name])
        assert ours == plain and len(set(plain)) > 5
        accepted += acceptance(stats.accept_counts)[1]
    assert accepted > 0.2


@pytest.mark.parametrize("shape", FAMILY)
def test_greedy_text_is_that_of_transformers(shape, hf_folder, checkpoint):
    _, theirs = hf_folder(shape)
    prompt = torch.tensor([PROMPT * 2])
    how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = theirs.generate(prompt, **how)[0, prompt.shape[1] :].tolist()
    model = load_model(checkpoint(shape))
    for settings in DRAFTERS.values():
        assert run(model, 40, prompt[0].tolist(), model.config.eos_ids, **settings)[0] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["int4, first layer", "n-gram, then int8"])
def test_compiled_is_eager(name):
    model = repeating_model()
    eager, stats = run(model, 60, **DRAFTERS[name])
    compiled, compiled_stats = run(model, 60, compile=True, compile_prefill=True, **DRAFTERS[name])
    assert compiled == eager and compiled_stats.rounds == stats.rounds


@pytest.mark.parametrize("name", DRAFTERS)
def test_cache_rows_are_those_of_plain_decoding(name):
    """Also those that the copy of the target wrote first: an accepted draft's row is the target's own."""
    models = repeating_model(), repeating_model()
    text, _ = run(models[0], 70)
    run(models[1], 70, **DRAFTERS[name])
    rows = len(PROMPT) + len(text) - 1  # the last token has none yet
    for plain, ours in zip(models[0].layers, models[1].layers, strict=True):
        for cache in ("k_cache", "v_cache"):
            a, b = getattr(plain.attention, cache), getattr(ours.attention, cache)
            assert torch.equal(a[:, :, :rows], b[:, :, :rows])


@pytest.mark.parametrize("k, ngram_k", [(3, 5), (5, 3)])
def test_n_grams_in_front_of_a_draft_model(k, ngram_k):
    """Its cache has a row for every position, whoever drafted the round: those that it writes for the text alone."""
    target, draft, alone = repeating_model(), repeating_model(n_layer=1), repeating_model(n_layer=1)
    plain, _ = run(target, 80)
    ours, stats = run(target, 80, draft_model=draft, k=k, ngram_k=ngram_k)
    assert ours == plain and all(map(sum, stats.rounds.values())) and len(stats.rounds) == 2
    drafter = make_drafter(target, draft_model=draft, k=k, ngram_k=ngram_k)
    assert drafter.bytes_per_round() == drafter.otherwise.step_bytes()[0] > 0  # all layers once, and no head
    rows = len(PROMPT) + len(plain) - 1
    alone.setup_caches(rows)
    alone(torch.tensor([[*PROMPT, *plain[:-1]]]), None)
    for cache in ("k_cache", "v_cache"):
        found, wanted = (getattr(model.layers[0].attention, cache)[:, :, :rows] for model in (draft, alone))
        torch.testing.assert_close(found, wanted)


def test_going_on_from_the_copys_hidden_states_is_noticed(monkeypatch):
    """What the two tests above look for: verification that trusts the copy's layers."""
    model = tiny_model()
    plain, _ = run(model, 80)
    monkeypatch.setattr(QuantizedDrafter, "verify_from", SelfDrafter.verify_from)
    assert run(model, 80, exit_layer=2, k=3, **INT4)[0] != plain


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_copy_is_the_rounded_layers_and_shares_all_else(precision):
    model = tiny_model(dtype=torch.bfloat16)
    names = model.state_dict().keys()
    drafter = make_drafter(model, exit_layer=3, draft_precision=precision)
    assert model.state_dict().keys() == names and drafter.head is not model.head  # a checkpoint keeps no copies
    model.setup_caches(40)  # after the copy was made
    matrices = 0
    for layer, twin in zip(model.layers, drafter.layers, strict=False):
        assert twin.attention_norm.weight is layer.attention_norm.weight
        assert twin.attention.k_cache is layer.attention.k_cache is not None
        for module, own in zip(layer.modules(), twin.modules(), strict=True):
            if isinstance(module, Linear):
                matrices += 1
                exact = module.weight.double()
                error = (F.linear(torch.eye(exact.shape[1]), widen(own)) - exact.T).norm() / exact.norm()
                assert 0 < error < (0.01 if own.zero is None else 0.15)
    assert matrices == 12 and len(drafter.layers) == 3
    assert make_drafter(model, exit_layer=2, k=2, draft_precision=precision).layers[1] is drafter.layers[1]


def test_the_first_drafter_of_a_process_has_an_int8_head(monkeypatch):
    monkeypatch.setattr(cpu, "ready", None)  # as long as nothing has used the kernels
    assert make_drafter(tiny_model(), exit_layer=1).head.weight.dtype == torch.int8


def widen(linear):
    """The weight (N, K) in float32 that a quantized Linear stands for, by the definition of panels in formats.py."""
    rows = []
    for n in range(linear.outputs):
        lanes, scale = (panels[n // 16, :, n % 16] for panels in (linear.weight, linear.scale))
        if linear.zero is None:
            rows.append(lanes.float() * scale)
            continue
        zero = linear.zero[n // 16, :, n % 16]
        q = torch.stack([(lanes >> 4 * i & 15 ^ 8) - 8 for i in range(8)], 1).view(len(scale), -1)
        rows.append((q * scale[:, None].float() + zero[:, None].float()).flatten())
    return torch.stack(rows)


def test_bytes_and_ideal_speedup():
    model = tiny_model()
    decoder = Decoder(model, exit_layer=4, k=3, **INT8)
    matrices = [w for layer in model.layers for w in layer.parameters() if w.dim() == 2] + [model.head.weight]
    copy = sum(w.numel() + 4 * len(w) for w in matrices)
    norms = 4 * 48 * 2 * 4
    step = copy + norms + 48 * 4
    assert decoder.drafter.bytes_per_round() == 3 * step
    assert decoder.drafter.extra_bytes() == copy + norms  # the norms are shared, but counted
    full = decoder.full_bytes()
    assert decoder.ideal_speedup({"self int8": [0, 0, 0, 5]}) == pytest.approx(4 * full / (full + 3 * step))
    both = Decoder(model, exit_layer=4, k=3, ngram_k=7, **INT8)
    rounds = {"n-gram": [1, 0, 0, 0, 0, 0, 0, 2], "self int8": [0, 0, 0, 5, 0, 0, 0, 0]}
    assert both.ideal_speedup(rounds) == pytest.approx(37 * full / (8 * full + 5 * 3 * step))


# n-grams.


def scan(text, longest, shortest, k):
    """What to draft by a search from the text's end, or None."""
    for n in range(longest, shortest - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                grown = list(text)
                for i in range(k):
                    grown.append(grown[start + n + i])
                return grown[len(text) :]
    return None


@pytest.mark.parametrize("longest", [1, 2, 3, 5])
@pytest.mark.parametrize("behind", [False, True])
def test_lookups_equal_a_search(longest, behind):
    model, g = tiny_model(), random.Random(longest)
    otherwise = SelfDrafter(model, 1, 2) if behind else Drafter(model)
    found = 0
    for letters in (2, 4, 9):
        drafter = NgramDrafter(otherwise, 6, longest)
        text = [g.randrange(letters) for _ in range(g.randrange(1, 9))]
        drafter.begin(text[:])
        for _ in range(60):
            expected = scan(text, longest, min(2, longest) if behind else 1, 6)
            drafter.pause = 0
            who = drafter.pick()
            assert who is (otherwise if expected is None else drafter)
            if expected is not None:
                found += 1
                assert drafter.found.tolist() == [expected]
            more = [g.randrange(letters) for _ in range(g.randrange(1, 5))]
            drafter.observe(more)
            text += more
    assert found > 30


def test_wrong_drafts_retire_and_come_back():
    otherwise = Drafter(tiny_model())
    drafter = NgramDrafter(otherwise, 4)
    drafter.begin([5, 6, 5])
    who = []
    for token in [7, 5] * 100:  # never what followed the last time... until the end
        who.append(drafter.pick() is drafter)
        drafter.observe([token if drafter.drafting else 5])
    assert who.count(True) < 20 and any(who[-2 * LONGEST_PAUSE :])
    drafter.pause = 0
    assert drafter.pick() is drafter
    drafter.observe([1, 2, 3])  # two drafts accepted
    assert drafter.misses == drafter.pause == 0


def test_a_text_is_forgotten_with_the_next():
    model = repeating_model()
    decoder = Decoder(model, **NGRAM)
    texts = [list(decoder.generate(prompt, 40)) for prompt in (PROMPT, PROMPT[::-1], PROMPT)]
    assert texts[0] == texts[2] == run(model, 40)[0] and texts[1] == run(model, 40, PROMPT[::-1])[0]
    text = PROMPT + texts[2]
    assert decoder.drafter.text[: len(text)] == text[: len(decoder.drafter.text)]


# Sampling.


def joint_counts(model, n, **how):
    """(how often each pair of tokens came second and third, their probabilities in float64), each (144,).

    model: tiny_model(vocab=12), with whatever drafts for it.
    """
    s, prompt = Sampling(1.2, top_k=8), [3, 4, 3]
    decoder = Decoder(model, sampling=s, seed=0, rows=12, **how)
    counts = torch.zeros(12, 12, dtype=torch.long)
    for _ in range(n):
        counts[tuple(list(decoder.generate(prompt, 3))[1:])] += 1
    reference = tiny_model(vocab=12).double()

    def row(ids):
        return reference_distribution(reference.logits(reference(torch.tensor([ids])))[0, -1], 1.2, 8, 1.0).double()

    joint = torch.zeros(12, 12, dtype=torch.float64)
    for a, pa in enumerate(row(prompt)):
        for b, pb in enumerate(row(prompt + [a])):
            joint[b] += pa * pb * row(prompt + [a, b])
    return counts.flatten(), joint.flatten()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4, first layer", "n-gram, then self"])
def test_sampled_tokens_have_the_targets_distribution(name):
    counts, joint = joint_counts(tiny_model(vocab=12), 2000, **DRAFTERS[name])
    assert chi_square(counts, joint) > 1e-3


@pytest.mark.slow
def test_a_draft_that_claims_to_be_less_certain_is_noticed(monkeypatch):
    def uniform(self, step, token, pos, u):
        drafted = torch.cat((token, self.found), dim=1)
        return drafted, [], [torch.full((self.k, self.vocab_size), 1 / self.vocab_size)]

    monkeypatch.setattr(NgramDrafter, "draft", uniform)
    counts, joint = joint_counts(tiny_model(vocab=12), 1500, **NGRAM)
    assert counts[joint == 0].sum() > 0 or chi_square(counts, joint) < 1e-6


def test_a_seed_reproduces():
    for settings in DRAFTERS.values():
        texts = [run(tiny_model(), 30, sampling=Sampling(1.0), seed=seed, **settings)[0] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


# Bad settings, and the command.


@pytest.mark.parametrize(
    "how,message",
    [
        (dict(exit_layer=5, **INT8), "--early_exit 5: the model has 4 layers, so 1 to 4 can be drafted with"),
        (dict(exit_layer=4), "--early_exit 4: the model has 4 layers, so 1 to 3 can be drafted with"),
        (dict(exit_layer=0, **INT4), "--early_exit 0"),
        (dict(exit_layer=2, k=16, **INT4), "--speculate_k 16: must be 1 to 15"),
        (dict(ngram_k=16), "--ngram_k 16: must be 1 to 15"),
        (dict(ngram_k=4, ngram_max=0), "--ngram_max 0: must be 1 or more"),
        (
            dict(exit_layer=1, draft_model=tiny_model(1)),
            "self-speculation and a separate draft model exclude each other",
        ),
    ],
)
def test_bad_settings_are_refused(how, message):
    with pytest.raises(InputError, match=message):
        make_drafter(tiny_model(), **how)


@pytest.mark.parametrize(
    "args,message",
    [
        (["--draft_precision", "int8"], "--draft_precision is for --self_speculative"),
        (["--ngram_k", "3"], "--ngram_k is for --draft ngram"),
        (["--draft", "ngram", "--speculate_k", "3"], "the length of n-gram drafts is --ngram_k"),
        (["--draft", "ngram", "--ngram_k", "0"], "--ngram_k 0: must be a whole number from 1 to 15"),
    ],
)
def test_options_without_their_drafter_are_refused(args, message):
    with pytest.raises(InputError, match=message):
        generate.main(["--max_new_tokens", "4", *args])


def test_the_command_reports_each_drafter(capsys):
    how = ["--temperature", "0", "--max_new_tokens", "60", "--num_samples", "1", "--prompt", "a = 1\nb = 2\na = 1\n"]
    generate.main(how)
    plain = capsys.readouterr().out.split("\nTime for inference")[0]
    generate.main([*how, "--self_speculative", "--draft_precision", "int8", "--draft", "ngram"])
    out = capsys.readouterr().out
    assert plain.splitlines()[-5:] == out.split("\nTime for inference")[0].splitlines()[-5:]
    for part in ("n-gram: ", "self int8: ", "drafts accepted on average", "Copy that drafts: "):
        assert part in out
