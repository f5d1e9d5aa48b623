"""Generate text from a LayerSkip checkpoint, plainly or with self-speculative decoding, and say how fast and why.

The engine is `Decoder`: `for token in Decoder(model).generate(ids, 100): ...` yields tokens as they are accepted.
The command line below it is a thin user.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import kernels
import tune
from model import InputError, Transformer, check_device, check_writable, count_parameters, load_model
from tokenizer import Tokenizer
from tp import run_command, start

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
INTERACTIVE_ROWS = 8192  # what --interactive provides for, of contexts that may be far longer


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is argmax; top_k None and top_p 1 leave the distribution whole."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-4 <= self.temperature < torch.inf):  # below, float32 can't hold what logits become
            raise InputError(f"--temperature {self.temperature}: must be 0 (argmax), or 0.0001 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top_k {self.top_k}: must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: must be above 0 and at most 1")

    def distribution(self, logits: Tensor):
        """Probabilities (..., V), float32, that tokens are drawn from, given logits (..., V) of any dtype. temperature > 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kept = logits.topk(min(self.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)  # no more than k, where some are equal
        probs = logits.softmax(-1)
        if self.top_p < 1:
            ranked, order = probs.sort(descending=True, dim=-1)
            excess = ranked.cumsum(-1) - ranked >= self.top_p  # what ranks higher already has the mass
            probs = probs.masked_fill(excess.scatter(-1, order, excess), 0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


def draw(weights: Tensor, u: Tensor):
    """Draw an index (...,) from unnormalized weights (..., V) with uniform numbers u (...,) in [0, 1), by inverse CDF.

    In float64, so that the smallest probability that float32 holds is still drawn as often as it should be.
    """
    cdf = weights.double().cumsum(-1)
    return (cdf <= u[..., None] * cdf[..., -1:]).sum(-1).clamp(max=weights.shape[-1] - 1)


def accept(drafted: Tensor, draft_probs: Tensor | None, logits: Tensor, u: Tensor | None, sampling: Sampling):
    """The exact acceptance rule of speculative sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318).

    drafted: (K,) ids, each drawn from its row of draft_probs (K, V), the p below. logits: (K+1, V) of the target, whose
    distribution is q. u: (K+1,) uniform numbers. Token x is accepted with probability min(1, q(x) / p(x)); at the first
    rejection one is drawn from norm(max(q - p, 0)), and after K acceptances from q, so that what comes out is distributed
    as q. At temperature 0 both distributions are a point and the rule is equality with the argmax.

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


@dataclass
class Stats:
    """What one generation did. accept_counts[i] is the number of rounds that accepted exactly i.

    Times in seconds by the clock; decode_seconds, from the first token to the last round, includes what the caller did
    between tokens, as a GPU goes on meanwhile.
    """
    prompt_tokens: int
    accept_counts: list[int]
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self):
        """New tokens after the first over decoding time; 0 if there were none."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


class Decoder:
    """Decodes one sequence at a time, with or without speculation, in rounds of static shape.

    A round feeds the last emitted token, which has no cache row yet, and K drafted ones; it emits between 1 and K + 1
    tokens. Plain decoding is K = 0. With a drafter, K + 1 single passes come first:

    - self-speculation: layers [0, exit_layer) of the target; verification continues from their hidden states with
      layers [exit_layer, L) alone, so that no layer sees a position twice;
    - a separate draft model: all its layers; verification runs the whole target.

    The last of the K + 1 passes needs no head: it fills the row (and hidden state) that a fully accepted round needs.
    """

    def __init__(self, model: Transformer, *, exit_layer=None, draft_model: Transformer | None = None, k=4, draft_head="int8",
                 sampling=Sampling(), rows=None, compile=False, compile_prefill=False, seed=None):
        """rows: positions to provide for, prompt and new tokens together (default and most: the context).
        Decoders of one model share its caches, so one generation must end before the next begins.

        draft_head: "int8" drafts with a copy of the head rounded to int8, which reads a quarter or half of the bytes, where there are kernels for it;
        "full" with the head itself. What is emitted has the same distribution, and at temperature 0 is the same.
        k is ignored in plain decoding (neither exit_layer nor draft_model). Of a model split over several processes (tp.py), all must
        do the same with their decoders; the tokens are those of the first. Raises InputError for an exit layer or k out
        of range, or a draft model of another vocabulary.
        """
        config = model.config
        self.model, self.sampling = model, sampling
        self.exit_layer, self.shared = exit_layer, draft_model is None
        self.drafter = draft_model or (model if exit_layer is not None else None)
        self.K = k if self.drafter else 0
        if draft_model is not None and exit_layer is not None:
            raise InputError("self-speculation and a separate draft model exclude each other")
        if exit_layer is not None and not 1 <= exit_layer < config.n_layer:
            raise InputError(f"--early_exit {exit_layer}: the model has {config.n_layer} layers, so 1 to {config.n_layer - 1} can be drafted with")
        if self.drafter and not 1 <= k < kernels.MAX_ROWS:
            raise InputError(f"--speculate_k {k}: must be 1 to {kernels.MAX_ROWS - 1}")
        if draft_model is not None and draft_model.config.vocab_size != config.vocab_size:
            raise InputError(f"the draft model has {draft_model.config.vocab_size} tokens, the target {config.vocab_size}: they must share a tokenizer")
        self.models = [model] if self.shared else [model, draft_model]
        self.context = min(m.config.context for m in self.models)
        self.rows = min(rows or self.context, self.context)
        for m in self.models:
            m.setup_caches(self.rows + 2 * (self.K + 1))  # a round may run past the last wanted token, and one late past that
        coarse = self.drafter and draft_head == "int8" and not self.drafter.config.quantization  # a quantized head is int8 already
        with torch.no_grad():  # as decoding will be
            coarse = coarse and kernels.backend(self.drafter.head.weight, 1)  # without kernels int8 would be widened at every step
        self.draft_head = kernels.int8_rows(self.drafter.head.weight) if coarse else None  # (weight, scale)
        device = model.embed.weight.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton and graphs work on the current one
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)  # the last emitted token
        self.pos = torch.zeros(1, dtype=torch.long, device=device)  # its position
        self.offsets = torch.arange(self.K + 1, device=device)
        self.random = torch.Generator(device)
        self.random.manual_seed(seed) if seed is not None else self.random.seed()
        if model.shard:
            self.random.manual_seed(model.shard.share(self.random.initial_seed()))
        self.stats = None  # of the last generation
        self.propose, self.verify, self.prefill = self._propose, self._verify, self._prefill
        if compile:  # each decoder compiles the same two functions for its own model, exit layer and k
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            self.propose, self.verify = (torch.compile(f, fullgraph=True, dynamic=False) for f in (self._propose, self._verify))
        if compile_prefill:
            self.prefill = torch.compile(self._prefill, fullgraph=True, dynamic=True)
        self.late = int(device.type == "cuda")  # rounds in flight while the host reads an earlier one
        self.graphed = compile and device.type == "cuda"
        self.graph = None  # (CUDA graph of a round, its result (K+2,), the caches it was recorded with)

    def uniform(self, count):
        """Random numbers (count,) for one round; float64, as `draw` wants them. None at temperature 0."""
        if self.sampling.temperature == 0:
            return None
        return torch.rand(count, dtype=torch.float64, device=self.pos.device, generator=self.random)

    def choose(self, logits, u):
        """The next token (1, 1) for logits (1, V) and u (1,), and the probabilities (1, V) it was drawn from."""
        if self.sampling.temperature == 0:
            return self.agree(logits.argmax(-1, keepdim=True)), None
        probs = self.sampling.distribution(logits)
        return self.agree(draw(probs, u)[:, None]), probs

    def agree(self, tokens):
        """What the first of the processes chose."""
        return kernels.broadcast(tokens, self.model.shard) if self.model.shard else tokens

    def _prefill(self, prompt, u):
        """Fill the caches from the prompt (1, T) and return the first token (1, 1)."""
        if self.drafter and not self.shared:
            self.drafter(prompt)
        return self.choose(self.model.logits(self.model(prompt)[:, -1]), u)[0]

    def draft_logits(self, h):
        """What drafting chooses from: logits (..., V) for hidden states h (..., D) of an exit."""
        if self.draft_head:
            return self.drafter.head.combine(kernels.linear(self.drafter.norm(h), *self.draft_head))
        return self.drafter.logits(h)

    def _propose(self, token, pos, u):
        """One drafting step: (hidden (1, 1, D), next token (1, 1), its distribution (1, V))."""
        hidden = self.drafter(token, pos, 0, self.exit_layer)
        return hidden, *self.choose(self.draft_logits(hidden[:, -1]), u)

    def _verify(self, tokens, hidden, probs, pos, u):
        """The pass that decides: tokens (1, K+1) from position pos (1,) on, hidden and probs from K drafting steps.

        Moves `token` and `pos` on. Returns (K+2,): the K + 1 tokens of `accept`, then the number accepted.
        """
        if self.drafter:
            hidden = [*hidden, self.drafter(tokens[:, -1:], pos + self.K, 0, self.exit_layer)]
        if self.drafter and self.shared:
            x, start = torch.cat(hidden, dim=1), self.exit_layer
        else:
            x, start = tokens, 0
        logits = self.model.logits(self.model(x, pos + self.offsets, start)[0])  # (K+1, V)
        p = torch.cat(probs) if probs and probs[0] is not None else logits.new_zeros(0, logits.shape[-1])
        result = self.agree(torch.cat(accept(tokens[0, 1:], p, logits, u, self.sampling)))  # (K+2,)
        n = result[-1:]
        self.token.copy_(result.index_select(0, n)[None])
        self.pos.add_(n + 1)
        return result

    def round(self, on_draft=None):
        """Draft K tokens and verify them, without asking the device for anything. Returns (K+2,) as `_verify` does."""
        K, u = self.K, self.uniform(2 * self.K + 1)
        tokens, hidden, probs = [self.token], [], []
        for i in range(K):
            h, token, p = self.propose(tokens[-1], self.pos + i, None if u is None else u[i:i + 1])
            tokens.append(token), hidden.append(h), probs.append(p)
        tokens = torch.cat(tokens, dim=1)
        if on_draft and K:
            on_draft(tokens[0, 1:].tolist())
        return self.verify(tokens, hidden, probs, self.pos, None if u is None else u[K:])

    def record(self):
        """Record a round as one CUDA graph, unless that is done and the caches are where they were."""
        caches = [m.layers[0].attention.k_cache for m in self.models]
        if self.graph and all(a is b for a, b in zip(self.graph[2], caches)):
            return
        random = self.random.get_state()
        side = torch.cuda.Stream(self.pos.device)
        side.wait_stream(torch.cuda.current_stream(self.pos.device))
        with torch.cuda.stream(side):
            self.token.zero_(), self.pos.zero_()  # what these rounds write, the prompt overwrites
            for _ in range(2):  # compiles, tunes and allocates
                self.round()
        torch.cuda.current_stream(self.pos.device).wait_stream(side)
        self.random.set_state(random)  # the same seed draws the same tokens without a graph
        graph = torch.cuda.CUDAGraph()
        if self.sampling.temperature > 0:
            graph.register_generator_state(self.random)  # each replay draws new numbers
        with torch.cuda.graph(graph):
            out = self.round()
        self.graph = graph, out, caches

    def launch(self, on_draft=None):
        """Start a round. Returns a function that waits until it is done and gives `_verify`'s result as a list."""
        if self.graphed and not on_draft:
            graph, out, _ = self.graph
            graph.replay()
        else:
            out = self.round(on_draft)
        if out.device.type != "cuda":
            return out.tolist
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), host.tolist())[1]

    @torch.inference_mode()
    def generate(self, prompt, max_new_tokens, eos_ids=(), on_draft=None):
        """Yield up to max_new_tokens new ids, as they are accepted, stopping after any of eos_ids.

        prompt: a list of 1 to `rows` ids. No position at or beyond `rows` decides anything: a prompt that fills them
        yields one token. on_draft, if given, is called with the drafted ids before each verification. `stats` describes
        the generation so far. Raises InputError for an empty prompt or one that is too long.
        """
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if len(prompt) > self.rows:
            raise InputError(f"the prompt has {len(prompt)} tokens, but there is room for {self.rows} (the model's context is {self.context})")
        limit = min(max_new_tokens, self.rows - len(prompt) + 1)
        stats = self.stats = Stats(len(prompt), [0] * (self.K + 1))
        if limit < 1:
            return
        if self.graphed:
            self.record()
        began = time.perf_counter()
        self.token.copy_(self.prefill(torch.tensor([prompt], device=self.pos.device), self.uniform(1)))
        self.pos.fill_(len(prompt))
        out = [self.token.item()]
        stats.prefill_seconds = time.perf_counter() - began
        began = time.perf_counter()
        late, pending = 0 if on_draft else self.late, deque()  # rounds started and not read
        while True:
            for token in out:
                stats.tokens.append(token)
                yield token
                if token in eos_ids or len(stats.tokens) == limit:
                    return  # what is still in flight is never read, and neither its tokens nor its counts are seen
            while len(pending) <= late and len(stats.tokens) + len(pending) < limit:  # each round in flight brings a token or more
                pending.append(self.launch(on_draft))
            *out, accepted = pending.popleft()()  # the one place where the host waits
            stats.decode_seconds = time.perf_counter() - began
            stats.accept_counts[accepted] += 1
            out = out[:accepted + 1]

    # The byte model: decoding reads every weight once a pass, so bytes are the currency.

    def bytes_per_round(self):
        """Bytes of weights that this process reads in one round: K drafting steps, and one full pass (two models: two)."""
        full = span_bytes(self.model, 0, None)
        if not self.drafter:
            return full
        layers = span_bytes(self.drafter, 0, self.exit_layer) - total_bytes(self.drafter.head)
        head = sum(t.nbytes for t in self.draft_head) if self.draft_head else total_bytes(self.drafter.head)
        return self.K * (layers + head) + full + (0 if self.shared else layers)

    def ideal_speedup(self, mean_accepted):
        """Speed over plain decoding if time were bytes: (1 + mean accepted) / (K d + 1), d a drafting step's share of a pass."""
        return (1 + mean_accepted) * span_bytes(self.model, 0, None) / self.bytes_per_round()


