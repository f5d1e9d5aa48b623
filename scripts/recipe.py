"""The LayerSkip recipe (Elhoushi et al., arXiv 2404.16710): its schedule, its loss, and the measurement of every exit.

Sizes: L layers, each with an exit; B sequences per step over all processes, b of them in this one; T tokens in a
sequence; D numbers in a hidden state; V tokens in the vocabulary.
"""

import argparse
import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Transformer
from train_log import Evaluation

# Schedule: the recipe's formulas. Layers l count from 0 to L - 1, steps t from 0.


def dropout_probabilities(n_layer: int, step: int, steps: int, p_max: float, from_scratch: bool) -> Tensor:
    """Probability (L,) float32 that each layer is skipped at this step: S(t) D(l) p_max (paper, section 4.1).

    D grows exponentially over the layers, from 0 to 1. S grows in the same way over the steps of a new model's training
    (from_scratch). For a model that is trained further, S is 1.
    """
    depth = torch.arange(n_layer) * (math.log(2) / max(n_layer - 1, 1))
    time_scale = 1.0
    if from_scratch:
        time_scale = math.expm1(step * math.log(2) / max(steps - 1, 1))
    return p_max * time_scale * torch.expm1(depth)


def enabled_exits(n_layer: int, step: int, steps: int, curriculum: str, rotation: int) -> Tensor:
    """Which exits (L,) bool are in the loss at this step: C(t, l) (paper, section 4.2). The last one always is.

    rotational: every `rotation`-th layer, shifted by one each step. gradual: first the last layer alone. After every
    steps / (2 L) steps the next lower layer joins, so that all are in the loss in the second half of the run.
    """
    layer = torch.arange(n_layer)
    if curriculum == "rotational":
        enabled = (layer - step) % rotation == 0
    else:
        more = step * 2 * n_layer // steps  # exits enabled beside the last one
        enabled = layer >= n_layer - 1 - more
    enabled[-1] = True
    return enabled


def exit_weights(enabled: Tensor, scale: float, power: float | None = None) -> Tensor:
    """Weight (L,) float32 of each exit's cross entropy: e~(t, l) (paper, section 4.2). They add up to 1.

    power None, the paper's: e(l) = scale * (0 + 1 + ... + l) for l < L - 1, and
    e(L - 1) = L - 1 + scale * (0 + 1 + ... + (L - 2)).
    With a power, our own: e(l) = scale * (l + 1)^power for l < L - 1, and e(L - 1) = 1. This is for short runs: with
    the paper's weights, the earliest exits would learn too little in them.
    An exit that is not enabled has the weight 0.
    """
    layer = torch.arange(len(enabled), dtype=torch.float64)
    last = len(enabled) - 1
    if power is None:
        weight = scale * layer * (layer + 1) / 2
        weight[last] = last + scale * (last - 1) * last / 2
        if last == 0:  # the only exit, whose weight would be 0
            weight[last] = 1.0
    else:
        weight = scale * (layer + 1) ** power
        weight[last] = 1.0
    weight = weight * enabled
    return (weight / weight.sum()).float()


@dataclass(frozen=True)
class Schedule:
    """What differs from step to step. It depends on the step alone, so that a resumed run goes on exactly."""

    args: argparse.Namespace
    n_layer: int

    def keep(self, step: int) -> Tensor:
        """Which sequences of the whole batch pass each layer: (L, B) bool on the CPU, the same in every process."""
        args = self.args
        from_scratch = args.checkpoint_path is None
        skip = dropout_probabilities(self.n_layer, step, args.steps, args.max_dropout, from_scratch)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        return torch.rand(self.n_layer, args.batch_size, generator=generator) >= skip[:, None]

    def weights(self, step: int) -> Tensor:
        """The weight (L,) float32 of each exit in the loss; 0 for the exits that are not in it."""
        args = self.args
        enabled = enabled_exits(self.n_layer, step, args.steps, args.curriculum, args.rotation)
        return exit_weights(enabled, args.exit_scale, args.exit_power)

    def learning_rate(self, step: int) -> float:
        """The learning rate: it rises linearly to the peak --lr, then falls as a cosine to a tenth of the peak."""
        args = self.args
        if step < args.warmup:
            return args.lr * (step + 1) / args.warmup
        progress = (step - args.warmup) / max(1, args.steps - args.warmup)  # 0 to 1
        return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# The loss, and the measurement of every exit.

LOGITS = 1 << 25  # numbers: 128 MB in float32


