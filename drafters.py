"""Who proposes the tokens of a round, and what the target's verification of them starts from.

The loop in generate.py knows the protocol of `Drafter` and nothing else. What is emitted has the target's distribution
whoever drafts, because acceptance goes by the probabilities that the drafts were really drawn from.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from command import InputError
from model import ExitAdapter, Linear, Transformer, natives

LONGEST_PAUSE = 31  # rounds that n-gram drafts stay away while they are wrong
SMALLER: dict[str | None, list[str]] = {None: ["int8", "int4"], "int8": ["int4"], "int4": []}  # what can be rounded to

Step = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class Drafter:
    """Proposes nothing: plain decoding. Also the protocol, of which other drafters override what differs.

    Cache rows: the last emitted token has none yet, and is the first thing that a round feeds. After a round every
    model that drafts must have rows for the k + 1 positions it covered, or a fully accepted round leaves a row that
    was never written, and later queries read it. Rejected tokens cost nothing: the position moves back, and their
    rows are overwritten before anything sees them.

    Attributes: name, for reports; k, the tokens drafted in a round; models, all whose caches a round fills, adapters
    among them; vocab_size, the ids that can be drafted; exit_layer, for reports (None: drafts don't come from an exit
    of the target); reads_text, whether `pick` must know the whole text so far (a GPU then waits for the host between
    rounds).
    """

    name = "plain"
    exit_layer: int | None = None
    reads_text = False
    models: list[Any]

    def __init__(self, target: Transformer, k: int = 0):
        self.target, self.k = target, k
        self.models = [target]
        self.vocab_size = target.config.vocab_size

    # What the host asks, between rounds.

    def members(self) -> "list[Drafter]":
        """All that `pick` may return."""
        return [self]

    def begin(self, prompt: list[int]) -> None:
        """A text begins with these ids."""

    def observe(self, tokens: list[int]) -> None:
        """The text goes on with these ids: those of the prompt's pass or of a round."""

    def pick(self) -> "Drafter":
        """Who drafts the next round."""
        return self

    # What a round computes, in static shapes.

    def fill(self, tokens: Tensor, pos: Tensor | None) -> tuple[Tensor, int]:
        """Fill caches of the drafter's own from tokens (1, T) of the text at positions pos (T,); None: from 0 on.

        Returns what the target's pass over these tokens starts from: (x, start) as `Transformer.forward` has them.
        """
        return tokens, 0

    def step(self, token: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """One drafting step from token (1, 1) at pos (1,): (what `verify_from` needs of it, logits (1, V))."""
        raise NotImplementedError

    def draft(self, step: Step, token: Tensor, pos: Tensor, u: Tensor | None) -> tuple[Tensor, list, list]:
        """Propose k tokens behind token (1, 1) at pos (1,). u: uniform numbers (k,), None for the most likely tokens.

        step: the loop's (token, pos, u (1,)) -> (state, next token (1, 1), its distribution (1, V) or None), which
        calls `step` above and draws from its logits. Returns the token and the proposed ones (1, k + 1), the states,
        and the distributions that they were drawn from, which sampling needs of every drafter.
        """
        tokens, states, probs = [token], [], []
        for i in range(self.k):
            state, token, p = step(token, pos + i, None if u is None else u[i : i + 1])
            tokens.append(token)
            states.append(state)
            probs.append(p)
        return torch.cat(tokens, dim=1), states, probs

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        """What the target's pass over tokens (1, k + 1) at positions pos (k + 1,) starts from, as `fill` has it. Here
        the last of the positions also gets its row in the drafter's caches.
        """
        return self.fill(tokens, pos)

    def bytes_per_round(self) -> int:
        """Bytes of weights that drafting reads in a round, beside the target's own pass over all of its weights."""
        return 0

    def fill_bytes(self) -> int:
        """Bytes of weights that `fill` reads, beside the target's own pass."""
        return 0

    def extra_bytes(self) -> int:
        """Bytes of memory that the drafter's own copies of weights take."""
        return 0


class ModelDrafter(Drafter):
    """A separate, smaller model that shares the target's tokenizer. If one of the two has more ids (padding, or tokens
    added later), those are never drafted.

    head: "int8" chooses drafts with a copy of the head rounded to int8, which reads a half or a quarter of the bytes,
    where there are kernels for it; "full" with the head itself.
    """

    name = "draft model"

    def __init__(self, target: Transformer, draft: Transformer, k: int, head: str = "int8"):
        super().__init__(target, k)
        check_length("speculate_k", k)
        self.model = draft
        self.layers: Any = draft.layers  # those that draft
        self.models = [target] if draft is target else [target, draft]
        self.vocab_size = min(target.config.vocab_size, draft.config.vocab_size)
        self.norm = draft.norm
        self.head: Linear = draft.head
        if head == "int8" and can_round_head(draft):
            self.head = draft.rounded_head

    def known(self, tokens: Tensor) -> Tensor:
        """The tokens as the draft model can be fed them: where it lacks one, another stands in for it."""
        if self.vocab_size == self.target.config.vocab_size:
            return tokens
        return tokens.clamp(max=self.vocab_size - 1)

    def fill(self, tokens: Tensor, pos: Tensor | None) -> tuple[Tensor, int]:
        self.model(self.known(tokens), pos)
        return tokens, 0

    def step(self, token: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.run(self.layers, self.known(token), pos)
        return hidden, self.logits(hidden[:, -1])

    def draft(self, step: Step, token: Tensor, pos: Tensor, u: Tensor | None) -> tuple[Tensor, list, list]:
        """The most likely tokens are drafted in one operation of the CPU's kernels, where these are there."""
        model, head = self.model, self.head
        if u is not None or model.shard or kernels.backend(model.embed.weight, 1) != "cpu":
            return super().draft(step, token, pos, u)
        drafted, states = torch.ops.layerskip.draft(
            self.known(token), pos, self.k, model.inv_freq, model.embed.weight, natives(self.layers),
            self.norm.weight, head.weight, head.scale, head.zero, self.vocab_size, model.config.norm_eps,
        )  # fmt: skip
        return torch.cat((token, drafted), dim=1), [states], []

    def logits(self, h: Tensor) -> Tensor:
        """What drafts are chosen from: logits (..., V) for hidden states h (..., D)."""
        return self.head(self.norm(h))[..., : self.vocab_size]

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        self.model(self.known(tokens[:, -1:]), pos[-1:])  # the row that a fully accepted round needs
        return tokens, 0

    def step_bytes(self) -> tuple[int, int]:
        """Bytes of weights that one step reads: (those of its layers and norm, those of its head)."""
        return weight_bytes(*self.layers, self.norm), weight_bytes(self.head)

    def bytes_per_round(self) -> int:
        return self.k * sum(self.step_bytes()) + self.fill_bytes()

    def fill_bytes(self) -> int:
        return self.step_bytes()[0]

    def extra_bytes(self) -> int:
        return 0 if self.head is self.model.head else weight_bytes(self.head)


class SelfDrafter(ModelDrafter):
    """The target's own layers [0, exit_layer) and its head. Verification goes on from their hidden states with the
    layers that follow, so that no layer sees a position twice.

    Where the exit has an adapter, drafts come through its norm, and through its block if it has one. Verification then
    runs the first layers anew, and writes the block's cache rows from what comes out.
    """

    name = "self"
    exit_layer: int
    precision = "same"

    def __init__(self, target: Transformer, exit_layer: int, k: int, head: str = "int8"):
        check_exit(exit_layer, target.config.n_layer, self.precision)
        super().__init__(target, target, k, head)
        self.take(exit_layer)

    def take(self, exit_layer: int) -> None:
        """Draft from this exit."""
        target = self.target
        self.exit_layer = exit_layer
        self.norm, self.block, self.models = target.norm, [], [target]
        adapter = target.adapters.get(exit_layer)
        if adapter:
            self.norm = adapter.norm
            if adapter.layers:
                self.block = [self.block_of(adapter)]
                self.models = [target, adapter]
        self.layers = [*self.first_layers(), *self.block]

    def at(self, exit_layer: int) -> "SelfDrafter":
        """The same drafter from another exit."""
        other = copy(self)
        other.take(exit_layer)
        return other

    def text_logits(self, hidden: Tensor, first: int) -> Tensor:
        """Logits (T - first, V) that drafts would be chosen from behind each position from `first` on of a text, for
        the hidden states (1, T, D) that come out of the first layers.
        """
        for model in self.models[1:]:
            model.setup_caches(hidden.shape[1])
            model.cached_ids = []  # these rows aren't those of the target's hidden states if a copy drafts
        return self.logits(self.model.run(self.block, hidden, None)[0, first:])

    def first_layers(self) -> list[Any]:
        """What drafts in the place of the target's layers [0, exit_layer)."""
        return list(self.target.layers[: self.exit_layer])

    def block_of(self, adapter: ExitAdapter) -> Any:
        """The adapter's block, in the precision of the layers that draft."""
        precision = self.target.config.quantization if self.precision == "same" else self.precision
        return adapter.rounded_block(precision) if precision else adapter.layers[0]

    def fill(self, tokens: Tensor, pos: Tensor | None) -> tuple[Tensor, int]:
        if not self.block:
            return tokens, 0  # the target's own pass fills all rows
        hidden = self.target(tokens, pos, 0, self.exit_layer)
        self.target.run(self.block, hidden, pos)
        return hidden, self.exit_layer

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        if self.block:
            return self.fill(tokens, pos)
        last = self.target(tokens[:, -1:], pos[-1:], 0, self.exit_layer)
        return torch.cat((*states, last), dim=1), self.exit_layer

    def fill_bytes(self) -> int:
        return weight_bytes(*self.block)  # what the first layers read, the target's own pass would have read

    def extra_bytes(self) -> int:
        copies = [block for block in self.block if block.ffn.w2.scale is not None]
        return super().extra_bytes() + weight_bytes(*copies)


class QuantizedDrafter(SelfDrafter):
    """A copy of the target's layers [0, exit_layer), up to all of them, in int8 or int4.

    It reads less, so that any Llama can draft for itself. The copy writes the target's own cache rows. Verification,
    which runs all layers over the whole round, writes them again: so the copy needs no caches and no prompt, and the
    rows before a round are the target's own.
    """

    def __init__(self, target: Transformer, exit_layer: int, k: int, precision: str, head: str = "int8"):
        """precision: "int8" or "int4". Raises InputError unless the target's own weights take more bytes."""
        check_precision(precision, target.config.quantization)
        self.name, self.precision = f"self {precision}", precision
        super().__init__(target, exit_layer, k, head)

    def first_layers(self) -> list[Any]:
        return self.target.rounded_layers(self.exit_layer, self.precision)

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        return self.fill(tokens, pos)  # and not from the copy's own states

    def extra_bytes(self) -> int:
        return super().extra_bytes() + weight_bytes(*self.first_layers())


class NgramDrafter(Drafter):
    """Drafts what followed the last occurrence of the text's last few tokens, if they occurred (prompt lookup).

    If they did not, or while its drafts are wrong, another drafter drafts. Each draft is certain: its distribution is a
    point. So sampling stays exact.
    """

    name = "n-gram"
    reads_text = True

    def __init__(self, otherwise: Drafter, k: int, longest: int = 3):
        """otherwise: who drafts where this one finds nothing; longest: the most tokens that are looked up."""
        super().__init__(otherwise.target, k)
        check_length("ngram_k", k)
        if longest < 1:
            raise InputError(f"--ngram_max {longest}: must be 1 or more")
        self.otherwise = otherwise
        self.models, self.exit_layer = otherwise.models, otherwise.exit_layer
        shortest = 1 if otherwise.k == 0 else min(2, longest)  # one token alone is right less often than a model is
        self.lengths = range(longest, shortest - 1, -1)
        self.found = torch.zeros(1, k, dtype=torch.long, device=self.target.embed.weight.device)
        self.begin([])

    def members(self) -> list[Drafter]:
        return [self, *self.otherwise.members()]

    def begin(self, prompt: list[int]) -> None:
        self.text: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> where the text went on after its last occurrence
        self.misses = 0  # rounds in a row of which nothing was accepted
        self.pause = 0  # rounds left to the other drafter
        self.drafting = False  # whether the last round was this one's
        self.observe(prompt)

    def observe(self, tokens: list[int]) -> None:
        if self.drafting:
            self.learn(len(tokens) - 1)
        for token in tokens:
            for n in self.lengths:
                if len(self.text) >= n:
                    self.follows[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def learn(self, accepted: int) -> None:
        """Pause after a miss, and after each further one in a row for twice as long."""
        self.misses = 0 if accepted else self.misses + 1
        self.pause = min(2**self.misses - 1, LONGEST_PAUSE)

    def pick(self) -> Drafter:
        start = None if self.pause else self.look_up()
        self.pause = max(self.pause - 1, 0)
        self.drafting = start is not None
        if start is None:
            return self.otherwise.pick()
        draft = self.text[start : start + self.k]
        while len(draft) < self.k:  # where the text ends it goes on with the draft itself
            draft += draft[: self.k - len(draft)]
        self.found.copy_(torch.tensor([draft]))
        return self

    def look_up(self) -> int | None:
        """Where the text went on after the last earlier occurrence of its last tokens, as many as possible."""
        for n in self.lengths:
            start = self.follows.get(tuple(self.text[-n:]))
            if start is not None:
                return start
        return None

    def fill(self, tokens: Tensor, pos: Tensor | None) -> tuple[Tensor, int]:
        return self.otherwise.fill(tokens, pos)  # which hears of every round

    def draft(self, step: Step, token: Tensor, pos: Tensor, u: Tensor | None) -> tuple[Tensor, list, list]:
        probs: list[Tensor] = []
        if u is not None:
            probs = [F.one_hot(self.found[0], self.vocab_size).float()]  # (k, V)
        return torch.cat((token, self.found), dim=1), [], probs

    def bytes_per_round(self) -> int:
        return self.otherwise.fill_bytes()

    def extra_bytes(self) -> int:
        return self.otherwise.extra_bytes()


def make_drafter(
    target: Transformer,
    exit_layer: int | None = None,
    draft_model: Transformer | None = None,
    k: int = 4,
    draft_head: str = "int8",
    draft_precision: str = "same",
    ngram_k: int = 0,
    ngram_max: int = 3,
) -> Drafter:
    """The drafter that the options name; plain decoding if they name neither an exit, nor a model, nor n-grams.

    ngram_k: the length of n-gram drafts, 0 for none. Raises InputError for options that exclude each other, or for an
    exit layer or a length out of range.
    """
    if draft_model is not None and exit_layer is not None:
        raise InputError("self-speculation and a separate draft model exclude each other")
    drafter = Drafter(target)
    if draft_model is not None:
        drafter = ModelDrafter(target, draft_model, k, draft_head)
    elif exit_layer is not None and draft_precision != "same":
        drafter = QuantizedDrafter(target, exit_layer, k, draft_precision, draft_head)
    elif exit_layer is not None:
        drafter = SelfDrafter(target, exit_layer, k, draft_head)
    if ngram_k:
        drafter = NgramDrafter(drafter, ngram_k, ngram_max)
    return drafter


def check_length(option: str, k: int) -> None:
    if not 1 <= k < kernels.MAX_ROWS:
        raise InputError(f"--{option} {k}: must be 1 to {kernels.MAX_ROWS - 1}")


def last_exit(layers: int, precision: str) -> int:
    """The largest exit that drafts in this precision, of so many layers: a copy may have them all."""
    return layers - (precision == "same")


def check_precision(precision: str, quantization: str | None) -> None:
    """Raise InputError if a copy in this precision reads no less than weights with this quantization."""
    possible = ["same", *SMALLER[quantization]]
    if precision not in possible:
        raise InputError(
            f"--draft_precision {precision}: the model is {quantization} already; take {' or '.join(possible)}"
        )


def check_exit(exit_layer: int, layers: int, precision: str) -> None:
    last = last_exit(layers, precision)
    if not 1 <= exit_layer <= last:
        raise InputError(
            f"--early_exit {exit_layer}: the model has {layers} layers, so 1 to {last} can be drafted with"
        )


def can_round_head(model: Transformer) -> bool:
    """Whether a copy of the head in int8 reads less: not if it is quantized already, or widened at every step."""
    if model.config.quantization:
        return False
    weight = model.head.weight
    kernels.prepare(weight, model.config.n_head // model.config.n_kv_head, model.config.head_dim)
    return kernels.available(weight) is not None


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' weights with their scales, all of which one pass reads; the caches are not among them."""
    return sum(t.nbytes for module in modules for t in module.state_dict().values())