def span_bytes(model, start, stop):
    """Bytes of weights read by layers [start, stop) and the head for one token."""
    return sum(map(total_bytes, [*model.layers[start:stop], model.norm, model.head]))


def total_bytes(module):
    """Bytes of a module's weights with their scales; the caches are not among them."""
    return sum(t.nbytes for t in module.state_dict().values())


def acceptance(counts):
    """(acceptance probabilities, mean accepted) of accept counts; ([], 0) if there was no round."""
    rounds = sum(counts)
    return ([c / rounds for c in counts], sum(i * c for i, c in enumerate(counts)) / rounds) if rounds else ([], 0.0)


def peak_memory_gb(device):
    """Peak memory of this process in 1e9 bytes: allocated on the GPU, or resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Text:
    """Turns a stream of ids into text: `push(id)` returns the text that has become certain, `flush` the rest.

    Holds back what a following id could still change: half a character, or the beginning of a stop string. After a stop
    string `stopped` is true, and the text ends before it. Each id costs the same, however long the text is.
    """

    def __init__(self, tokenizer, prompt=(), stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = list(prompt[-4:])  # what is decoded together with new ids: how a token reads can depend on what precedes it
        self.known = len(self.ids)  # of these, those whose text has been taken
        self.held, self.stopped = "", False

    def push(self, token):
        self.ids.append(token)
        new = self._new()
        if new.endswith("\ufffd"):
            return ""
        self.ids, self.known = self.ids[self.known:], len(self.ids) - self.known
        self.held += new
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        self.stopped = bool(found)
        beginning = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        certain = min(found, default=len(self.held) - beginning)
        text, self.held = self.held[:certain], self.held[certain:]
        return text

    def flush(self):
        return "" if self.stopped else self.held + self._new()

    def _new(self):
        """The text of the ids that are not known yet."""
        return self.tokenizer.decode(self.ids)[len(self.tokenizer.decode(self.ids[:self.known])):]


class DraftDisplay:
    """Prints a stream of text and, dimmed behind it, the current draft, which the next text overwrites."""

    def __init__(self, tokenizer, colour):
        self.tokenizer, self.colour, self.column, self.drawn = tokenizer, colour, 0, 0

    def draft(self, ids):
        if not self.colour:
            return
        room = shutil.get_terminal_size().columns - 1 - self.column % shutil.get_terminal_size().columns
        text = self.tokenizer.decode(ids).replace("\n", "⏎").replace("\t", " ")[:max(room, 0)]
        print(f"\033[2m{text}\033[0m", end="", flush=True)
        self.drawn = len(text)

    def text(self, text):
        if self.drawn:
            print(f"\033[{self.drawn}D\033[K", end="")
            self.drawn = 0
        print(text, end="", flush=True)
        self.column = len(text) - text.rfind("\n") - 1 + (0 if "\n" in text else self.column)


def encode(tokenizer, config, text):
    """Prompt ids: BOS, where the checkpoint has one, and the text. Raises InputError if it isn't valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8") from None
    return [config.bos_id] * (config.bos_id is not None) + tokenizer.encode(text)


