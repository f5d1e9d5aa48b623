"""Decoding: exact against transformers, against itself, and in distribution; and the command line around it."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import command
import generate
import kernels
import model as engine
from checkpoint import load_model
from command import InputError
from conftest import FAMILY, ROOT, call, write_tokenizer
from drafters import Drafter
from generate import Decoder, DraftDisplay, Sampling, Stats, accept, acceptance, draw
from model import ModelConfig, Transformer
from tokenizer import Text, Tokenizer

PROMPT = [1, 17, 60, 33, 25, 8]


def tiny_model(seed=0, context=96, n_layer=4, vocab=64, late=0.4, dtype=torch.float32):
    """A random model whose layers after the first change little, so that drafts are sometimes right."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=vocab,
        dim=48,
        n_layer=n_layer,
        n_head=4,
        n_kv_head=2,
        head_dim=12,
        intermediate_size=64,
        context=context,
        eos_ids=(2,),
    )
    model = Transformer(config).requires_grad_(False).eval()
    for i, layer in enumerate(model.layers):
        for name, w in layer.named_parameters():
            if w.dim() == 2:
                torch.nn.init.normal_(w, std=0.25)
                if i and name in ("attention.wo.weight", "ffn.w2.weight"):
                    w *= late
    model.to(dtype)
    model.inv_freq = engine.rope_frequencies(config)  # stays float32
    return model


def run(model, n=40, prompt=PROMPT, eos=(), **how):
    decoder = Decoder(model, **how)
    return list(decoder.generate(prompt, n, eos)), decoder.stats


@pytest.mark.parametrize("shape", FAMILY)
def test_greedy_text_equals_transformers(shape, hf_folder, checkpoint):
    _, theirs = hf_folder(shape)
    prompt = torch.tensor([PROMPT])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    model = load_model(checkpoint(shape))
    for how in ({}, dict(exit_layer=2, k=3), dict(exit_layer=1, k=15)):
        assert run(model, 50, eos=model.config.eos_ids, **how)[0] == expected


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_greedy_self_speculation_equals_plain(exit_layer, k):
    model = tiny_model()
    plain, _ = run(model, 80)
    for head in ("int8", "full"):
        ours, stats = run(model, 80, exit_layer=exit_layer, k=k, draft_head=head)
        assert ours == plain and len(set(plain)) > 5
        assert 0 < acceptance(stats.accept_counts)[1] < k  # the drafts were sometimes right, sometimes wrong


@pytest.mark.parametrize("k", [1, 3, 6])
def test_greedy_with_a_draft_model_equals_plain(k):
    model = tiny_model()
    draft = tiny_model(n_layer=2)
    for name in ("embed", "norm", "head"):
        getattr(draft, name).weight.copy_(getattr(model, name).weight)
    draft.layers[0].load_state_dict(model.layers[0].state_dict())
    ours, stats = run(model, 80, draft_model=draft, k=k)
    assert ours == run(model, 80)[0]
    assert 0 < acceptance(stats.accept_counts)[1] < k


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=10), Sampling(1.3, top_p=0.8)])
@pytest.mark.parametrize("k", [1, 4])
def test_a_draft_equal_to_its_target_accepts_everything(sampling, k):
    """A hole in the draft's cache after a fully accepted round would show here and nowhere else."""
    _, stats = run(tiny_model(), 80, draft_model=tiny_model(), k=k, draft_head="full", sampling=sampling, seed=1)
    assert stats.accept_counts[:-1] == [0] * k and stats.accept_counts[-1] >= 79 // (k + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_equals_eager():
    model = tiny_model(n_layer=3)
    long, _ = run(model, 90)
    eos = next(t for i, t in enumerate(long) if i > 20 and t not in long[:i])
    for how, prefill in (  # the prompt's pass takes longest to compile: once chosen greedily, once drawn
        (dict(), False),
        (dict(exit_layer=1, k=5), False),
        (dict(exit_layer=2, k=2), False),
        (dict(draft_model=tiny_model(n_layer=1), k=2), True),
        (dict(exit_layer=1, k=2, sampling=Sampling(0.9, 20, 0.9), seed=3), True),
    ):
        torch._dynamo.reset()
        eager, stats = run(model, 30, **how)
        decoder = Decoder(model, compile=True, compile_prefill=prefill, **how)
        assert list(decoder.generate(PROMPT, 30)) == eager and decoder.stats.accept_counts == stats.accept_counts
        if "sampling" not in how:  # EOS within a draft, the context's end, and a limit within a round
            assert list(decoder.generate(PROMPT, 90, (eos,))) == long[: long.index(eos) + 1]
            assert list(decoder.generate(PROMPT, 999)) == run(model, 999)[0]
            assert list(decoder.generate(PROMPT, 17)) == long[:17]