def rows_at_once(vocab_size: int) -> int:
    """Of how many positions logits may exist at a time."""
    return max(1, LOGITS // vocab_size)


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence () of logits (N, V) from a teacher, logarithms (N, V) of its probabilities, summed over positions.

    That of distillation (1503.02531): times the temperature squared, so that gradients are as large at each one.
    """
    student = (logits / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


class LayerSkipLoss(nn.Module):
    """The training objective around a Transformer. It is a module, so that DDP and FSDP can wrap it."""

    def __init__(
        self, model: Transformer, recompute: bool = False, distill: float = 0.0, temperature: float = 1.0
    ) -> None:
        """recompute: keep no layer's activations for the backward pass, which computes them again. distill: the share
        of an early exit's loss that goes by the last layer's distribution rather than by the text. temperature: of both
        distributions then.
        """
        super().__init__()
        self.model = model
        self.trained: nn.Module = model
        self.scored = list(range(1, model.config.n_layer + 1))  # exits that validations are about, the last among them
        self.recompute = recompute
        self.distill = distill
        self.temperature = temperature

    def forward(
        self, tokens: Tensor, targets: Tensor, keep: Tensor, weights: Tensor, called: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss J (), and the cross entropy (L,) of each exit; NaN for exits of weight 0. Both float32.

        tokens, targets: (b, T) int64 ids. keep: (L, b) bool on the CPU, which sequences pass each layer. weights: (L,)
        float32 of the exits, of which the last isn't 0. called: (L,) bool, which layers are called even if no sequence
        of this process passes them: under FSDP, all processes must call a layer if one does.
        """
        model = self.model
        hidden = []  # of the exits in the loss, (b T, D)
        x = model.embed(tokens)  # (b, T, D)
        positions = model.positions(tokens.shape[1], None)
        for layer, kept, weight, call in zip(model.layers, keep, weights.tolist(), called.tolist(), strict=True):
            if self.recompute:
                layer = partial(checkpoint, layer, use_reentrant=False)
            if kept.all():
                x = layer(x, *positions)
            elif call:  # only the sequences that keep the layer are computed
                rows = kept.nonzero().squeeze(1).to(x.device)
                x = x.index_copy(0, rows, layer(x[rows], *positions).to(x.dtype))
            if weight:
                hidden.append(x.flatten(0, 1))
        last = hidden[-1].detach()
        sums = [self.losses(own, last, targets.flatten()) for own in hidden]
        entropy, distance = torch.stack(sums, dim=1) / targets.numel()
        share = torch.full_like(entropy, self.distill)
        share[-1] = 0
        weights = weights.to(x.device)
        inside = weights > 0
        total = (weights[inside] * torch.lerp(entropy, distance, share)).sum()
        return total, torch.full_like(weights, math.nan).masked_scatter(inside, entropy.detach())

    def losses(self, x: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        """Of an exit with hidden states x (N, D), and targets (N,): cross entropy and divergence from the distribution
        of the last exit's hidden states (N, D), both summed: (2,).

        Logits of a large vocabulary take more memory than all else. So no more than LOGITS of them are there at a time;
        the backward pass computes them again. F.linear_cross_entropy, which holds a gradient of the head for each exit,
        takes more memory and more time.
        """
        rows = rows_at_once(self.model.config.vocab_size)
        if len(x) <= rows:
            return self.summed(x, last, targets)
        parts = zip(x.split(rows), last.split(rows), targets.split(rows), strict=True)
        return torch.stack([checkpoint(self.summed, *part, use_reentrant=False) for part in parts]).sum(0)

    def summed(self, x: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        """`losses` of all positions at once."""
        logits = self.model.logits(x).float()
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        if not self.distill:
            return torch.stack((entropy, torch.zeros_like(entropy)))
        with torch.no_grad():
            teacher = (self.model.logits(last).float() / self.temperature).log_softmax(-1)
        return torch.stack((entropy, divergence(logits, teacher, self.temperature)))

    def exits(self, tokens: Tensor, targets: Tensor, layers: Any) -> tuple[Tensor, Tensor]:
        """Of every exit that `scored` has, E of them: the cross entropy (E,) float32, summed over the targets (b, T),
        and the most likely tokens (E, b, T) int64.

        tokens, targets: (b, T) int64. layers: the model's own, or copies of them.
        """
        x, losses, choices = self.model.embed(tokens), [], []
        for number, layer in enumerate(layers, 1):
            x = self.model.run([layer], x, None)
            if number not in self.scored:
                continue
            loss, best = self.score(self.model.exit_states(x, number).flatten(0, 1), targets.flatten())
            losses.append(loss)
            choices.append(best.view_as(targets))
        return torch.stack(losses), torch.stack(choices)

    def score(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(cross entropy (), summed, most likely tokens (N,)) for states (N, D) as the head takes them, and targets
        (N,), piece by piece as in `losses`.
        """
        rows = rows_at_once(self.model.config.vocab_size)
        losses, choices = [], []
        for part, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            logits = self.model.head(part).float()  # (n, V)
            losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
            choices.append(logits.argmax(-1))
        return torch.stack(losses).sum(), torch.cat(choices)


@torch.no_grad()
def evaluate(
    objective: LayerSkipLoss,
    ids: Tensor,
    context: int,
    batch_size: int,
    max_tokens: int,
    autocast: AbstractContextManager,
    device: torch.device,
    reference: Transformer | None = None,
    layers: Any = None,
) -> Evaluation:
    """Loss and agreement of the exits that the objective scores, on windows of `context` tokens, spread evenly over ids
    (N,).

    At most max_tokens are scored (but one window at least), batch_size windows at a time, on `device`. autocast: the
    precision of the products. reference: the exits are compared with its last layer; None means the model's own.
    layers: those that are scored, the model's own or copies of them; None means its own.
    """
    count = min((len(ids) - 1) // context, max(1, max_tokens // context))
    starts = torch.linspace(0, len(ids) - 1 - context, count).long()
    layers = layers or objective.model.layers
    losses = torch.full((len(layers),), math.nan, dtype=torch.float64)
    scored = torch.tensor(objective.scored) - 1
    losses[scored] = 0
    agreement = losses.clone()
    for chunk in tqdm(starts.split(batch_size), desc="evaluating", leave=False, disable=None):
        windows = [ids[start : start + context + 1].long() for start in chunk.tolist()]
        batch = torch.stack(windows).to(device)  # (b, T + 1)
        with autocast:
            loss, choices = objective.exits(batch[:, :-1], batch[:, 1:], layers)
            wanted = choices[-1]
            if reference is not None:
                wanted = reference.logits(reference(batch[:, :-1])).argmax(-1)
        losses[scored] += loss.double().cpu()
        agreement[scored] += (choices == wanted).sum((1, 2)).double().cpu()
    total = count * context
    return Evaluation(losses / total, agreement / total, total)