def find_checkpoint(args, shard):
    """The path of model.pth that the arguments name; `--model REPO` (or a local folder) is prepared by the first process if it isn't there."""
    if not args.model:
        return args.checkpoint_path or CHECKPOINTS / "demo" / "model.pth"
    folder = Path(args.model) if Path(args.model).is_dir() else CHECKPOINTS / args.model
    if shard.rank == 0 and not (folder / "model.pth").is_file():
        script = CHECKPOINTS.parent / "scripts" / "prepare.sh"
        if subprocess.run(["bash", script, args.model], env={**os.environ, "PYTHON": sys.executable}).returncode:
            sys.exit(1)  # it has said why
    shard.gather(None)
    return folder / "model.pth"


def load(path, device, precision, shard=None):
    """(model, tokenizer) of a checkpoint file. precision None: bfloat16 on CUDA, float32 on the CPU. shard: as in `load_model`."""
    path = Path(path)
    check_device(device)
    if precision is None:
        precision = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    model = load_model(path, device, getattr(torch, precision), shard)
    tokenizer = Tokenizer.load(path.parent)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{path.parent}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}: they don't belong together")
    return model, tokenizer


def int_or_auto(text):
    return text if text == "auto" else int(text)


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Generate text from a LayerSkip checkpoint, plainly or with self-speculative decoding. "
                    "Without arguments: the demo checkpoint that comes with this repository.",
        epilog="Where an option has two names, they are gpt-fast's and the LayerSkip repository's.")
    g = p.add_argument_group("what to run")
    g.add_argument("--checkpoint_path", type=Path, help="model.pth of a prepared checkpoint (default: checkpoints/demo/model.pth)")
    g.add_argument("--model", metavar="REPO", help="checkpoints/REPO/model.pth, downloaded and converted first if it isn't there")
    g.add_argument("--prompt", default="class Stack:\n    def __init__(self):\n", help="text to continue (default: the beginning of a Python class)")
    g.add_argument("--interactive", action="store_true", help="read prompts from the terminal and stream the answers; drafted tokens appear dimmed until they are verified")
    g.add_argument("--num_samples", type=int, default=5, help="how often to continue the prompt (default: %(default)s)")
    g.add_argument("--max_new_tokens", "--max_steps", type=int, default=200, help="per sample (default: %(default)s)")
    g.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end a sample before the first of these strings")
    g = p.add_argument_group("sampling")
    g.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default: %(default)s)")
    g.add_argument("--top_k", type=int, help="draw from the k most likely tokens only (default: all)")
    g.add_argument("--top_p", type=float, default=1.0, help="draw from the most likely tokens that together have this probability (default: %(default)s)")
    g.add_argument("--seed", type=int, default=1234, help="same seed, same text (default: %(default)s)")
    g = p.add_argument_group("speculation", "The text's distribution is that of plain decoding, whatever is set here.")
    g.add_argument("--self_speculative", action="store_true", help="draft with the first layers of the model itself")
    g.add_argument("--generation_strategy", choices=["autoregressive", "self_speculative"], help="the LayerSkip repository's spelling of --self_speculative")
    g.add_argument("--early_exit", "--exit_layer", type=int_or_auto, metavar="E", help="draft with this many layers (default: a quarter of them); auto: see below")
    g.add_argument("--speculate_k", "--num_speculations", type=int_or_auto, default=4, metavar="K", help="draft this many tokens per round (default: %(default)s); "
                   "auto for both takes the fastest that scripts/sweep.py has stored with the checkpoint, or else, as for one alone, a short calibration's; that may be plain decoding")
    g.add_argument("--draft_head", choices=["int8", "full"], default="int8", help="draft with a copy of the output head in int8, or with the head itself (default: %(default)s)")
    g.add_argument("--draft_checkpoint_path", type=Path, help="draft with this separate, smaller checkpoint instead")
    g = p.add_argument_group("how to run")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 (default here: %(default)s)")
    g.add_argument("--precision", choices=["bfloat16", "float16", "float32"], help="of the weights (default: bfloat16 on CUDA, float32 on the CPU)")
    g.add_argument("--compile", action="store_true", help="compile decoding")
    g.add_argument("--compile_prefill", action="store_true", help="compile the prompt's pass too")
    g.add_argument("--profile", type=Path, metavar="FILE", help="write a trace of one more sample, for chrome://tracing or Perfetto")
    g.add_argument("--json", metavar="FILE", help="write everything measured as one JSON object; - means the last line of the output")
    args = p.parse_args(argv)
    args.self_speculative |= args.generation_strategy == "self_speculative"
    if args.self_speculative and args.generation_strategy == "autoregressive":
        raise InputError("--self_speculative and --generation_strategy autoregressive contradict each other")
    for name in ("model", "checkpoint_path", "draft_checkpoint_path", "json", "profile"):
        if str(getattr(args, name)) in ("", "."):  # an empty shell variable
            raise InputError(f"--{name}: is empty")
    if args.model and args.checkpoint_path:
        raise InputError("--model and --checkpoint_path both name a checkpoint: give one")
    if not args.self_speculative and (args.early_exit is not None or args.speculate_k == "auto"):
        raise InputError(f"--{'speculate_k auto' if args.early_exit is None else 'early_exit'} is for --self_speculative: give both")
    if args.draft_checkpoint_path and "auto" in (args.early_exit, args.speculate_k):
        raise InputError("auto chooses between layers of the model itself: leave out --draft_checkpoint_path")
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if "" in args.stop:
        raise InputError("--stop: an empty string would end every sample before it begins")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be 0 to 2^63 - 1")
    for option, path in (("--json", args.json), ("--profile", args.profile)):
        if path and path != "-":
            check_writable(option, path)
    if args.interactive and (args.json or args.profile):
        raise InputError("--interactive writes no --json and no --profile: leave them out")
    return args


