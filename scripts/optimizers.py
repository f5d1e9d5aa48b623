"""The optimizers of training: AdamW, and Muon for the layers' matrices."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model import Block


class Muon(Optimizer):
    """Nesterov momentum; five Newton-Schulz steps then make the update of each matrix orthogonal.

    The method is by Jordan et al. (2024, https://kellerjordan.github.io/posts/muon). The update is scaled to the size
    that AdamW's usually has (Liu et al., arXiv 2502.16982). All is float32: torch.optim.Muon multiplies in bfloat16,
    and one step of it took a minute on a processor without bfloat16.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without the closure that other optimizers take
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                if not self.state[w]:
                    self.state[w] = empty_state(self, w)
                average = self.state[w]["momentum_buffer"]
                average.lerp_(w.grad, 1 - group["momentum"])
                update = orthogonalize(w.grad.lerp(average, group["momentum"]))
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(w.shape)))


def orthogonalize(m: Tensor) -> Tensor:
    """Roughly the orthogonal matrix nearest to m (A, B): its singular values are between 0.7 and 1.2 instead of 1."""
    if m.shape[0] > m.shape[1]:
        return orthogonalize(m.T).T  # a wide matrix has the smaller gram matrix
    x = m / m.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(trained: nn.Module, kind: str, lr: float, weight_decay: float) -> list[Optimizer]:
    """kind "adamw": AdamW for all weights. kind "muon": Muon for the layers' matrices, AdamW for the rest.

    lr: the learning rate until `optimizer_step` sets another. weight_decay: of the matrices; vectors have none.
    """
    in_layers = {id(w) for block in trained.modules() if isinstance(block, Block) for w in block.parameters()}
    muon, matrices, vectors = [], [], []
    for w in trained.parameters():
        if w.dim() != 2:
            vectors.append(w)
        elif kind == "muon" and id(w) in in_layers:
            muon.append(w)
        else:
            matrices.append(w)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if muon:
        optimizers.append(Muon(muon, lr, weight_decay))
    return optimizers


def empty_state(optimizer: Optimizer, w: Tensor) -> dict[str, Tensor]:
    """What one of these optimizers has of a weight when its first gradient comes."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": torch.zeros_like(w)}
    return {"step": torch.zeros((), device=w.device), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}


def optimizer_step(optimizers: list[Optimizer], learning_rate: float) -> None:
    """Take a step with the gradients, then clear them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
