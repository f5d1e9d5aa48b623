"""Generate text from a LayerSkip checkpoint, plainly or with self-speculative decoding, and say how fast and why.

The engine is `Decoder`: `for token in Decoder(model).generate(ids, 100): ...` yields tokens as they are accepted.
The command line below it is a thin user.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from early import begin

    begin()

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import tune
from adapters import load_adapters
from checkpoint import count_parameters, described_by, load_model
from command import InputError, Parser, add_threads, check_device
from drafters import SMALLER, Drafter, make_drafter, weight_bytes
from files import check_writable, read_bytes, replacing, write_json
from kernels.compiler import compiled
from model import SIZES, Transformer
from ranks import Shard, run_command, start
from tokenizer import Text, Tokenizer
from tp import broadcast
from values import filled, filled_path, or_auto, real, whole

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
DEFAULT_PROMPT = "class Stack:\n    def __init__(self):\n"
SPECULATE_K = 4  # tokens that a model drafts in a round, where nothing else is said
NGRAM_K = 7  # the same for n-grams: with it a round has 8 rows, which the CPU's kernels take at once
DRAFT_LENGTH = whole(1, kernels.MAX_ROWS - 1)  # what either may be
MOST_SEED = 2**63 - 1
INTERACTIVE_ROWS = 8192  # cache rows for a conversation; many models' contexts are far longer


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is argmax; top_k None and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not (
            self.temperature == 0 or 1e-4 <= self.temperature < torch.inf
        ):  # below, float32 can't hold what logits become
            raise InputError(f"--temperature {self.temperature}: must be 0 (argmax), or 0.0001 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top_k {self.top_k}: must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: must be above 0 and at most 1")

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities (..., V), float32, that tokens are drawn from, given logits (..., V) of any dtype.
        temperature > 0.
        """
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kept = logits.topk(min(self.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -torch.inf).scatter(
                -1, kept.indices, kept.values
            )  # no more than k, where some are equal
        probs = logits.softmax(-1)
        if self.top_p < 1:
            ranked, order = probs.sort(descending=True, dim=-1)
            excess = ranked.cumsum(-1) - ranked >= self.top_p  # what ranks higher already has the mass
            probs = probs.masked_fill(excess.scatter(-1, order, excess), 0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


GREEDY = Sampling()

Rounds = dict[str, list[int]]  # {drafter's name: accept counts}: how many rounds accepted exactly 0, 1, 2, ... drafts


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an index (...,) from unnormalized weights (..., V) with uniform numbers u (...,) in [0, 1), by inverse CDF.

    In float64, so that the smallest probability that float32 holds is still drawn as often as it should be.
    """
    cdf = weights.double().cumsum(-1)
    return (cdf <= u[..., None] * cdf[..., -1:]).sum(-1).clamp(max=weights.shape[-1] - 1)


def accept(drafted: Tensor, draft_probs: Tensor, logits: Tensor, u: Any, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The exact acceptance rule of speculative sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318).

    drafted: (K,) ids, each drawn from its row of draft_probs (K, V), the p below. logits: (K+1, V) of the target,
    whose distribution is q. u: (K+1,) uniform numbers. Token x is accepted with probability min(1, q(x) / p(x)); at
    the first rejection one is drawn from norm(max(q - p, 0)), and after K acceptances from q, so that what comes out
    is distributed as q. At temperature 0 both distributions are a point and the rule is equality with the argmax.

    Returns (tokens (K+1,), n (1,)): tokens[:n + 1] are n accepted tokens and the one that follows; the rest is garbage.
    """
    K = len(drafted)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, (drafted == tokens[:K]).cumprod(0).sum(0, keepdim=True)
    q = sampling.distribution(logits)
    p = torch.cat((draft_probs, q.new_zeros(1, q.shape[-1])))  # nothing to subtract after the last
    chosen = drafted[:, None]
    accepted = u[:K] < (q[:K].gather(1, chosen) / p[:K].gather(1, chosen)).squeeze(1)
    n = accepted.cumprod(0).sum(0, keepdim=True)
    q_n, p_n = q.index_select(0, n), p.index_select(0, n)
    residual = (q_n - p_n).clamp(min=0)
    residual = torch.where(residual.sum() > 0, residual, q_n)  # p and q equal but for rounding
    last = draw(residual, u[K:])
    return torch.where(torch.arange(K + 1, device=n.device) == n, last, torch.cat((drafted, last))), n


def all_finite(logits: Tensor) -> Tensor:
    """Whether each row of logits (..., V) has finite numbers only: (...,) bool."""
    return logits.sum(-1, dtype=torch.float32).isfinite()


@dataclass
class Stats:
    """What one generation did.

    Times in seconds by the clock; decode_seconds, from the first token to the last round, includes what the caller did
    between tokens, as a GPU goes on meanwhile.
    """

    prompt_tokens: int
    rounds: Rounds
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    prefill_tokens: int = 0  # of the prompt, those whose rows the caches did not have

    @property
    def accept_counts(self) -> list[int]:
        """Accept counts of all rounds, whoever drafted."""
        return total_counts(self.rounds.values())

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first over decoding time; 0 if there were none."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


class Round:
    """What a round with one drafter computes, in pieces of static shape that are compiled, without asking the device
    for anything.

    The text so far is token (1, 1), the last one emitted, and pos (1,), its position; `verify` moves both on.
    """

    def __init__(self, model: Transformer, drafter: Drafter, sampling: Sampling, token: Tensor, pos: Tensor):
        self.model, self.drafter, self.sampling = model, drafter, sampling
        self.token, self.pos = token, pos
        self.offsets = torch.arange(drafter.k + 1, device=pos.device)

    def agree(self, tokens: Tensor) -> Tensor:
        """What the first of the processes chose, on all of them."""
        return broadcast(tokens, self.model.shard) if self.model.shard else tokens

    def choose(self, logits: Tensor, u: Any) -> tuple[Tensor, Tensor | None]:
        """The next token (1, 1) for logits (1, V) and u (1,), and the probabilities (1, V) it was drawn from."""
        if self.sampling.temperature == 0:
            return self.agree(logits.argmax(-1, keepdim=True)), None
        probs = self.sampling.distribution(logits)
        return self.agree(draw(probs, u)[:, None]), probs

    def prefill(self, prompt: Tensor, pos: Tensor | None, u: Tensor | None) -> Tensor:
        """Fill the caches from the prompt (1, T), whose positions are pos (T,), or None if it is all of the text.

        Returns (2,): the first token, and whether its logits were finite numbers.
        """
        x, start = self.drafter.fill(prompt, pos)
        logits = self.model.logits(self.model(x, pos, start)[:, -1])
        token, _ = self.choose(logits, u)
        return torch.cat((token[0], all_finite(logits).long()))

    def step(self, token: Tensor, pos: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One drafting step: (state, next token (1, 1), its distribution (1, V))."""
        state, logits = self.drafter.step(token, pos)
        return state, *self.choose(logits, u)

    def verify(self, tokens: Tensor, states: list, probs: list, pos: Tensor, u: Tensor | None) -> Tensor:
        """The pass that decides: tokens (1, K+1) from position pos (1,) on, with states and probs of `Drafter.draft`.

        Returns (K+2,): the K + 1 tokens of `accept`, then the number accepted, or -1 if the logits that decided were no
        finite numbers.
        """
        own = pos + self.offsets  # (K+1,)
        x, start = self.drafter.verify_from(tokens, states, own)
        logits = self.model.logits(self.model(x, own, start)[0])  # (K+1, V)
        p = logits.new_zeros(0, logits.shape[-1])
        if self.sampling.temperature and probs:
            p = torch.cat(probs)
            if p.shape[-1] < logits.shape[-1]:  # what only the target has was not drafted
                p = F.pad(p, (0, logits.shape[-1] - p.shape[-1]))
        result = self.agree(torch.cat(accept(tokens[0, 1:], p, logits, u, self.sampling)))  # (K+2,)
        n = result[-1:]
        self.token.copy_(result.index_select(0, n)[None])
        self.pos.add_(n + 1)
        decided = all_finite(logits) | (self.offsets > n)  # rows behind the last token that is kept decide nothing
        return torch.cat((result[:-1], torch.where(decided.all(), n, -1)))


class Decoder:
    """Decodes one sequence at a time in rounds of static shape, with any drafter.

    A round feeds the last emitted token, which has no cache row yet, and K drafted ones; it emits between 1 and K + 1
    tokens. Plain decoding is K = 0.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        drafter: Drafter | None = None,
        sampling: Sampling = GREEDY,
        rows: int | None = None,
        compile: bool = False,
        compile_prefill: bool = False,
        seed: int | None = None,
        **options: Any,
    ):
        """drafter: for this model; or else `options` describe one, as for `make_drafter`.

        rows: positions to provide for, prompt and new tokens together (default and most: the context). Decoders of
        one model share its caches, so one generation must end before the next begins. Of a model split over several
        processes (tp.py), all must do the same with their decoders; the tokens are those of the first. Raises
        InputError as `make_drafter` does.
        """
        self.model, self.sampling = model, sampling
        self.drafter = drafter or make_drafter(model, **options)
        members = self.drafter.members()
        self.K = max(member.k for member in members)
        self.exit_layer, self.models = self.drafter.exit_layer, self.drafter.models
        self.context = min(m.config.context for m in self.models)
        self.rows = min(rows or self.context, self.context)
        for m in self.models:  # a round may run past the last wanted token, and one late past that
            m.setup_caches(self.rows + 2 * (self.K + 1))
        device = model.embed.weight.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton and graphs work on the current one
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.pos = torch.zeros(1, dtype=torch.long, device=device)
        self.pieces: dict[Drafter, tuple[Callable, Callable]] = {}  # Round.step and Round.verify of each
        for member in members:
            pieces = Round(model, member, sampling, self.token, self.pos)
            self.pieces[member] = pieces.step, pieces.verify
            if member is self.drafter:
                self.prefill = pieces.prefill
        self.compiled = (compile or compile_prefill) and kernels.can_compile(model.embed.weight)
        if compile and self.compiled:
            for member, (step, verify) in self.pieces.items():
                self.pieces[member] = compiled(step), compiled(verify)
        if compile_prefill and self.compiled:
            self.prefill = compiled(self.prefill, dynamic=True)
        self.random = self.make_generator(device, seed)
        self.stats = Stats(0, {})  # of the last generation
        self.late = 0  # rounds in flight while the host reads an earlier one
        if device.type == "cuda" and not self.drafter.reads_text:
            self.late = 1
        self.graphed = compile and device.type == "cuda"
        self.graphs: dict[Drafter, Any] = {}  # (CUDA graph of a round, its result (K+2,), the caches it has) of each

    def make_generator(self, device: torch.device, seed: int | None) -> torch.Generator:
        """Random numbers on the device; without a seed different each time, but the same on all processes."""
        random = torch.Generator(device)
        if seed is None:
            random.seed()
        else:
            random.manual_seed(seed)
        if self.model.shard:
            random.manual_seed(self.model.shard.share(random.initial_seed()))
        return random

    def uniform(self, count: int) -> Tensor | None:
        """Random numbers (count,) for one round; float64, as `draw` wants them. None at temperature 0."""
        if self.sampling.temperature == 0:
            return None
        return torch.rand(count, dtype=torch.float64, device=self.pos.device, generator=self.random)

    def round(self, drafter: Drafter, on_draft: Callable | None = None) -> Tensor:
        """Draft tokens and verify them, without asking the device for anything. Returns what `Round.verify` does."""
        (step, verify), k = self.pieces[drafter], drafter.k
        u = self.uniform(2 * k + 1)
        drafting, deciding = (None, None) if u is None else (u[:k], u[k:])
        tokens, states, probs = drafter.draft(step, self.token, self.pos, drafting)
        if on_draft and k:
            on_draft(tokens[0, 1:].tolist())
        return verify(tokens, states, probs, self.pos, deciding)

    def record(self, drafter: Drafter) -> None:
        """Record a round as one CUDA graph, unless that is done and the caches are where they were."""
        caches = [m.layers[0].attention.k_cache for m in self.models]
        if drafter in self.graphs and all(a is b for a, b in zip(self.graphs[drafter][2], caches, strict=True)):
            return
        random = self.random.get_state()
        side = torch.cuda.Stream(self.pos.device)
        side.wait_stream(torch.cuda.current_stream(self.pos.device))
        with torch.cuda.stream(side):
            self.token.zero_()
            self.pos.zero_()
            for m in self.models:  # these rounds write to the first rows
                m.cached_ids = []
            for _ in range(2):  # compiles, tunes and allocates
                self.round(drafter)
        torch.cuda.current_stream(self.pos.device).wait_stream(side)
        self.random.set_state(random)  # the same seed draws the same tokens without a graph
        graph = torch.cuda.CUDAGraph()
        if self.sampling.temperature > 0:
            graph.register_generator_state(self.random)  # each replay draws new numbers
        with torch.cuda.graph(graph):
            out = self.round(drafter)
        self.graphs[drafter] = graph, out, caches

    def launch(self, drafter: Drafter, on_draft: Callable | None = None) -> Callable[[], list[int]]:
        """Start a round. Returns a function that waits until it is done and gives the result of `Round.verify` as a
        list.
        """
        if self.graphed and not on_draft:
            graph, out, _ = self.graphs[drafter]
            graph.replay()
        else:
            out = self.round(drafter, on_draft)
        if out.device.type != "cuda":
            return out.tolist
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return read

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise InputError unless the ids are a prompt that can be continued."""
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if len(prompt) > self.rows:
            room = f"there is room for {self.rows} (the model's context is {self.context})"
            raise InputError(f"the prompt has {len(prompt)} tokens, but {room}")
        if max(prompt) >= self.model.config.vocab_size:
            raise InputError(
                f"the prompt has token id {max(prompt)}, but the model has only {self.model.config.vocab_size} tokens"
            )

    def cached_prefix(self, prompt: list[int]) -> int:
        """How many of the prompt's ids have rows in the caches that need not be computed again; the last one always
        is.
        """
        common = len(prompt) - 1
        for m in self.models:
            common = min(common, len(m.cached_ids))
            common = next((i for i in range(common) if m.cached_ids[i] != prompt[i]), common)
        return common

    def start_text(self, prompt: list[int], reuse: bool) -> int:
        """Run the prompt through the model; returns the first token. Raises InputError if its logits are no finite
        numbers.
        """
        kept = self.cached_prefix(prompt) if reuse else 0
        for m in self.models:
            m.cached_ids = prompt[:kept]
        device = self.pos.device
        pos = torch.arange(kept, len(prompt), device=device) if kept else None
        token, finite = self.prefill(torch.tensor([prompt[kept:]], device=device), pos, self.uniform(1)).tolist()
        self.stats.prefill_tokens = len(prompt) - kept
        self.check_finite(finite)
        self.token.fill_(token)
        self.pos.fill_(len(prompt))
        return token

    def check_finite(self, finite: bool) -> None:
        if not finite:
            dtype = str(self.model.embed.weight.dtype)[6:]
            advice = (
                "the checkpoint may be damaged: convert it again" if dtype == "float32" else "try --precision float32"
            )
            raise InputError(
                f"--precision {dtype}: the model's logits are not finite numbers (NaN or infinity); {advice}"
            )

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        eos_ids: Collection[int] = (),
        on_draft: Callable[[list[int]], None] | None = None,
        reuse: bool = False,
    ) -> Iterator[int]:
        """Yield up to max_new_tokens new ids, as they are accepted, stopping after any of eos_ids.

        prompt: a list of 1 to `rows` ids. No position at or beyond `rows` decides anything: a prompt that fills them
        yields one token. on_draft, if given, is called with the drafted ids before each verification. reuse: where
        the prompt begins as the text of the generation before, take over its cache rows (nothing else may have run
        the model since). `stats` describes the generation so far. Raises InputError for an empty prompt or one that
        is too long, and if the logits are not finite numbers, as happens in float16.
        """
        self.check_prompt(prompt)
        limit = min(max_new_tokens, self.rows - len(prompt) + 1)
        stats = self.stats = Stats(len(prompt), {member.name: [0] * (self.K + 1) for member in self.pieces})
        if limit < 1:
            return
        if self.graphed:
            for member in self.pieces:
                self.record(member)
        began = time.perf_counter()
        out = [self.start_text(prompt, reuse)]
        stats.prefill_seconds = time.perf_counter() - began
        self.drafter.begin(prompt)
        try:
            yield from self.rounds(out, limit, eos_ids, on_draft)
        finally:
            if self.stats is stats:  # and not one that was left behind for another
                for m in self.models:
                    m.cached_ids = prompt + stats.tokens[:-1]  # the last has no row yet

    def rounds(self, out: list[int], limit: int, eos_ids: Collection[int], on_draft: Callable | None) -> Iterator[int]:
        """Yield the tokens `out` and those of the rounds that follow, `limit` in all."""
        stats, began = self.stats, time.perf_counter()
        late = 0 if on_draft else self.late
        pending: deque[tuple[Drafter, Callable[[], list[int]]]] = deque()  # rounds started and not read
        while True:
            self.drafter.observe(out)
            for token in out:
                stats.tokens.append(token)
                yield token
                if token in eos_ids or len(stats.tokens) == limit:
                    return  # what is still in flight is never read, and neither its tokens nor its counts are seen
            while (
                len(pending) <= late and len(stats.tokens) + len(pending) < limit
            ):  # each round in flight brings a token or more
                drafter = self.drafter.pick()
                pending.append((drafter, self.launch(drafter, on_draft)))
            drafter, read = pending.popleft()
            *out, accepted = read()  # the one place where the host waits
            self.check_finite(accepted >= 0)
            stats.decode_seconds = time.perf_counter() - began
            stats.rounds[drafter.name][accepted] += 1
            out = out[: accepted + 1]

    # The byte model: decoding reads every weight once a pass, so bytes are the currency.

    def full_bytes(self) -> int:
        """Bytes of weights that this process reads in one pass of the whole target."""
        return weight_bytes(*self.model.layers, self.model.norm, self.model.head)

    def bytes_read(self, rounds: Rounds) -> int:
        """Bytes of weights that this process reads in these rounds (see `Stats`): drafting and full passes."""
        full = self.full_bytes()
        return sum(sum(rounds[member.name]) * (full + member.bytes_per_round()) for member in self.pieces)

    def ideal_speedup(self, rounds: Rounds) -> float:
        """Speed over plain decoding of these rounds (see `Stats`) if time were bytes: each token that they emitted
        would have been a full pass.
        """
        counts = total_counts(rounds.values())
        emitted = sum((i + 1) * count for i, count in enumerate(counts))
        return emitted * self.full_bytes() / self.bytes_read(rounds) if emitted else 1.0


def total_counts(counts: Iterable[Sequence[int]]) -> list[int]:
    """The sum of several accept counts of the same length."""
    return [sum(each) for each in zip(*counts, strict=True)]


def total_rounds(rounds: Sequence[Rounds]) -> Rounds:
    """The sum of what several generations of one Decoder did."""
    return {name: total_counts(each[name] for each in rounds) for name in rounds[0]}


def acceptance(counts: Sequence[float]) -> tuple[list[float], float]:
    """(acceptance probabilities, mean accepted) of accept counts; ([], 0) if there was no round."""
    rounds = sum(counts)
    if not rounds:
        return [], 0.0
    return [count / rounds for count in counts], sum(i * count for i, count in enumerate(counts)) / rounds


def peak_memory_gb(device: str | torch.device) -> float:
    """Peak memory of this process in 1e9 bytes: allocated on the GPU, or resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of what the system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# A sample: where it ends, its text, and conversations made of samples.


@dataclass(frozen=True)
class Ending:
    """Where a sample ends: after max_new_tokens, with one of the ids, or before one of the strings."""

    max_new_tokens: int
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        strings: Sequence[str] = (),
        ids: Sequence[int] = (),
    ) -> "Ending":
        """With the checkpoint's own EOS ids. A string that is a special token, which no text shows, ends a sample by
        its id.
        """
        special = {tokenizer.added[s] for s in strings if tokenizer.added.get(s) in tokenizer.special_ids}
        return cls(max_new_tokens, frozenset(model.config.eos_ids) | special | set(ids), tuple(strings))


def run_sample(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    ending: Ending,
    show: Callable[[str], None] | None = None,
    on_draft: Callable[[list[int]], None] | None = None,
    reuse: bool = False,
) -> str:
    """One continuation of the prompt ids: its text without the prompt. `show` is called with each new piece of it."""
    text, pieces = Text(tokenizer, prompt, ending.strings), []

    def take(piece: str) -> None:
        pieces.append(piece)
        if show:
            show(piece)

    for token in decoder.generate(prompt, ending.max_new_tokens, ending.ids, on_draft, reuse):
        take(text.push(token))
        if text.stopped:
            break
    take(text.flush())
    return "".join(pieces)


class Conversation:
    """Turns of a user and the model by the checkpoint's chat template.

    The caches are kept from turn to turn, so that the model reads only what is new. `messages`, dicts with `role` and
    `content`, may be edited in between.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, ending: Ending, system: str | None = None):
        self.decoder, self.tokenizer, self.ending = decoder, tokenizer, ending
        self.messages = opening(system)

    def answer(
        self,
        text: str,
        show: Callable[[str], None] | None = None,
        on_draft: Callable[[list[int]], None] | None = None,
    ) -> str:
        """The model's answer to what the user says. Both become part of the conversation; of an interrupted answer,
        what is there of it.

        Raises InputError, and leaves the conversation as it was, if the template refuses it or there is no room for it.
        """
        pieces: list[str] = []
        messages = [*self.messages, dict(role="user", content=text)]

        def keep(piece: str) -> None:
            pieces.append(piece)
            if show:
                show(piece)

        prompt = self.tokenizer.chat(messages, self.decoder.context)
        try:
            run_sample(self.decoder, self.tokenizer, prompt, self.ending, keep, on_draft, reuse=True)
        except InputError:
            pieces.clear()
            raise
        finally:
            if pieces:
                self.messages = [*messages, dict(role="assistant", content="".join(pieces))]
        return "".join(pieces)


def opening(system: str | None) -> list[dict]:
    """The messages that a conversation begins with."""
    return [] if system is None else [dict(role="system", content=system)]


# The terminal.


class DraftDisplay:
    """Prints a stream of text and, dimmed behind it, the current draft, which the next text overwrites."""

    def __init__(self, tokenizer: Tokenizer, colour: bool):
        self.tokenizer, self.colour = tokenizer, colour
        self.column = self.drawn = 0

    def draft(self, ids: list[int]) -> None:
        if not self.colour:
            return
        columns = shutil.get_terminal_size().columns
        room = max(columns - 1 - self.column % columns, 0)
        text = self.tokenizer.decode(ids).replace("\n", "⏎").replace("\t", " ")[:room]
        print(f"\033[2m{text}\033[0m", end="", flush=True)
        self.drawn = len(text)

    def text(self, text: str) -> None:
        if self.drawn:
            print(f"\033[{self.drawn}D\033[K", end="")
            self.drawn = 0
        print(text, end="", flush=True)
        before = 0 if "\n" in text else self.column
        self.column = before + len(text) - text.rfind("\n") - 1


def line_reader() -> Callable[[], str]:
    """A function that returns the next line the user types.

    It raises EOFError at the end, InputError if the line is not UTF-8, and KeyboardInterrupt if the user gave it up.
    """
    label = "> "
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:  # optional: lines of any length, history, and several lines pasted at once
            from prompt_toolkit import PromptSession
        except ImportError:
            return partial(input, label)
        return partial(PromptSession().prompt, label)

    def read() -> str:
        print(label, end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        try:
            return line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise InputError("the line is not valid UTF-8") from None

    return read


def next_line(read: Callable[[], str] | None, shard: Shard) -> str | None:
    """What the user typed next, on all processes; None at the end. Raises InputError if it is not text."""
    line = problem = None
    if read:
        try:
            line = read()
        except EOFError:
            pass
        except KeyboardInterrupt:
            line = ""
        except InputError as error:
            problem = str(error)
    line, problem = shard.share((line, problem))
    if problem:
        raise InputError(problem)
    return line


def describe(stats: Stats) -> str:
    rate = "no decoding step"
    if len(stats.tokens) > 1:
        rate = f"{stats.tokens_per_second:.2f} tokens/sec"
    prefill = str(stats.prompt_tokens)
    if stats.prefill_tokens < stats.prompt_tokens:
        prefill = f"{stats.prefill_tokens} of {prefill}"
    return (
        f"{stats.prefill_seconds:.3f} s prefill of {prefill} tokens, "
        f"{stats.decode_seconds:.2f} s decoding, {len(stats.tokens)} tokens, {rate}"
    )


def interact(decoder: Decoder, tokenizer: Tokenizer, args: argparse.Namespace, ending: Ending, shard: Shard) -> None:
    """Answer line after line until the input ends. One bad line doesn't end it."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    display = DraftDisplay(tokenizer, shard.share(colour))
    on_draft = display.draft if display.colour else None
    conversation = Conversation(decoder, tokenizer, ending, args.system) if args.chat else None
    print(f"Type {'a message' if args.chat else 'a prompt'}; Ctrl-C stops an answer, Ctrl-D ends.")
    read = line_reader() if shard.rank == 0 else None
    while True:
        try:
            line = next_line(read, shard)
            if line is None:
                print()
                return
            if conversation and not line.strip():
                continue
            if conversation:
                conversation.answer(line, display.text, on_draft)
            else:
                prompt = tokenizer.encode(line, context=decoder.context)
                run_sample(decoder, tokenizer, prompt, ending, display.text, on_draft)
        except InputError as error:
            print(f"error: {error}")
            continue
        except KeyboardInterrupt:
            pass
        display.text("\n")
        accepted = ""
        if decoder.K:
            mean = acceptance(decoder.stats.accept_counts)[1]
            accepted = f", {mean:.2f} of {decoder.K} drafted tokens accepted"
        print(f"[{describe(decoder.stats)}{accepted}]")


# The command: arguments, what they name, and the report.


def find_checkpoint(args: argparse.Namespace, shard: Shard) -> Path:
    """The path of model.pth that the arguments name. `--model REPO` (or a local folder) is prepared by the first
    process if it isn't there.
    """
    if not args.model:
        return args.checkpoint_path or CHECKPOINTS / "demo" / "model.pth"
    folder = Path(args.model) if Path(args.model).is_dir() else CHECKPOINTS / args.model
    if shard.rank == 0 and not (folder / "model.pth").is_file():
        script = CHECKPOINTS.parent / "scripts" / "prepare.sh"
        if subprocess.run(["bash", script, args.model], env={**os.environ, "PYTHON": sys.executable}).returncode:
            sys.exit(1)  # it has said why
    shard.gather(None)
    return folder / "model.pth"


def load(
    path: str | Path,
    device: str,
    precision: str | None,
    shard: Shard | None = None,
    verify: bool = True,
    adapters: bool = True,
) -> tuple[Transformer, Tokenizer]:
    """(model, tokenizer) of a checkpoint file. adapters: the model gets those that lie beside it.

    precision None: bfloat16 on CUDA, float32 on the CPU. shard, verify: as in `load_model`.
    """
    path = Path(path)
    check_device(device)
    if precision is None:
        precision = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    model = load_model(path, device, getattr(torch, precision), shard, verify)
    if adapters:
        load_adapters(path, model, verify)
    tokenizer = Tokenizer.load(path.parent)
    tokenizer.check_model(model.config.vocab_size)
    return model, tokenizer


def load_draft(args: argparse.Namespace, path: Path, tokenizer: Tokenizer, shard: Shard) -> Transformer | None:
    """The model of --draft_checkpoint_path, if it is given. Raises InputError unless it shares the target's
    tokenizer.
    """
    if not args.draft_checkpoint_path:
        return None
    model, own = load(
        args.draft_checkpoint_path, args.device, args.precision, shard, not args.no_verify, adapters=False
    )
    if not tokenizer.same_as(own):
        option = f"--draft_checkpoint_path {args.draft_checkpoint_path}"
        raise InputError(f"{option}: its tokenizer is not that of {path}: a draft model must share it")
    return model


def read_prompt(args: argparse.Namespace, shard: Shard) -> str:
    """The text of --prompt or --prompt_file, or else a piece of Python. Raises InputError for a file that isn't UTF-8
    text.
    """
    if not args.prompt_file:
        return DEFAULT_PROMPT if args.prompt is None else args.prompt
    source = "standard input" if args.prompt_file == "-" else args.prompt_file
    text = problem = None
    if shard.rank == 0:  # of several processes one reads
        try:
            data = sys.stdin.buffer.read() if args.prompt_file == "-" else read_bytes(args.prompt_file, pipes=True)
            text = data.decode()
        except UnicodeDecodeError:
            problem = f"{source}: is not valid UTF-8"
        except OSError as error:
            problem = f"{source}: can't be read ({error.strerror})"
        except InputError as error:
            problem = str(error)
    text, problem = shard.share((text, problem))
    if problem:
        raise InputError(f"--prompt_file {problem}")
    return text


def encode_prompt(tokenizer: Tokenizer, text: str, args: argparse.Namespace, context: int) -> list[int]:
    """The ids that the model is given for the prompt, by the chat template if --chat asks for it.

    Raises InputError, also if it can't fit into the context.
    """
    if not args.chat:
        return tokenizer.encode(text, context=context)
    return tokenizer.chat([*opening(args.system), dict(role="user", content=text)], context)


def add_what_to_run(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("what to run").add_argument
    add(
        "--checkpoint_path",
        type=filled_path,
        help="model.pth of a prepared checkpoint (default: that of checkpoints/demo)",
    )
    add(
        "--model",
        type=filled,
        metavar="REPO",
        help="checkpoints/REPO/model.pth, downloaded and converted first if it isn't there",
    )
    add("--prompt", help="text to continue (default: the beginning of a Python class)")
    add(
        "--prompt_file",
        type=filled,
        metavar="FILE",
        help="take the prompt from a UTF-8 file, exactly as it is; -: from standard input",
    )
    add(
        "--chat", action="store_true", help="the prompt is a user's message: put it into the checkpoint's chat template"
    )
    add("--system", metavar="TEXT", help="with --chat: a system message, which begins the conversation")
    add(
        "--interactive",
        action="store_true",
        help="read prompts from the terminal and stream the answers; with --chat: a conversation. "
        "Drafted tokens appear dimmed until they are verified",
    )
    add("--num_samples", type=whole(1), default=5, help="how often to continue the prompt (default: %(default)s)")
    add("--max_new_tokens", "--max_steps", type=whole(1), default=200, help="per sample (default: %(default)s)")
    add(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end a sample before the first of these strings, which may be special tokens",
    )
    add(
        "--stop_token_ids",
        type=whole(),
        nargs="+",
        default=[],
        metavar="N",
        help="end a sample with the first of these token ids, as with the checkpoint's own EOS ids",
    )


def add_sampling(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("sampling").add_argument
    add("--temperature", type=real(), default=0.8, help="0: always the most likely token (default: %(default)s)")
    add("--top_k", type=whole(1), help="draw from the k most likely tokens only (default: all)")
    add(
        "--top_p",
        type=real(0, 1),
        default=1.0,
        help="draw from the most likely tokens that together have this probability (default: %(default)s)",
    )
    add("--seed", type=whole(0, MOST_SEED), default=1234, help="same seed, same text (default: %(default)s)")


def add_speculation(p: argparse.ArgumentParser) -> None:
    about = "The text's distribution is that of plain decoding, whatever is set here."
    add = p.add_argument_group("speculation", about).add_argument
    add("--self_speculative", action="store_true", help="draft with the first layers of the model itself")
    add(
        "--draft_precision",
        choices=["same", "int8", "int4"],
        help="draft with the layers themselves, or with a copy of them in int8 or int4, made in memory. A copy reads "
        "less and may have all layers, so that a model without early exits gains too (default: same; auto tries all)",
    )
    add(
        "--draft",
        choices=["ngram"],
        help="draft what followed the last occurrence of the text's last tokens; with --self_speculative the model "
        "drafts where there is none",
    )
    add("--ngram_k", type=DRAFT_LENGTH, metavar="K", help=f"tokens in an n-gram draft (default: {NGRAM_K})")
    add("--ngram_max", type=whole(1), default=3, metavar="N", help="look up the last N tokens or fewer (default: 3)")
    add(
        "--generation_strategy",
        choices=["autoregressive", "self_speculative"],
        help="the LayerSkip repository's spelling of --self_speculative",
    )
    add(
        "--early_exit",
        "--exit_layer",
        type=or_auto(SIZES["n_layer"]),
        metavar="E",
        help="draft with this many layers (default: up to the lowest exit with an adapter, "
        "else a quarter of them; with --draft_precision int8 or int4: all); "
        "auto: see below",
    )
    add(
        "--speculate_k",
        "--num_speculations",
        type=or_auto(DRAFT_LENGTH),
        metavar="K",
        help=f"draft this many tokens per round (default: {SPECULATE_K}). auto for E and K takes the fastest "
        "that scripts/sweep.py has stored with the checkpoint. Without one, or with auto for one of them, a short "
        "calibration decides. Either may choose plain decoding",
    )
    add(
        "--draft_head",
        choices=["int8", "full"],
        default="int8",
        help="draft with a copy of the output head in int8, or with the head itself (default: %(default)s)",
    )
    add("--draft_checkpoint_path", type=filled_path, help="draft with this separate, smaller checkpoint instead")


def add_how_to_run(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("how to run").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1 (default here: %(default)s)")
    add(
        "--precision",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (default: bfloat16 on CUDA, float32 on the CPU)",
    )
    add("--no_verify", action="store_true", help="don't check the checkpoint's checksums while it is loaded")
    add_threads(add)
    add("--compile", action="store_true", help="compile decoding on a GPU; on the CPU its kernels are compiled already")
    add("--compile_prefill", action="store_true", help="compile the prompt's pass too")
    add(
        "--profile",
        type=filled_path,
        metavar="FILE",
        help="write a trace of one more sample, for Perfetto or chrome://tracing",
    )
    add(
        "--json",
        type=filled,
        metavar="FILE",
        help="write all results as one JSON object; -: as the last line of the output",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(
        description="Generate text from a LayerSkip checkpoint, plainly or with self-speculative decoding. "
        "Without arguments: the demo checkpoint that comes with this repository.",
        epilog="Where an option has two names, they are gpt-fast's and the LayerSkip repository's.",
    )
    for add_group in (add_what_to_run, add_sampling, add_speculation, add_how_to_run):
        add_group(p)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.self_speculative |= args.generation_strategy == "self_speculative"
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for the first option whose value is wrong by itself, or that contradicts another."""
    if "" in args.stop:
        raise InputError("--stop: an empty string would end every sample before it begins")
    check_together(args)


def check_outputs(args: argparse.Namespace, checkpoint: Path) -> None:
    """Raise InputError for an output that can't be written, or would overwrite what the run reads."""
    inputs: list[str | Path] = [checkpoint, described_by(checkpoint)]
    draft = args.draft_checkpoint_path
    if draft:
        inputs += [draft, described_by(draft)]
    if args.prompt_file:
        inputs.append(args.prompt_file)
    for option, file in (("--json", args.json), ("--profile", args.profile)):
        if file and file != "-":
            check_writable(option, file, inputs)
            inputs.append(file)


def check_together(args: argparse.Namespace) -> None:
    """Raise InputError for options that contradict each other, or of which one is of no use without another."""
    if args.self_speculative and args.generation_strategy == "autoregressive":
        raise InputError("--self_speculative and --generation_strategy autoregressive contradict each other")
    if args.model and args.checkpoint_path:
        raise InputError("--model and --checkpoint_path both name a checkpoint: give one")
    check_drafting(args)
    if args.draft_checkpoint_path and "auto" in (args.early_exit, args.speculate_k):
        raise InputError("auto chooses between layers of the model itself: leave out --draft_checkpoint_path")
    prompted = args.prompt is not None or args.prompt_file
    if args.prompt is not None and args.prompt_file:
        raise InputError("--prompt and --prompt_file both name a prompt: give one")
    if args.interactive and (args.json or args.profile):
        raise InputError("--interactive writes no --json and no --profile: leave them out")
    if args.system is not None and not args.chat:
        raise InputError("--system is for --chat: give both")
    if args.chat and not args.interactive and not prompted:
        raise InputError("--chat: needs --prompt TEXT, what the user says, or --interactive")


def check_drafting(args: argparse.Namespace) -> None:
    """Raise InputError for options of a drafter that is not asked for."""
    if not args.self_speculative:
        for option in ("early_exit", "draft_precision"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} is for --self_speculative: give both")
        if args.speculate_k == "auto":
            raise InputError("--speculate_k auto is for --self_speculative: give both")
        if args.draft and args.speculate_k and not args.draft_checkpoint_path:
            raise InputError("--speculate_k is for drafts by a model; the length of n-gram drafts is --ngram_k")
    if args.ngram_k is not None and not args.draft:
        raise InputError("--ngram_k is for --draft ngram: give both")


def make_decoder(args: argparse.Namespace, model: Transformer, draft_model: Transformer | None, rows: int) -> Decoder:
    exit_layer = None
    if args.self_speculative:
        exit_layer = default_exit(args, model) if args.early_exit is None else args.early_exit
    ngram_k = 0
    if args.draft == "ngram":
        ngram_k = NGRAM_K if args.ngram_k is None else args.ngram_k
    return Decoder(
        model,
        exit_layer=exit_layer,
        draft_model=draft_model,
        k=SPECULATE_K if args.speculate_k is None else args.speculate_k,
        draft_head=args.draft_head,
        draft_precision=args.draft_precision or "same",
        ngram_k=ngram_k,
        ngram_max=args.ngram_max,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        rows=rows,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        seed=args.seed,
    )


def default_exit(args: argparse.Namespace, model: Transformer) -> int:
    """Where drafting ends if no exit is named."""
    if args.draft_precision in ("int8", "int4"):
        return model.config.n_layer
    return model.default_exit


def settle_auto(args: argparse.Namespace, path: Path, model: Transformer, prompt: list[int], shard: Shard) -> None:
    """Replace auto in the arguments by the fastest exit layer, draft length and, if none is named, draft precision, or
    by plain decoding if that is faster; says which, and how it knows. What the first process measures is what all take.
    """
    exit_layer = None if args.early_exit == "auto" else args.early_exit or default_exit(args, model)
    k = None if args.speculate_k == "auto" else args.speculate_k or SPECULATE_K

    def build(precision: str, exit_layer: int | None, k: int, rows: int) -> Decoder:
        own = dict(early_exit=exit_layer, speculate_k=k, draft_precision=precision, draft=None)
        own["self_speculative"] = exit_layer is not None
        return make_decoder(argparse.Namespace(**{**vars(args), **own}), model, None, rows)

    setting = None
    if exit_layer is k is args.draft_precision is None:
        setting = tune.stored(path, tune.key(model, args.compile, args.temperature))
    setting = shard.share(setting)
    if setting is None:
        setting = shard.share(tune.calibrate(build, precisions(args, model), model, prompt, exit_layer, k))
    exit_layer, k, precision, why = setting
    args.self_speculative, args.early_exit, args.speculate_k = exit_layer is not None, exit_layer, k
    args.draft_precision = precision
    print(f"auto: {tune.options(exit_layer, k, precision)} ({why})")


def precisions(args: argparse.Namespace, model: Transformer) -> list[str]:
    """The draft precisions that auto may choose."""
    if args.draft_precision:
        return [args.draft_precision]
    smaller = SMALLER[model.config.quantization]
    if args.early_exit == model.config.n_layer and smaller:
        return smaller  # the layers themselves would draft what they verify
    return ["same", *smaller]


def introduce(path: Path, decoder: Decoder, prompt: list[int], args: argparse.Namespace, shard: Shard) -> None:
    """Say what will run, and what a user should know of it beforehand."""
    config, weight = decoder.model.config, decoder.model.embed.weight
    processes = f", {shard.size} processes" if shard.size > 1 else ""
    print(
        f"{path}: {count_parameters(config) / 1e6:.1f}M parameters, {config.n_layer} layers, "
        f"{config.quantization or str(weight.dtype)[6:]} on {args.device}{processes}"
    )
    with torch.inference_mode():
        quantized = config.quantization or args.draft_precision in ("int8", "int4")
        if quantized and not kernels.backend(weight, 1):
            print(
                "note: there are no kernels for quantized weights here: they are widened for every token, "
                "which is slower than float weights"
            )
    if (args.compile or args.compile_prefill) and kernels.available(weight) == "cpu":
        print("note: --compile changes nothing on the CPU: its kernels are compiled already")
    room = decoder.rows - len(prompt) + 1
    if 0 < room < args.max_new_tokens and not args.interactive:
        print(f"note: the context of {decoder.context} positions leaves room for {room} new tokens")


def warm_up(decoder: Decoder, prompt: list[int], args: argparse.Namespace) -> float:
    """Compile what is to be compiled by decoding a little; returns the seconds it took."""
    if not decoder.compiled:
        return 0.0
    began = time.perf_counter()
    for _ in decoder.generate(prompt, 3 * (decoder.K + 1)):
        pass
    seconds = time.perf_counter() - began
    print(f"Compilation time: {seconds:.2f} seconds")
    decoder.random.manual_seed(args.seed)
    return seconds


def run_samples(
    decoder: Decoder, tokenizer: Tokenizer, prompt: list[int], before: str, ending: Ending, count: int
) -> list[dict]:
    """Print `count` continuations of the prompt, each behind the text `before`; returns what is reported of each."""
    samples = []
    for number in range(1, count + 1):
        text = run_sample(decoder, tokenizer, prompt, ending)
        stats = decoder.stats
        print(f"{before}{text}\nTime for inference {number}: {describe(stats)}\n")
        samples.append(
            dict(
                prompt_tokens=stats.prompt_tokens,
                tokens=stats.tokens,
                text=text,
                prefill_seconds=stats.prefill_seconds,
                decode_seconds=stats.decode_seconds,
                tokens_per_second=stats.tokens_per_second,
                rounds=stats.rounds,
                accept_counts=stats.accept_counts,
            )
        )
    return samples


def make_report(
    samples: list[dict], decoder: Decoder, compile_seconds: float, args: argparse.Namespace, shard: Shard
) -> dict:
    """Everything measured, as JSON has it."""
    rounds = total_rounds([sample["rounds"] for sample in samples])
    probs, mean_accepted = acceptance(total_counts(rounds.values()))
    decode_seconds = sum(sample["decode_seconds"] for sample in samples)
    read = decoder.bytes_read(rounds)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"exit_layer": decoder.exit_layer, "processes": shard.size, "torch": torch.__version__}
    return dict(
        samples=samples,
        tokens_per_second=statistics.median(sample["tokens_per_second"] for sample in samples),
        acceptance_probs=probs,
        mean_accepted=mean_accepted,
        memory_gb=max(shard.gather(peak_memory_gb(args.device))),
        bandwidth_gb_per_s=read / decode_seconds / 1e9 if decode_seconds else 0.0,
        rounds=rounds,
        draft_copy_bytes=decoder.drafter.extra_bytes(),
        ideal_speedup=decoder.ideal_speedup(rounds),
        compile_seconds=compile_seconds,
        settings=settings,
    )


def write_profile(profile: torch.profiler.profile, path: Path) -> None:
    """Write a trace in Chrome's format. Raises InputError if it can't be written."""
    with tempfile.TemporaryDirectory() as folder, replacing(path) as trace:
        written = Path(folder) / "trace.json"  # the profiler makes files beside it
        profile.export_chrome_trace(str(written))
        if not written.is_file() or not written.read_bytes().rstrip().endswith(b"}"):
            raise OSError("the profiler couldn't write all of it; is the disk full?")
        trace.write_bytes(written.read_bytes())


def print_report(report: dict, drafted: bool, shard: Shard) -> None:
    rates = [sample["tokens_per_second"] for sample in report["samples"]]
    print("=" * 10)
    print({"tokens_per_sec": rates, "accept_counts": [sample["accept_counts"] for sample in report["samples"]]})
    if drafted:
        print_drafters(report)
        print(f"Acceptance probs: {report['acceptance_probs']}\nMean Accepted: {report['mean_accepted']}")
        print(f"Ideal speedup for these acceptances: {report['ideal_speedup']:.2f}x (if time were bytes of weights)")
    print(f"Average tokens/sec: {statistics.mean(rates):.2f} (median {report['tokens_per_second']:.2f})")
    each, most = (" by each process", " by each process at most") if shard.size > 1 else ("", "")
    print(f"Bandwidth achieved: {report['bandwidth_gb_per_s']:.2f} GB/s of weights{each}")
    print(f"Memory used: {report['memory_gb']:.2f} GB{most}")


def print_drafters(report: dict) -> None:
    """What each of several drafters did, and what a copy of weights takes."""
    if len(report["rounds"]) > 1:
        for name, counts in report["rounds"].items():
            print(f"{name}: {sum(counts)} rounds, {acceptance(counts)[1]:.2f} drafts accepted on average")
    if report["draft_copy_bytes"]:
        print(f"Copy that drafts: {report['draft_copy_bytes'] / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shard = start()
    args.device = shard.device(args.device)
    path = find_checkpoint(args, shard)
    check_outputs(args, path)
    model, tokenizer = load(path, args.device, args.precision, shard, not args.no_verify)
    ending = Ending.of(model, tokenizer, args.max_new_tokens, args.stop, args.stop_token_ids)
    text = read_prompt(args, shard)
    prompt = encode_prompt(tokenizer, text, args, model.config.context)
    draft_model = load_draft(args, path, tokenizer, shard)
    shard.gather(None)  # some may take much longer to load than others, and a collective waits only so long
    if "auto" in (args.early_exit, args.speculate_k):
        settle_auto(args, path, model, prompt, shard)
    rows = INTERACTIVE_ROWS if args.interactive else len(prompt) + args.max_new_tokens
    decoder = make_decoder(args, model, draft_model, rows)
    introduce(path, decoder, prompt, args, shard)
    compile_seconds = warm_up(decoder, prompt, args)
    if args.interactive:
        interact(decoder, tokenizer, args, ending, shard)
        return
    samples = run_samples(decoder, tokenizer, prompt, "" if args.chat else text, ending, args.num_samples)
    if args.profile:  # one more sample, which is not reported: profiling slows it
        with torch.profiler.profile() as profile:
            run_sample(decoder, tokenizer, prompt, ending)
        if shard.rank == 0:
            write_profile(profile, args.profile)
    report = make_report(samples, decoder, compile_seconds, args, shard)
    print_report(report, decoder.K > 0, shard)
    if args.json == "-":
        print(json.dumps(report))
    elif args.json and shard.rank == 0:
        write_json(args.json, report)


if __name__ == "__main__":
    run_command(main)