def make_decoder(args, model, draft_model, rows):
    exit_layer = None
    if args.self_speculative:
        exit_layer = model.config.default_exit if args.early_exit is None else args.early_exit
    return Decoder(
        model, exit_layer=exit_layer, draft_model=draft_model, k=args.speculate_k, draft_head=args.draft_head,
        sampling=Sampling(args.temperature, args.top_k, args.top_p), rows=rows, compile=args.compile, compile_prefill=args.compile_prefill, seed=args.seed)


def settle_auto(args, path, model, prompt, shard):
    """Replace auto in the arguments by the fastest exit layer and draft length; by plain decoding if that is faster. Says which, and how it knows.
    What the first process measures is what all take."""
    exits, ks = (None if value == "auto" else value for value in (model.config.default_exit if args.early_exit is None else args.early_exit, args.speculate_k))

    def build(exit_layer, k, rows):
        own = argparse.Namespace(**{**vars(args), "self_speculative": exit_layer is not None, "early_exit": exit_layer, "speculate_k": k})
        return make_decoder(own, model, None, rows)

    key = tune.key(model, args.compile, args.temperature)
    stored = shard.share(tune.stored(path, key) if exits is ks is None else None)
    exit_layer, k, why = stored or shard.share(tune.calibrate(build, model, prompt, exits, ks))
    args.self_speculative, args.early_exit, args.speculate_k = exit_layer is not None, exit_layer, k
    print(f"auto: {f'--early_exit {exit_layer} --speculate_k {k}' if args.self_speculative else 'plain decoding, which no draft beats'} ({why})")


