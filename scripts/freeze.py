"""Early exits for a model that stays as it is: adapters, trained to predict what the model's last layer does."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn

from adapters import new_adapters
from checkpoint import read_checkpoint
from command import InputError
from model import ExitAdapter, Linear, Transformer
from recipe import LayerSkipLoss, divergence, rows_at_once

# Sizes: L layers; E adapters; N positions; D numbers in a hidden state; V tokens in the vocabulary.


class Divergences(torch.autograd.Function):
    """How far each exit is from the last layer: (E,) float32, the divergence KL(last || exit) summed over positions.

    The head gets no gradient. So a piece's gradient is computed at once, and its logits are let go.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, head: Linear, last: Tensor, targets: Tensor, temperature: float, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """last: (N, D), and states: E times (N, D), as the head takes them. targets: (N,) int64.

        Returns (divergences (E,), cross entropies of the targets (E,)), both summed.
        """
        rows = rows_at_once(head.outputs)
        gradients = [torch.empty_like(x) for x in states]
        sums = torch.zeros(2, len(states), device=last.device)
        for begin in range(0, len(last), rows):
            piece = slice(begin, begin + rows)
            teacher = (head(last[piece]).float() / temperature).log_softmax(-1)
            for number, x in enumerate(states):
                distance, entropy, gradient = compare(head, x[piece], teacher, targets[piece], temperature)
                gradients[number][piece] = gradient
                sums[0, number] += distance
                sums[1, number] += entropy
        divergences, entropies = sums
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(entropies)
        return divergences, entropies

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, None, *(s * gradient for s, gradient in zip(scale, ctx.saved_tensors, strict=True))


def compare(
    head: Linear, x: Tensor, teacher: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence (), cross entropy (), gradient (n, D) of the divergence) of an exit's states x (n, D), as the head
    takes them; teacher: (n, V) logarithms of the last layer's probabilities. targets: (n,).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = head(x).float()
        distance = divergence(logits, teacher, temperature)
    (gradient,) = torch.autograd.grad(distance, x)
    entropy = nn.functional.cross_entropy(logits.detach(), targets, reduction="sum")
    return distance.detach(), entropy, gradient


class AdapterLoss(LayerSkipLoss):
    """The objective of adapters: the mean divergence of their exits from the last layer's distribution."""

    def __init__(self, model: Transformer, adapters: dict[int, ExitAdapter], temperature: float) -> None:
        super().__init__(model, temperature=temperature)
        model.adapters = adapters
        self.trained = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})
        self.scored = [*adapters, model.config.n_layer]

    def forward(self, tokens: Tensor, targets: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """The mean divergence (), and the cross entropy (L,) of each exit; NaN for exits without an adapter.

        tokens, targets: (b, T) int64 ids. What follows is the recipe's schedule, which adapters don't have.
        """
        model = self.model
        positions = model.positions(tokens.shape[1], None)
        hidden = {}  # of the exits with adapters, (b, T, D)
        with torch.no_grad():
            x = model.embed(tokens)
            for number, layer in enumerate(model.layers, 1):
                x = layer(x, *positions)
                if number in model.adapters:
                    hidden[number] = x
            last = model.norm(x).flatten(0, 1)
        states = []
        for number, adapter in model.adapters.items():
            x = hidden[number]
            for block in adapter.layers:
                x = block(x, *positions)
            states.append(adapter.norm(x).flatten(0, 1))
        divergences, entropies = Divergences.apply(model.head, last, targets.flatten(), self.temperature, *states)
        losses = torch.full((len(model.layers),), torch.nan, device=last.device)
        losses[torch.tensor(list(model.adapters)) - 1] = entropies / targets.numel()
        return divergences.mean() / targets.numel(), losses


def default_exits(layers: int) -> list[int]:
    """A quarter, a half and three quarters of the way up, where there are so many layers."""
    return sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3)})


def settle_exits(args: argparse.Namespace, layers: int) -> None:
    """Set --exits where it isn't given, and --exit_layer to the lowest of them. layers: how many the model has.

    Raises InputError for an exit that it doesn't have, or that is its last layer.
    """
    args.exits = sorted(set(args.exits or default_exits(layers)))
    for number in args.exits:
        if not 1 <= number < layers:
            possible = f"1 to {layers - 1}" if layers > 1 else "none"
            raise InputError(f"--exits {number}: the model has {layers} layers; exits that can be trained: {possible}")
    args.exit_layer = args.exit_layer or args.exits[0]
    if args.exit_layer not in args.exits:
        raise InputError(f"--exit_layer {args.exit_layer}: with --freeze it must be one of --exits")


def first_adapters(model: Transformer, exits: list[int], block: bool) -> dict[int, ExitAdapter]:
    """{exit: adapter} to begin training with: the model's final norm, behind a copy of its last layer."""
    adapters = new_adapters(model.config, exits, block)
    for adapter in adapters.values():
        adapter.norm.load_state_dict(model.norm.state_dict())
        for layer in adapter.layers:
            layer.load_state_dict(model.layers[-1].state_dict())
    return adapters


def check_unchanged(model: Transformer, path: Path) -> None:
    """Raise InputError unless the model still has the weights of its model.pth, bit for bit."""
    state, _ = read_checkpoint(path)
    for name, own in model.state_dict().items():
        if name in state and not torch.equal(own.cpu(), state[name].to(own.dtype)):
            raise InputError(f"{path}: {name} is not what was loaded from it; was the file changed during the run?")