def resized(model, vocab):
    """The same model with another number of tokens: the first ones are the same, those beyond are never likely."""
    other = tiny_model(vocab=vocab, n_layer=model.config.n_layer)
    common = min(vocab, model.config.vocab_size)
    for name, w in model.state_dict().items():
        own = other.state_dict()[name]
        own[: len(w)].copy_(w[: len(own)])
        if name in ("embed.weight", "head.weight"):
            own[common:] = 0
    return other


@pytest.mark.parametrize("vocab", [56, 80])
def test_a_draft_model_may_have_more_or_fewer_tokens(vocab):
    """As of two models that share a tokenizer and are padded differently."""
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[56:] = 0  # never likely
    prompt = [1, 17, 30, 33, 25, 8]
    plain, _ = run(model, 60, prompt)
    assert max(plain) < 56
    ours, stats = run(model, 60, prompt, draft_model=resized(model, vocab), k=3, draft_head="full")
    assert ours == plain
    assert stats.accept_counts[:-1] == [0, 0, 0]  # the draft is the same model: all is accepted


def test_ids_that_the_draft_lacks_are_no_obstacle():
    """The target writes them, the prompt has them, and the draft is fed something else."""
    model = tiny_model()
    plain, _ = run(model, 60, PROMPT + [63])
    draft = resized(model, max(plain) - 3)
    assert max(plain) >= draft.config.vocab_size
    for k in (1, 4):
        assert run(model, 60, PROMPT + [63], draft_model=draft, k=k)[0] == plain


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=3), dict(draft_model=tiny_model(1), k=3)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20)])
def test_logits_that_are_not_finite_end_the_generation(how, sampling):
    """Once the text has a token whose embedding is infinite; the rounds before are yielded."""
    model = tiny_model()
    whole, _ = run(model, 40, sampling=sampling, seed=5)
    broken = next(token for i, token in enumerate(whole) if i > 12 and token not in whole[:i])
    model.embed.weight[broken] = torch.inf
    yielded = []
    with pytest.raises(InputError, match="--precision float32: the model's logits are not finite numbers"):
        for token in Decoder(model, sampling=sampling, seed=5, **how).generate(PROMPT, 40):
            yielded.append(token)
    with pytest.raises(InputError, match="not finite"):
        run(model, 5, [broken], **how)
    if not sampling.temperature:  # of a sampled text each decoder draws another
        assert yielded == whole[: len(yielded)] and len(yielded) <= whole.index(broken) + 1


def test_drafts_that_make_logits_infinite_are_only_rejected():
    """What a text never has can't end it: the token is drafted, and no more."""
    model = tiny_model()
    plain, _ = run(model, 80)
    drafted = []
    decoder = Decoder(model, exit_layer=1, k=1)
    assert list(decoder.generate(PROMPT, 80, on_draft=drafted.extend)) == plain
    wrong = next(token for token in drafted if token not in plain + PROMPT)
    model.embed.weight[wrong] = torch.inf
    assert run(model, 80, exit_layer=1, k=1)[0] == plain