def run_sample(decoder, tokenizer, prompt, args, show=None, on_draft=None):
    """One continuation of the prompt ids: its text without the prompt. `show` is called with each new piece of it."""
    text, pieces = Text(tokenizer, prompt, args.stop), []
    for token in decoder.generate(prompt, args.max_new_tokens, decoder.model.config.eos_ids, on_draft):
        pieces.append(text.push(token))
        if show:
            show(pieces[-1])
        if text.stopped:
            break
    pieces.append(text.flush())
    if show:
        show(pieces[-1])
    return "".join(pieces)


def describe(decoder, stats):
    rate = f"{stats.tokens_per_second:.2f} tokens/sec" if len(stats.tokens) > 1 else "no decoding step"
    return f"{stats.prefill_seconds:.3f} s prefill of {stats.prompt_tokens} tokens, {stats.decode_seconds:.2f} s decoding, {len(stats.tokens)} tokens, {rate}"


def interact(decoder, tokenizer, args, shard):
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    display = DraftDisplay(tokenizer, shard.share(colour))
    print("Type a prompt; Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            line = input("> ") if shard.rank == 0 else None
        except EOFError:
            line = None
        line = shard.share(line)
        if line is None:
            print()
            return
        try:
            prompt = encode(tokenizer, decoder.model.config, line)
            run_sample(decoder, tokenizer, prompt, args, display.text, display.draft if display.colour else None)
        except InputError as error:  # one bad prompt doesn't end the conversation
            print(f"error: {error}")
            continue
        except KeyboardInterrupt:
            pass
        display.text("\n")
        stats = decoder.stats
        accepted = f", {acceptance(stats.accept_counts)[1]:.2f} of {decoder.K} drafted tokens accepted" if decoder.K else ""
        print(f"[{describe(decoder, stats)}{accepted}]")


def main(argv=None):
    args = parse_args(argv)
    shard = start()
    args.device = shard.device(args.device)
    path = find_checkpoint(args, shard)
    model, tokenizer = load(path, args.device, args.precision, shard)
    draft_model, prompt = None, encode(tokenizer, model.config, args.prompt)
    if args.draft_checkpoint_path:
        draft_model, draft_tokenizer = load(args.draft_checkpoint_path, args.device, args.precision, shard)
        if draft_tokenizer.encode(args.prompt) != tokenizer.encode(args.prompt):
            raise InputError(f"--draft_checkpoint_path {args.draft_checkpoint_path}: its tokenizer reads the prompt differently from that of {path}: they must share one")
    shard.gather(None)  # some may take much longer to load than others, and a collective waits only so long
    if "auto" in (args.early_exit, args.speculate_k):
        settle_auto(args, path, model, prompt, shard)
    decoder = make_decoder(args, model, draft_model, INTERACTIVE_ROWS if args.interactive else len(prompt) + args.max_new_tokens)
    print(f"{path}: {count_parameters(model.config) / 1e6:.1f}M parameters, {model.config.n_layer} layers, {model.config.quantization or str(model.embed.weight.dtype)[6:]} on {args.device}"
          + (f", {shard.size} processes" if shard.size > 1 else ""))

    with torch.inference_mode():
        if model.config.quantization and not kernels.backend(model.embed.weight, 1):
            print("note: there are no kernels for quantized weights here: they are widened for every token, which is slower than float weights")
    room = decoder.rows - len(prompt) + 1
    if 0 < room < args.max_new_tokens and not args.interactive:
        print(f"note: the context of {decoder.context} positions leaves room for {room} new tokens")

    compile_seconds = 0.0
    if args.compile or args.compile_prefill:
        began = time.perf_counter()
        for _ in decoder.generate(prompt, 3 * (decoder.K + 1)):
            pass
        compile_seconds = time.perf_counter() - began
        print(f"Compilation time: {compile_seconds:.2f} seconds")
        decoder.random.manual_seed(args.seed)
    if args.interactive:
        return interact(decoder, tokenizer, args, shard)

    samples = []
    for i in range(args.num_samples):
        text = run_sample(decoder, tokenizer, prompt, args)
        s = decoder.stats
        print(f"{args.prompt}{text}\nTime for inference {i + 1}: {describe(decoder, s)}\n")
        samples.append(dict(prompt_tokens=s.prompt_tokens, tokens=s.tokens, text=text, prefill_seconds=s.prefill_seconds,
                            decode_seconds=s.decode_seconds, tokens_per_second=s.tokens_per_second, accept_counts=s.accept_counts))

    if args.profile:  # one more sample, which is not reported: profiling slows it
        with torch.profiler.profile() as profile:
            run_sample(decoder, tokenizer, prompt, args)
        if shard.rank == 0:
            profile.export_chrome_trace(str(args.profile))

    rates = [s["tokens_per_second"] for s in samples]
    counts = [sum(c) for c in zip(*(s["accept_counts"] for s in samples))]
    probs, mean_accepted = acceptance(counts)
    decode_seconds = sum(s["decode_seconds"] for s in samples)
    report = dict(
        samples=samples, tokens_per_second=statistics.median(rates), acceptance_probs=probs, mean_accepted=mean_accepted,
        memory_gb=max(shard.gather(peak_memory_gb(args.device))),
        bandwidth_gb_per_s=sum(counts) * decoder.bytes_per_round() / decode_seconds / 1e9 if decode_seconds else 0.0,
        ideal_speedup=decoder.ideal_speedup(mean_accepted), compile_seconds=compile_seconds,
        settings={**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "exit_layer": decoder.exit_layer,
                  "processes": shard.size, "torch": torch.__version__})
    print("=" * 10)
    print({"tokens_per_sec": rates, "accept_counts": [s["accept_counts"] for s in samples]})
    if decoder.K:
        print(f"Acceptance probs: {probs}\nMean Accepted: {mean_accepted}")
        print(f"Ideal speedup for these acceptances: {report['ideal_speedup']:.2f}x (if time were bytes of weights)")
    print(f"Average tokens/sec: {statistics.mean(rates):.2f} (median {report['tokens_per_second']:.2f})")
    each = " by each process" if shard.size > 1 else ""
    print(f"Bandwidth achieved: {report['bandwidth_gb_per_s']:.2f} GB/s of weights{each}")
    print(f"Memory used: {report['memory_gb']:.2f} GB{each and each + ' at most'}")
    if args.json == "-":
        print(json.dumps(report))
    elif args.json and shard.rank == 0:
        Path(args.json).write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    run_command(main)
