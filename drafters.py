"""Who proposes the tokens of a round, and what the target's verification of them starts from.

The loop in generate.py knows the protocol of `Drafter` and nothing else. What is emitted has the target's distribution
whoever drafts, because acceptance goes by the probabilities that the drafts were really drawn from.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernels
from command import InputError
from kernels import formats
from model import Transformer

Step = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class Drafter:
    """Proposes nothing: plain decoding. Also the protocol, of which other drafters override what differs.

    Cache rows: the last emitted token has none yet, and is the first thing that a round feeds. After a round every
    model that drafts must have rows for the k + 1 positions it covered, or a fully accepted round leaves a row that
    was never written, and later queries read it. Rejected tokens cost nothing: the position moves back, and their
    rows are overwritten before anything sees them.

    Attributes: k, the tokens drafted in a round; models, all whose caches a round fills; vocab_size, the ids that can
    be drafted; exit_layer, for reports (None: drafts don't come from an exit of the target).
    """

    exit_layer: int | None = None

    def __init__(self, target: Transformer, k: int = 0):
        self.target, self.k = target, k
        self.models = [target]
        self.vocab_size = target.config.vocab_size

    def prefill(self, prompt: Tensor, pos: Tensor | None) -> None:
        """Fill caches of the drafter's own from the prompt (1, T) at positions pos (T,); None: from 0 on."""

    def step(self, token: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """One drafting step from token (1, 1) at pos (1,): (what `verify_from` needs of it, logits (1, V))."""
        raise NotImplementedError

    def draft(self, step: Step, token: Tensor, pos: Tensor, u: Tensor | None) -> tuple[Tensor, list, list]:
        """Propose k tokens behind token (1, 1) at pos (1,). u: uniform numbers (k,), None for the most likely tokens.

        step: the loop's (token, pos, u (1,)) -> (state, next token (1, 1), its distribution (1, V) or None), which
        calls `step` above and draws from its logits. Returns the token and the proposed ones (1, k + 1), the states,
        and the distributions that they were drawn from, which sampling needs of every drafter. A drafter that looks
        at the text keeps it itself, as a cache does: `prefill` gives it the prompt, and each call here the token at
        pos.
        """
        tokens, states, probs = [token], [], []
        for i in range(self.k):
            state, token, p = step(token, pos + i, None if u is None else u[i : i + 1])
            tokens.append(token)
            states.append(state)
            probs.append(p)
        return torch.cat(tokens, dim=1), states, probs

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        """What the target's pass over tokens (1, k + 1) from pos (1,) on starts from: (x, start) as
        `Transformer.forward` has them. Here the last of the k + 1 positions also gets its row in the drafter's caches.
        """
        return tokens, 0

    def bytes_per_round(self) -> int:
        """Bytes of weights that drafting reads in a round, beside the target's own pass over all of its weights."""
        return 0


class ModelDrafter(Drafter):
    """A separate, smaller model that shares the target's tokenizer. Where one has more ids than the other, as of two
    paddings or of tokens added later, those are never drafted.

    head: "int8" chooses drafts with a copy of the head rounded to int8, which reads a half or a quarter of the bytes,
    where there are kernels for it; "full" with the head itself.
    """

    stop: int | None = None  # the layer before which drafting ends

    def __init__(self, target: Transformer, draft: Transformer, k: int, head: str = "int8"):
        super().__init__(target, k)
        if not 1 <= k < kernels.MAX_ROWS:
            raise InputError(f"--speculate_k {k}: must be 1 to {kernels.MAX_ROWS - 1}")
        self.model = draft
        self.models = [target] if draft is target else [target, draft]
        self.vocab_size = min(target.config.vocab_size, draft.config.vocab_size)
        self.head = int8_head(draft) if head == "int8" else None  # (weight, scale)

    def known(self, tokens: Tensor) -> Tensor:
        """The tokens as the draft model can be fed them: where it lacks one, another stands in for it."""
        if self.vocab_size == self.target.config.vocab_size:
            return tokens
        return tokens.clamp(max=self.vocab_size - 1)

    def prefill(self, prompt: Tensor, pos: Tensor | None) -> None:
        self.model(self.known(prompt), pos)

    def step(self, token: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(self.known(token), pos, 0, self.stop)
        return hidden, self.logits(hidden[:, -1])

    def logits(self, h: Tensor) -> Tensor:
        """What drafts are chosen from: logits (..., V) for hidden states h (..., D)."""
        if self.head is None:
            return self.model.logits(h)[..., : self.vocab_size]
        return self.model.head.combine(kernels.linear(self.model.norm(h), *self.head))[..., : self.vocab_size]

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        self.model(self.known(tokens[:, -1:]), pos + self.k)  # the row that a fully accepted round needs
        return tokens, 0

    def step_bytes(self) -> tuple[int, int]:
        """Bytes of weights that one step reads: (those of its layers and norm, those of its head)."""
        layers = weight_bytes(*self.model.layers[: self.stop], self.model.norm)
        head = weight_bytes(self.model.head) if self.head is None else sum(t.nbytes for t in self.head)
        return layers, head

    def bytes_per_round(self) -> int:
        layers, head = self.step_bytes()
        return self.k * (layers + head) + layers


class SelfDrafter(ModelDrafter):
    """The target's own layers [0, exit_layer) and its head. Verification goes on from their hidden states with the
    layers that follow, so that no layer sees a position twice.
    """

    def __init__(self, target: Transformer, exit_layer: int, k: int, head: str = "int8"):
        last = target.config.n_layer - 1
        if not 1 <= exit_layer <= last:
            raise InputError(
                f"--early_exit {exit_layer}: the model has {last + 1} layers, so 1 to {last} can be drafted with"
            )
        super().__init__(target, target, k, head)
        self.exit_layer: int = exit_layer
        self.stop = exit_layer

    def prefill(self, prompt: Tensor, pos: Tensor | None) -> None:
        """The target's own pass fills these rows."""

    def verify_from(self, tokens: Tensor, states: list[Tensor], pos: Tensor) -> tuple[Tensor, int]:
        last = self.target(tokens[:, -1:], pos + self.k, 0, self.stop)
        return torch.cat((*states, last), dim=1), self.exit_layer

    def bytes_per_round(self) -> int:
        return self.k * sum(self.step_bytes())  # the last pass reads what the target's own would have read


def make_drafter(
    target: Transformer,
    exit_layer: int | None = None,
    draft_model: Transformer | None = None,
    k: int = 4,
    draft_head: str = "int8",
) -> Drafter:
    """The drafter that the options name: none of the two models means plain decoding. Raises InputError for both, or
    for an exit layer or k out of range.
    """
    if draft_model is not None and exit_layer is not None:
        raise InputError("self-speculation and a separate draft model exclude each other")
    if draft_model is not None:
        return ModelDrafter(target, draft_model, k, draft_head)
    if exit_layer is not None:
        return SelfDrafter(target, exit_layer, k, draft_head)
    return Drafter(target)


def int8_head(model: Transformer) -> tuple[Tensor, Tensor] | None:
    """(weight, scale) of a copy of the model's head in int8; None where it is quantized already, or nothing computes
    with it.
    """
    if model.config.quantization:
        return None
    with torch.no_grad():
        if not kernels.backend(model.head.weight, 1):  # int8 would be widened at every step
            return None
    return formats.int8_rows(model.head.weight)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' weights with their scales, all of which one pass reads; the caches are not among them."""
    return sum(t.nbytes for module in modules for t in module.state_dict().values())