@pytest.mark.parametrize("n", range(1, 12))
def test_max_new_tokens_may_cut_a_round(n):
    model = tiny_model()
    ours, stats = run(model, n, exit_layer=2, k=4)
    assert ours == run(model, 40)[0][:n] and len(ours) == n
    assert sum((i + 1) * c for i, c in enumerate(stats.accept_counts)) >= n - 1  # counts are of whole rounds


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=5), dict(draft_model=tiny_model(), k=5)])
def test_stops_after_eos_wherever_it_falls_in_a_round(how):
    model = tiny_model()
    plain, _ = run(model, 60)
    unused = next(t for t in range(64) if t not in plain)
    for end in sorted({plain.index(t) for t in plain}):
        assert run(model, 60, eos=(unused, plain[end]), **how)[0] == plain[: end + 1]


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=5), dict(draft_model=tiny_model(1), k=5)])
def test_the_context_is_used_to_its_end_and_no_further(how):
    model = tiny_model(context=32)
    long, _ = run(tiny_model(context=96), 60)
    ours, _ = run(model, 60, **how)
    assert ours == long[: 32 - len(PROMPT) + 1]
    whole = (PROMPT * 6)[:32]
    assert len(run(model, 60, whole, **how)[0]) == 1
    with pytest.raises(InputError, match="33 tokens, but there is room for 32"):
        run(model, 60, whole + [1], **how)
    with pytest.raises(InputError, match="empty"):
        run(model, 60, [], **how)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_work_per_round(monkeypatch, sampling):
    """E layers K+1 times, the rest once over K+1 rows, the head K times on one row and once on K+1; prefill once."""
    model, E, K = tiny_model(), 2, 3
    calls = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: calls.append((i, out.shape[1])))  # of the prompt's pass
    ops = torch.ops.layerskip
    run_layers, draft = ops.layers, ops.draft

    def count_layers(natives, rows):
        for i, layer in enumerate(model.layers):
            if any(layer.native is native for native in natives):
                calls.append((i, rows))

    def counting_layers(x, pos, inv_freq, embedding, natives, *rest):
        count_layers(natives, x.shape[1])
        return run_layers(x, pos, inv_freq, embedding, natives, *rest)

    def counting_draft(token, pos, k, inv_freq, embedding, natives, *rest):
        for _ in range(k):
            count_layers(natives, 1)
            calls.append(("head", 1))
        return draft(token, pos, k, inv_freq, embedding, natives, *rest)

    monkeypatch.setattr(ops, "layers", counting_layers)
    monkeypatch.setattr(ops, "draft", counting_draft)
    model.head.register_forward_hook(lambda m, args, out: calls.append(("head", out.numel() // 64)))
    _, stats = run(model, 30, exit_layer=E, k=K, draft_head="full", sampling=sampling)
    rounds = sum(stats.accept_counts)

    def count(*key):
        return calls.count(key)

    for i in range(4):
        assert count(i, len(PROMPT)) == 1
        assert (count(i, 1), count(i, K + 1)) == ((rounds * (K + 1), 0) if i < E else (0, rounds))
    assert count("head", 1) == rounds * K + 1 and count("head", K + 1) == rounds
    assert len(calls) == 4 + 1 + rounds * (E * (K + 1) + (4 - E) + K + 1)


class NoQuestions(TorchDispatchMode):
    """Fails when an operation would make the host wait for a value on the device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masks = op.overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        assert not masks and op.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        ), op
        return op(*args, **(kwargs or {}))


@pytest.fixture
def no_questions(monkeypatch):
    """A context in which no value may be read back: by an operation, or by the methods that are none."""

    def refuse(*args, **kwargs):
        raise AssertionError("a value was read back")

    for method in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    return lambda: NoQuestions()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 10, 0.9)])
@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=3), dict(draft_model=tiny_model(1), k=3)])
def test_a_round_never_asks_the_device(how, sampling, no_questions):
    decoder = Decoder(tiny_model(), sampling=sampling, **how)
    decoder.model(torch.tensor([PROMPT]))
    decoder.pos.fill_(len(PROMPT))
    with torch.no_grad(), no_questions():
        decoder.round(decoder.drafter)
        x = torch.ones(3)
        for question in (x[0].item, x.tolist, lambda: bool(x[0] > 0), lambda: x[x > 0], x.nonzero, x.cpu):
            with pytest.raises(AssertionError):
                question()


def counted(decoder, rounds, drafter, on_draft=None):
    rounds.append(1)
    return Decoder.round(decoder, drafter, on_draft)


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(exit_layer=2, k=4),
        dict(draft_model=tiny_model(1), k=2),
        dict(exit_layer=1, k=3, sampling=Sampling(0.9), seed=5),
    ],
)
def test_reading_a_round_late_changes_nothing(how):
    """As on a GPU: the next round runs before this one is read, and what a text's end leaves over is discarded."""
    model = tiny_model(context=48)
    plain, stats = run(model, 99, **how)
    for limit in (*range(1, 12), 99):
        decoder = Decoder(model, **how)
        decoder.late, rounds = 1, []
        decoder.round = partial(counted, decoder, rounds)
        assert list(decoder.generate(PROMPT, limit)) == plain[:limit]
        assert sum(decoder.stats.accept_counts) <= len(rounds) <= sum(decoder.stats.accept_counts) + 1
    assert decoder.stats.accept_counts == stats.accept_counts
    decoder.random.manual_seed(how.get("seed", 0))
    assert list(decoder.generate(PROMPT, 99, (plain[20],))) == plain[: plain.index(plain[20]) + 1]  # EOS within it


def test_a_round_is_recorded_once_and_again_when_the_caches_move(monkeypatch):
    """The bookkeeping around the CUDA graph, with a stand-in that runs the round anew at each replay."""
    recorded, model = [], tiny_model(context=48)

    class Graph:
        def replay(self):
            self.out.copy_(Decoder.round(decoder, decoder.drafter))

        def register_generator_state(self, generator):
            assert generator is decoder.random

    @contextmanager
    def capture(graph):
        recorded.append(graph)
        state = decoder.random.get_state()
        yield
        decoder.random.set_state(state)  # capturing draws nothing

    stream = type("Stream", (), {"__init__": lambda *a: None, "wait_stream": lambda *a: None})
    for name, value in dict(
        CUDAGraph=Graph, graph=capture, Stream=stream, current_stream=lambda d: stream(), stream=lambda s: nullcontext()
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for how in (dict(exit_layer=1, k=3), dict(sampling=Sampling(0.9), exit_layer=2, k=2)):
        decoder, recorded[:] = Decoder(model, seed=3, **how), []
        expected = run(model, 30, seed=3, **how)[0]
        decoder.graphed = True

        def record(drafter, decoder=decoder):
            Decoder.record(decoder, drafter)
            graph, graph.out, _ = decoder.graphs[drafter]

        decoder.record = record
        model.cached_ids = PROMPT[:3]
        decoder.record(decoder.drafter)
        assert not model.cached_ids and len(recorded) == 1  # what was recorded wrote over these rows
        assert list(decoder.generate(PROMPT, 30)) == expected and len(recorded) == 1
        list(decoder.generate(PROMPT, 10))
        assert len(recorded) == 1
        model.setup_caches(
            model.layers[0].attention.k_cache.shape[2] + 1
        )  # the graph would read and write the old ones
        decoder.random.manual_seed(3)
        assert list(decoder.generate(PROMPT, 30)) == expected and len(recorded) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain_pytorch")
def test_nothing_recompiles_over_two_hundred_rounds(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # all that decides to recompile
    torch._dynamo.reset()
    decoder = Decoder(tiny_model(context=1200, n_layer=2), exit_layer=1, k=2, compile=True, sampling=Sampling(1.0))
    list(decoder.generate(PROMPT, 20))
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in (PROMPT, PROMPT[:3]):
            list(decoder.generate(prompt, 600))
    assert sum(decoder.stats.accept_counts) >= 200


@pytest.mark.parametrize(
    "files,cores",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
    ],
)
def test_a_containers_quota(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert command.quota(tmp_path) == cores


@pytest.mark.usefixtures("two_threads")
def test_threads_are_no_more_than_the_quota_and_what_the_option_says(monkeypatch):
    assert command.usable_threads() == 2
    for allowed, threads in ((0.5, 1), (1.9, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(command, "quota", lambda allowed=allowed: allowed)
        assert command.usable_threads() == threads
    generate.parse_args(["--threads", "1"])
    assert torch.get_num_threads() == 1
    for wrong in ("0", "-1", "1025"):
        with pytest.raises(InputError, match=f"--threads {wrong}: must be a whole number from 1 to 1024"):
            generate.parse_args(["--threads", wrong])


# Distributions.


def chi_square(counts, probs):
    """Pearson's statistic of observed counts (V,) against probabilities (V,), its degrees of freedom, and its
    p-value.
    """
    expected = probs.double() * counts.sum()
    assert counts[expected == 0].sum() == 0, "drew a token of probability zero"
    small = expected < 5  # pooled, as the approximation needs
    o = torch.cat((counts[~small].double(), counts[small].sum()[None].double()))
    e = torch.cat((expected[~small], expected[small].sum()[None]))
    o, e = o[e > 0], e[e > 0]
    statistic, dof = ((o - e) ** 2 / e).sum(), len(e) - 1
    return torch.special.gammaincc(torch.tensor(dof / 2).double(), statistic / 2).item()


def reference_distribution(logits, temperature, top_k, top_p):
    """The sampling distribution by the definition, token by token, in float64."""
    scaled = [x / temperature for x in logits.double().tolist()]
    keep = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: top_k or len(scaled)]
    total = sum(torch.tensor(scaled[i]).exp().item() for i in keep)
    probs, mass, out = {i: torch.tensor(scaled[i]).exp().item() / total for i in keep}, 0.0, torch.zeros(len(scaled))
    for i in keep:
        if mass < top_p:
            out[i] = probs[i]
        mass += probs[i]
    return out / out.sum()


SAMPLINGS = [Sampling(1.0), Sampling(0.6, top_k=5), Sampling(1.5, top_p=0.7), Sampling(0.8, top_k=9, top_p=0.85)]


@pytest.mark.parametrize("s", SAMPLINGS)
def test_distribution_by_definition(s):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(s.distribution(logits), reference_distribution(logits, s.temperature, s.top_k, s.top_p))
    assert s.distribution(logits.bfloat16()).dtype == torch.float32


def test_top_k_keeps_no_more_than_k_of_equal_tokens():
    probs = Sampling(1.0, top_k=2).distribution(torch.tensor([0.0, 3.0, 3.0, 3.0, -1.0]))
    assert probs.count_nonzero() == 2 and probs.max() == 0.5


def test_draw_never_leaves_the_support():
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    edge = torch.tensor([0.0, 0.29999, 0.3001, 1 - 2**-53], dtype=torch.float64)
    assert [draw(weights, u).item() for u in edge] == [1, 1, 3, 3]


def speculate(rule, s, n, seed=0):
    """n draws of the first two tokens that a round with K=2 emits, drafting from p and verifying with q, both fixed."""
    g = torch.Generator().manual_seed(seed)
    p_logits, q_logits = torch.randn(2, 12, generator=g) * 1.5, torch.randn(3, 12, generator=g) * 1.5
    p = s.distribution(p_logits)
    first, second = torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.long)
    for _ in range(n):
        u = torch.rand(5, dtype=torch.float64, generator=g)
        tokens, accepted = rule(draw(p, u[:2]), p, q_logits, u[2:], s)
        first[tokens[0]] += 1
        if accepted.item() >= 1:
            second[tokens[1]] += 1
    return first, second, s.distribution(q_logits)


@pytest.mark.parametrize("s", SAMPLINGS)
def test_acceptance_keeps_the_target_distribution(s):
    first, second, q = speculate(accept, s, 6000)
    assert chi_square(first, q[0]) > 1e-3 and chi_square(second, q[1]) > 1e-3


@pytest.mark.parametrize("broken", ["accepts everything", "residual from q", "other distribution"])
def test_the_distribution_test_notices_a_broken_rule(broken):
    def rule(drafted, p, logits, u, s):
        if broken == "accepts everything":
            return drafted, torch.tensor([2])
        if broken == "residual from q":
            tokens, n = accept(drafted, p, logits, u, s)
            tokens[n] = draw(s.distribution(logits)[n], u[2:])
            return tokens, n
        return accept(drafted, Sampling(1.0).distribution(p.log()), logits, u, Sampling(2.0))

    first, _, q = speculate(rule, Sampling(0.8, top_k=9), 6000)
    assert (first[q[0] == 0].sum() > 0) or chi_square(first, q[0]) < 1e-6


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(exit_layer=1, k=2),
        dict(draft_model=tiny_model(7, n_layer=1, vocab=12), k=2),
        dict(draft_model=tiny_model(7, n_layer=1, vocab=9), k=2),
    ],
)
@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution(how):
    """End to end: the second and third token of many short generations, against the model's own probabilities in
    float64.
    """
    model, s = tiny_model(vocab=12, n_layer=2), Sampling(1.2, top_k=8)
    prompt, n = [3, 4, 5], 4000
    decoder = Decoder(model, sampling=s, seed=0, rows=8, **how)
    counts = torch.zeros(12, 12, 12, dtype=torch.long)
    for _ in range(n):
        counts[tuple(decoder.generate(prompt, 3))] += 1
    joint = torch.zeros(12, 12, 12, dtype=torch.float64)
    reference = tiny_model(vocab=12, n_layer=2).double()

    def row(ids):
        return reference_distribution(reference.logits(reference(torch.tensor([ids])))[0, -1], 1.2, 8, 1.0).double()

    for a, pa in enumerate(row(prompt)):
        for b, pb in enumerate(row(prompt + [a])):
            joint[a, b] = pa * pb * row(prompt + [a, b])
    assert chi_square(counts.flatten(), joint.flatten()) > 1e-3


class Parrot(Drafter):
    """Drafts a fixed text, whatever came before: a drafter that is none of the engine's."""

    def __init__(self, target, text, k):
        super().__init__(target, k)
        self.text = torch.tensor([text])

    def draft(self, step, token, pos, u):
        drafted = self.text.gather(1, (pos + torch.arange(self.k))[None] % self.text.shape[1])
        probs = F.one_hot(drafted[0], self.vocab_size).float().split(1)
        return torch.cat((token, drafted), dim=1), [], list(probs)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.slow
def test_the_loop_takes_any_drafter(compile):
    model = tiny_model()
    plain, _ = run(model, 40)
    text = (PROMPT + plain)[1:-9] + [5] * 9  # right but for its end
    ours, stats = run(model, 40, drafter=Parrot(model, text, 3), compile=compile)
    assert ours == plain and stats.accept_counts[3] >= 7 and sum(stats.accept_counts[:3]) > 0
    model, s = tiny_model(vocab=12), Sampling(1.2, top_k=8)
    decoder = Decoder(model, drafter=Parrot(model, [3, 5, 7], 2), sampling=s, seed=0, rows=8)
    counts = torch.zeros(12, dtype=torch.long)
    for _ in range(500):
        counts[list(decoder.generate([3, 4, 5], 2))[1]] += 1
    reference = tiny_model(vocab=12).double()

    def row(ids):
        return reference_distribution(reference.logits(reference(torch.tensor([ids])))[0, -1], 1.2, 8, 1.0).double()

    first = row([3, 4, 5])
    assert chi_square(counts, sum(first[a] * row([3, 4, 5, a]) for a in range(12))) > 1e-3


@pytest.mark.parametrize(
    "how",
    [dict(), dict(exit_layer=1, k=2), dict(draft_model=tiny_model(1), k=2), dict(exit_layer=1, k=2, compile=True)],
)
@pytest.mark.slow
def test_a_decoder_is_freed_with_its_last_reference(how, monkeypatch):
    """Or else two models would be in memory at once where one follows the other."""
    if how.get("compile"):
        monkeypatch.setattr(kernels, "enabled", False)  # with the CPU's kernels there is nothing to compile
    decoder = Decoder(tiny_model(n_layer=2), **how)
    list(decoder.generate(PROMPT, 10))
    gone = [weakref.ref(decoder), weakref.ref(decoder.model)]
    gc.disable()
    try:
        if how.get("compile"):
            torch._dynamo.reset()  # compiled code is kept for the next decoder of the same shape
        del decoder
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_a_seed_reproduces():
    model, s = tiny_model(), Sampling(1.0)
    texts = [run(model, 30, exit_layer=2, k=3, sampling=s, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    decoder = Decoder(model, sampling=s, seed=1)
    assert list(decoder.generate(PROMPT[:1], 30)) != list(decoder.generate(PROMPT[:1], 30))  # one sample isn't the next


def test_statistics():
    model = tiny_model()
    layer = sum(w.numel() for w in model.layers[0].parameters()) * 4
    full = 4 * layer + 64 * 48 * 4 + 48 * 4
    for name, head in (("full", 64 * 48 * 4 + 48 * 4), ("int8", 64 * 48 + 64 * 4 + 48 * 4)):
        decoder = Decoder(model, exit_layer=1, k=3, draft_head=name)
        rounds = {"self": [1, 0, 1, 2]}  # 4 rounds that emit 12 tokens
        assert decoder.bytes_read(rounds) == 4 * (3 * (layer + head) + full)
        assert decoder.ideal_speedup(rounds) == pytest.approx(3 / (3 * (layer + head) / full + 1))
    assert Decoder(model).ideal_speedup({"plain": [7]}) == 1
    assert acceptance([1, 0, 3]) == ([0.25, 0, 0.75], 1.5) and acceptance([0]) == ([], 0.0)
    assert (
        Stats(3, {"plain": [9]}, 1.0, 2.0, list(range(9))).tokens_per_second == 4
        and Stats(3, {"plain": [0]}, tokens=[1]).tokens_per_second == 0
    )


# Text and the command line.


class Letters:
    """A tokenizer of bytes, for tests."""

    def is_shown(self, token):
        return True

    def is_byte(self, token):
        return False

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_text_streams_whole_characters_and_stops_before_a_stop_string():
    text = Text(Letters(), list(b"END"), stop=["END", "X"])
    assert [text.push(b) for b in "aé".encode()] == ["a", "", "é"]
    assert [text.push(b) for b in b"bENc"] == ["b", "", "", "ENc"] and not text.stopped
    assert [text.push(b) for b in b"dEND"] == ["d", "", "", ""] and text.stopped and text.flush() == ""
    text = Text(Letters(), [], stop=["END"])
    assert [text.push(b) for b in b"xE\xe2\x82"] == ["x", "", "", ""] and text.flush() == "E\ufffd"
    text = Text(Letters(), [], stop=["END"])
    assert [text.push(b) for b in b"xEN"] == ["x", "", ""] and text.flush() == "EN"


def test_drafts_are_dimmed_and_overwritten(capsys, monkeypatch):
    monkeypatch.setattr(generate.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((10, 24)))
    display = DraftDisplay(Letters(), colour=True)
    display.text("abcdef")
    display.draft(b"g\nhijk")  # cut at the line's end, so that it can be taken back
    display.text("gh\nxy")
    display.draft(b"z")
    display.text("")
    assert capsys.readouterr().out == "abcdef\033[2mg⏎h\033[0m\033[3D\033[Kgh\nxy\033[2mz\033[0m\033[1D\033[K"
    assert display.column == 2


# What --json has, of a run and of each of its samples.
REPORT = {
    "samples",
    "tokens_per_second",
    "acceptance_probs",
    "mean_accepted",
    "memory_gb",
    "bandwidth_gb_per_s",
    "rounds",
    "draft_copy_bytes",
    "ideal_speedup",
    "compile_seconds",
    "settings",
}
SAMPLE = {
    "prompt_tokens",
    "tokens",
    "text",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "rounds",
    "accept_counts",
}


@pytest.mark.slow
def test_command_line_reports_what_it_did(checkpoint, tmp_path):
    result = call(
        generate.main,
        "--checkpoint_path",
        checkpoint("llama2"),
        "--prompt",
        "def f1(x):",
        "--num_samples",
        2,
        "--max_new_tokens",
        20,
        "--top_k",
        100,
        "--temperature",
        0.6,
        "--self_speculative",
        "--early_exit",
        2,
        "--speculate_k",
        3,
        "--json",
        "-",
        "--profile",
        tmp_path / "trace.json",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report) == REPORT and set(report["samples"][0]) == SAMPLE
    assert (
        len(report["samples"]) == 2
        and sum(report["acceptance_probs"]) == pytest.approx(1)
        and report["settings"]["exit_layer"] == 2
    )
    for line in (
        "tokens_per_sec",
        "Acceptance probs",
        "Mean Accepted",
        "Average tokens/sec",
        "Memory used",
        "Bandwidth",
    ):
        assert line in result.stdout
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_command_line_greedy_equals_the_api(checkpoint, tmp_path):
    path = checkpoint("llama3")
    model, tokenizer = load_model(path), Tokenizer.load(path.parent)
    expected, _ = run(model, 25, tokenizer.encode("return x"), model.config.eos_ids)
    out = tmp_path / "report.json"
    common = (
        "--checkpoint_path",
        path,
        "--prompt",
        "return x",
        "--num_samples",
        1,
        "--max_new_tokens",
        25,
        "--temperature",
        0,
        "--json",
        out,
    )
    for how in (
        (),
        ("--generation_strategy", "self_speculative", "--exit_layer", 3, "--num_speculations", 2),
        ("--draft_checkpoint_path", checkpoint("llama3")),
    ):
        result = call(generate.main, *common, *how)
        assert result.returncode == 0, result.stderr
        assert json.loads(out.read_text())["samples"][0]["tokens"] == expected


def test_says_when_the_context_is_shorter_than_asked_for(checkpoint):
    common = ("--checkpoint_path", checkpoint("llama2"), "--prompt", "def f1", "--num_samples", 1)
    assert (
        "note: the context of 128 positions leaves room for"
        in call(generate.main, *common, "--max_new_tokens", 200).stdout
    )
    assert "note:" not in call(generate.main, *common, "--max_new_tokens", 20).stdout


def test_stop_strings_end_a_sample(checkpoint):
    common = (
        "--checkpoint_path",
        checkpoint("llama2"),
        "--num_samples",
        1,
        "--max_new_tokens",
        30,
        "--temperature",
        0,
        "--precision",
        "float16",
        "--json",
        "-",
    )
    whole = json.loads(call(generate.main, *common).stdout.splitlines()[-1])["samples"][0]
    stop = whole["text"][8:11]
    result = call(generate.main, *common, "--stop", stop, "--self_speculative")
    sample = json.loads(result.stdout.splitlines()[-1])["samples"][0]
    assert (
        sample["text"] == whole["text"][: whole["text"].index(stop)]
        and sample["tokens"] == whole["tokens"][: len(sample["tokens"])]
    )


@pytest.mark.slow
def test_interactive_goes_on_after_a_bad_prompt(checkpoint):
    result = call(
        generate.main,
        "--checkpoint_path",
        checkpoint("llama2"),
        "--interactive",
        "--self_speculative",
        "--max_new_tokens",
        "8",
        input="def f1\n" + "x" * 2000 + "\nreturn\n",
    )
    assert result.returncode == 0 and result.stdout.count("tokens/sec") + result.stdout.count("no decoding step") == 2
    assert "there is room for 128" in result.stdout


BAD = {
    "no checkpoint": (["--checkpoint_path", "nowhere/model.pth"], "nowhere/model.pth: not found"),
    "exit layer 0": (
        ["--self_speculative", "--early_exit", "0"],
        "--early_exit/--exit_layer 0: must be a whole number from 1",
    ),
    "exit layer 4": (["--self_speculative", "--early_exit", "4"], "--early_exit 4: the model has 4 layers"),
    "exit layer alone": (["--early_exit", "2"], "--early_exit is for --self_speculative"),
    "k 0": (["--self_speculative", "--early_exit", "2", "--speculate_k", "0"], "--speculate_k/--num_speculations 0"),
    "temperature": (["--temperature", "-1"], "--temperature -1"),
    "temperature that nothing can be divided by": (["--temperature", "1e-40"], "--temperature 1e-40: must be 0"),
    "top_p": (["--top_p", "1.5"], "--top_p 1.5"),
    "empty json": (["--json", ""], "--json is empty"),
    "top_k": (["--top_k", "0"], "--top_k 0"),
    "samples": (["--num_samples", "0"], "--num_samples 0"),
    "long prompt": (["--prompt", "x " * 500], "there is room for 128"),
    "device": (["--device", "cuda:9"], "--device cuda:9"),
    "two drafters": (["--self_speculative", "--draft_checkpoint_path", "SELF"], "exclude each other"),
    "two checkpoints": (["--model", "a/b"], "both name a checkpoint"),
    "unwritable json": (["--json", "/nowhere/report.json"], "--json /nowhere/report.json"),
    "profile is a folder": (["--profile", "/tmp"], "--profile /tmp"),
    "empty stop": (["--stop", ""], "--stop"),
    "k 16": (
        ["--self_speculative", "--early_exit", "2", "--speculate_k", "16"],
        "--num_speculations 16: must be a whole number from 1 to 15",
    ),
    "not Unicode": (["--prompt", "\udcff"], "not valid UTF-8"),
    "contradiction": (["--self_speculative", "--generation_strategy", "autoregressive"], "contradict"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, checkpoint, monkeypatch, capsys):
    args, words = BAD[case]
    args = [
        str(checkpoint("llama2")) if a == "SELF" else str(checkpoint("llama3")) if a == "OTHER" else a for a in args
    ]
    if "--checkpoint_path" not in args:
        args = ["--checkpoint_path", str(checkpoint("llama2")), *args]
    with pytest.raises(SystemExit) as exit:
        generate.run_command(lambda: generate.main(args))
    message = str(exit.value.code)
    assert message.startswith("error: ") and words in message and "\n" not in message


def test_a_draft_model_must_read_the_prompt_as_the_target_does(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama2").parent, tmp_path / "draft")
    write_tokenizer(tmp_path / "draft", vocab_size=288)
    with pytest.raises(InputError, match="a draft model must share it"):
        generate.main(
            [
                "--checkpoint_path",
                str(checkpoint("llama2")),
                "--draft_checkpoint_path",
                str(tmp_path / "draft" / "model.pth"),
                "--prompt",
                "def f1(x): return value",
            ]
        )


def test_without_kernels_drafts_are_chosen_with_the_head_itself(checkpoint, monkeypatch):
    model = load_model(checkpoint("llama2"))
    assert Decoder(model, exit_layer=1, k=2, rows=40).drafter.head is not model.head
    monkeypatch.setattr(kernels, "enabled", False)
    assert Decoder(model, exit_layer=1, k=2, rows=40).drafter.head is model.head


@pytest.mark.slow
def test_the_process_itself_exits_with_one_line():
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint_path", "nowhere/model.pth"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
