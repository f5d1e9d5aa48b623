"""Train a Llama with the LayerSkip recipe (Elhoushi et al., arXiv 2404.16710): layer dropout and an early-exit loss.

The model is new, or comes from a converted checkpoint. The text comes from files and folders. Training runs on a CPU,
on a GPU, or on several under torchrun: each then has a copy of the model or, with --fsdp, a part of it. The result is a
checkpoint folder that generate.py reads, and a table of the loss and the agreement of every exit.
"""

# The options are in train_options.py.

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import argparse
import io
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import check_records, count_parameters, load_model, read_state, save_checkpoint, save_tensors
from command import InputError, Parser, blaming, caught_signals, check_memory
from data import Sources, is_held_out, load, pack, window
from early import is_out_of_memory
from files import check_fields, locked, replacing
from model import ModelConfig, Transformer
from ranks import Shard, run_command, start
from tokenizer import Tokenizer
from train_log import Evaluation, Report, print_table
from train_options import add_options, check_args, default_precision
from values import OBJECT, list_of, whole

# Sizes: L layers, each with an exit; B sequences per step over all processes, b of them in this one; T tokens in a
# sequence; D numbers in a hidden state; V tokens in the vocabulary.


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
        entropy, divergence = torch.stack(sums, dim=1) / targets.numel()
        share = torch.full_like(entropy, self.distill)
        share[-1] = 0
        weights = weights.to(x.device)
        inside = weights > 0
        total = (weights[inside] * torch.lerp(entropy, divergence, share)).sum()
        return total, torch.full_like(weights, math.nan).masked_scatter(inside, entropy.detach())

    def losses(self, x: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        """Of an exit with hidden states x (N, D), and targets (N,): cross entropy and divergence from the distribution
        of the last exit's hidden states (N, D), both summed: (2,).

        Logits of a large vocabulary take more memory than all else. So no more than LOGITS of them are there at a time;
        the backward pass computes them again. F.linear_cross_entropy, which holds a gradient of the head for each exit,
        takes more memory and more time.
        """
        rows = max(1, LOGITS // self.model.config.vocab_size)
        if len(x) <= rows:
            return self.summed(x, last, targets)
        parts = zip(x.split(rows), last.split(rows), targets.split(rows), strict=True)
        return torch.stack([checkpoint(self.summed, *part, use_reentrant=False) for part in parts]).sum(0)

    def summed(self, x: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        """`losses` of all positions at once. The divergence is that of distillation (1503.02531): times the temperature
        squared, so that gradients are as large at each temperature.
        """
        logits = self.model.logits(x).float()
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        if not self.distill:
            return torch.stack((entropy, torch.zeros_like(entropy)))
        t = self.temperature
        with torch.no_grad():
            teacher = (self.model.logits(last).float() / t).log_softmax(-1)
        divergence = F.kl_div((logits / t).log_softmax(-1), teacher, reduction="sum", log_target=True)
        return torch.stack((entropy, t * t * divergence))

    def exits(self, tokens: Tensor, targets: Tensor, layers: Any) -> tuple[Tensor, Tensor]:
        """Of every exit: the cross entropy (L,) float32, summed over the targets (b, T), and the most likely tokens.

        tokens, targets: (b, T) int64. layers: the model's own, or copies of them. The most likely tokens are (L, b, T)
        int64.
        """
        x, losses, choices = self.model.embed(tokens), [], []
        for layer in layers:
            x = self.model.run([layer], x, None)
            logits = self.model.logits(x).float()  # (b, T, V)
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            choices.append(logits.argmax(-1))
        return torch.stack(losses), torch.stack(choices)


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
    """Loss and agreement of every exit, on windows of `context` tokens, spread evenly over ids (N,).

    At most max_tokens are scored (but one window at least), batch_size windows at a time, on `device`. autocast: the
    precision of the products. reference: the exits are compared with its last layer; None means the model's own.
    layers: those that are scored, the model's own or copies of them; None means its own.
    """
    count = min((len(ids) - 1) // context, max(1, max_tokens // context))
    starts = torch.linspace(0, len(ids) - 1 - context, count).long()
    layers = layers or objective.model.layers
    losses = torch.zeros(len(layers), dtype=torch.float64)
    agreement = torch.zeros(len(layers), dtype=torch.float64)
    for chunk in tqdm(starts.split(batch_size), desc="evaluating", leave=False, disable=None):
        windows = [ids[start : start + context + 1].long() for start in chunk.tolist()]
        batch = torch.stack(windows).to(device)  # (b, T + 1)
        with autocast:
            loss, choices = objective.exits(batch[:, :-1], batch[:, 1:], layers)
            wanted = choices[-1]
            if reference is not None:
                wanted = reference.logits(reference(batch[:, :-1])).argmax(-1)
        losses += loss.double().cpu()
        agreement += (choices == wanted).sum((1, 2)).double().cpu()
    total = count * context
    return Evaluation(losses / total, agreement / total, total)


# Data.


def nonempty_lines(texts: Iterable[str]) -> Iterator[str]:
    """Every line of the texts that is not empty."""
    for text in texts:
        yield from filter(None, text.split("\n"))


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a sentencepiece BPE tokenizer, which keeps every byte of a text, and write folder/tokenizer.model.

    Raises InputError if sentencepiece can't make `vocab_size` tokens of the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=nonempty_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise InputError(f"--vocab_size {vocab_size}: sentencepiece can't train it on this text ({reason})") from None
    with replacing(folder / "tokenizer.model") as file:
        file.write_bytes(model.getvalue())
    return Tokenizer.load(folder)


def prepare_tokenizer(args: argparse.Namespace, sources: Sources, shard: Shard) -> Tokenizer:
    """The tokenizer in --out. The first process writes it: --tokenizer, else the checkpoint's, else a new one."""
    source = args.tokenizer
    if source is None and args.checkpoint_path:
        source = args.checkpoint_path.parent
    if shard.rank == 0:
        if source is None:
            if not args.resume:
                texts = (text for name, text in sources.documents() if not is_held_out(name, args.val_fraction))
                train_tokenizer(texts, args.vocab_size, args.out)
        elif source.resolve() != args.out.resolve():
            Tokenizer.load(source).save(args.out)
    shard.gather(None)  # the others wait until the tokenizer is there
    return Tokenizer.load(args.out)


@dataclass(frozen=True)
class Data:
    """The text as ids, and this process's examples of each step."""

    train_ids: Tensor  # (N,) uint16 or int32
    val_ids: Tensor  # (M,) the same
    context: int  # T
    batch_size: int  # B
    rows: slice  # this process's b of the B examples of a step
    seed: int
    device: torch.device

    def batch(self, step: int) -> Tensor:
        """(b, T + 1) int64 on the device: the first T of a row are inputs, the last T are their targets."""
        first = step * self.batch_size
        indices = range(first, first + self.batch_size)[self.rows]
        windows = [window(self.train_ids, index, self.context, self.seed) for index in indices]
        return torch.stack(windows).to(self.device)

    def validate(self, objective: LayerSkipLoss, max_tokens: int, autocast: AbstractContextManager) -> Evaluation:
        """Every exit's loss and agreement on at most `max_tokens` of the validation text."""
        objective.model.eval()
        batch_size = self.rows.stop - self.rows.start
        result = evaluate(objective, self.val_ids, self.context, batch_size, max_tokens, autocast, self.device)
        objective.model.train()
        return result


def load_data(
    args: argparse.Namespace, sources: Sources, tokenizer: Tokenizer, shard: Shard, device: torch.device
) -> Data:
    """The documents as ids, which the first process packs. Raises InputError if they are too short to train on."""
    folder = args.packed or args.out / "tokens"
    if shard.rank == 0:
        pack(sources, tokenizer, folder, args.val_fraction, args.workers)
    shard.gather(None)
    ids, val_ids = load(folder, args.val_fraction)
    if len(ids) < 3 * args.context or len(val_ids) <= args.context:
        found = f"{len(ids)} training and {len(val_ids)} validation tokens"
        raise InputError(f"too little text: {found} for --context {args.context}")
    share = args.batch_size // shard.size
    rows = slice(shard.rank * share, (shard.rank + 1) * share)
    return Data(ids, val_ids, args.context, args.batch_size, rows, args.seed, device)


# The model: a new one, or one made from a checkpoint's layers.

STATE_BYTES = 16  # of a parameter in training: itself, its gradient, and AdamW's two averages


def initialize(model: Transformer) -> None:
    """Random weights, as GPT-2 has them. The matrices whose results are added to the hidden state start smaller."""
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        std = 0.02
        if name.endswith(("wo.weight", "w2.weight")):
            std /= math.sqrt(2 * model.config.n_layer)
        nn.init.normal_(weight, std=std)


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Transformer:
    """A model of the size that the options give, with random weights."""
    eos_ids: tuple[int, ...] = ()
    if tokenizer.eos_id is not None:
        eos_ids = (tokenizer.eos_id,)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=args.dim,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_kv_head=args.n_kv_head or args.n_head,
        head_dim=args.dim // args.n_head,
        intermediate_size=args.intermediate_size,
        context=args.context,
        tied=not args.untied,
        bos_id=tokenizer.bos_id,
        eos_ids=eos_ids,
    )
    check_memory(STATE_BYTES * count_parameters(config), "cpu", "a model of this size")
    model = Transformer(config)
    initialize(model)
    return model


def load_base(path: Path, layers: list[int] | None) -> Transformer:
    """The checkpoint to train further. layers: a model made of these layers of it, as `restack` makes it.

    Raises InputError if the checkpoint is quantized, or doesn't have one of the layers.
    """
    model = load_model(path).requires_grad_(True).train()
    if model.config.quantization:
        kind = model.config.quantization
        raise InputError(f"--checkpoint_path {path}: is quantized ({kind}); train the checkpoint that it was made from")
    if layers:
        model = restack(model, layers)
    return model


def restack(model: Transformer, order: list[int]) -> Transformer:
    """A new model made of a trained model's layers, in the given order. Layers count from 1.

    0 stands for a new layer, which at first changes nothing (block expansion, Wu et al., arXiv 2401.02415). Raises
    InputError for a layer that isn't there.
    """
    for number in order:
        if not 0 <= number <= model.config.n_layer:
            known = f"the checkpoint has layers 1 to {model.config.n_layer}; 0 is a new one"
            raise InputError(f"--layers {number}: {known}")
    new = Transformer(replace(model.config, n_layer=len(order)))
    initialize(new)
    for name in ("embed", "norm", "head"):
        getattr(new, name).load_state_dict(getattr(model, name).state_dict())
    for layer, number in zip(new.layers, order, strict=True):
        if number:
            layer.load_state_dict(model.layers[number - 1].state_dict())
        else:
            nn.init.zeros_(layer.get_parameter("attention.wo.weight"))
            nn.init.zeros_(layer.get_parameter("ffn.w2.weight"))
    return new


def shard_weights(objective: LayerSkipLoss, device: torch.device, world_size: int) -> None:
    """Leave each process a part of every weight (FSDP2)."""
    mesh = init_device_mesh(device.type, (world_size,))
    for part in (*objective.model.layers, objective):  # layer by layer, so that no device ever has the whole model
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(objective, "exits")


# The optimizer.


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
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
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


def make_optimizers(model: Transformer, kind: str, lr: float, weight_decay: float) -> list[Optimizer]:
    """kind "adamw": AdamW for all weights. kind "muon": Muon for the layers' matrices, AdamW for the rest.

    lr: the learning rate until `optimizer_step` sets another. weight_decay: of the matrices; vectors have none.
    """
    in_layers = set(map(id, model.layers.parameters()))
    muon, matrices, vectors = [], [], []
    for w in model.parameters():
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


def optimizer_step(optimizers: list[Optimizer], learning_rate: float) -> None:
    """Take a step with the gradients, then clear them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


# Files: the state of an unfinished run, and the finished model.

STATE_FILE = "train_state.pth"

# Options that may differ between an interrupted run and the one that resumes it. With the same options the run goes on
# exactly as before. The number of steps, the learning rate and the exits' weights are here so that they can be changed
# on purpose.
FREE_TO_CHANGE = {
    "resume",
    "save_every",
    "eval_every",
    "eval_tokens",
    "exit_layer",
    "log_every",
    "tensorboard",
    "packed",
    "workers",
    "compile",
    "out",
    "device",
    "steps",
    "lr",
    "rotation",
    "exit_scale",
    "exit_power",
    "distill",
    "distill_temperature",
}


def full_state(model: Transformer, optimizers: list[Optimizer], fsdp: bool) -> dict[str, Any]:
    """{"model", "optimizers"}: the state dicts as a single process has them.

    Under FSDP all processes must call it. Only the first one then gets the state, on the CPU.
    """
    if not fsdp:
        return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = [get_optimizer_state_dict(model, optimizer, options=options) for optimizer in optimizers]
    return {"model": get_model_state_dict(model, options=options), "optimizers": saved}


def load_full_state(state: dict[str, Any], model: Transformer, optimizers: list[Optimizer], fsdp: bool) -> None:
    """Load what `full_state` returned, in place."""
    pairs = zip(optimizers, state["optimizers"], strict=True)
    if not fsdp:
        model.load_state_dict(state["model"])
        for optimizer, saved in pairs:
            optimizer.load_state_dict(saved)
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    for optimizer, saved in pairs:
        set_optimizer_state_dict(model, optimizer, saved, options=options)


@dataclass(frozen=True)
class TrainState:
    """One file with the state of an unfinished run. From it the run goes on exactly where it stopped."""

    path: Path
    settings: dict[str, str]  # what `fixed_settings` returns
    model: Transformer
    optimizers: list[Optimizer]
    steps: int  # of the whole run
    rank: int
    fsdp: bool

    def save(self, step: int) -> None:
        """Write the state after `step` steps, whole or not at all. All processes must call it; the first writes."""
        state = {}
        if self.rank == 0 or self.fsdp:
            state = full_state(self.model, self.optimizers, self.fsdp)
        if self.rank == 0:
            with replacing(self.path) as file:
                save_tensors({**state, "step": step, "settings": self.settings}, file)

    def load(self, device: torch.device) -> int:
        """Load the state. Returns the number of steps that are done. Raises InputError if it isn't this run's state."""
        state: dict[str, Any] = read_state(self.path, device)
        check_records(self.path)
        fields = {"settings": OBJECT, "model": OBJECT, "optimizers": list_of(OBJECT), "step": whole(0, self.steps)}
        check_fields(state, fields, f"--resume: {self.path}, the state of a training run")
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if value != before:
                raise InputError(f"--resume: {name} was {before} in {self.path}, now {value}")
        with blaming(f"--resume: {self.path} is not the state of this training run"):
            load_full_state(state, self.model, self.optimizers, self.fsdp)
        return state["step"]


@contextmanager
def own_folder(out: Path, resume: bool, rank: int) -> Iterator[None]:
    """Keep the folder for this run, which the first process makes. Raises InputError as `check_folder` does, and if
    another run is writing there.
    """
    if rank != 0:
        check_folder(out, resume)
        yield
        return
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / STATE_FILE):
            check_folder(out, resume)
            yield
    finally:
        if made:
            with suppress(OSError):  # there is something in it
                out.rmdir()


def check_folder(out: Path, resume: bool) -> None:
    """Raise InputError unless the run can begin in the folder, or resume there."""
    state = out / STATE_FILE
    if resume and not state.is_file():
        raise InputError(f"--resume: {state} not found; start the run without --resume")
    if not resume and state.is_file():
        raise InputError(f"{out}: holds an unfinished run; pass --resume to go on with it, or delete {state}")
    if not resume and (out / "model.pth").is_file():
        raise InputError(f"--out {out}: holds a finished checkpoint; name another folder")


def fixed_settings(args: argparse.Namespace, training_tokens: int) -> dict[str, str]:
    """{name: value} of what must be the same in an interrupted run and the one that resumes it."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["training tokens"] = str(training_tokens)
    return settings


def save_model(path: Path, state: dict[str, Tensor], config: ModelConfig, precision: str, tokens_seen: int) -> None:
    """Write the finished model.pth, and model.json beside it. precision: the dtype in the file."""
    note = f"trained by scripts/train.py on {tokens_seen} tokens"
    config.source = f"{config.source}, {note}" if config.source else note
    if config.tied:  # the head is the embedding, and the file has it once
        state = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    dtype = getattr(torch, precision)
    save_checkpoint(path, {name: tensor.to("cpu", dtype) for name, tensor in state.items()}, config)


# The run.


def in_any_process(flag: bool, device: torch.device, world_size: int) -> bool:
    """Whether `flag` is set in any process. All must call this; all get the same answer and stop at the same step."""
    total = torch.tensor(int(flag), device=device)
    if world_size > 1:
        dist.all_reduce(total)
    return bool(total)


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every `every` steps is due at this step. 0 means never."""
    return every > 0 and step % every == 0


def own_device(name: str, shard: Shard) -> torch.device:
    """The device on which this process computes. If it is a GPU, it becomes the current one."""
    device = torch.device(shard.device(name))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager:
    """A context in which products have this precision. The weights stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def load_data_and_model(args: argparse.Namespace, shard: Shard, device: torch.device) -> tuple[Data, LayerSkipLoss]:
    """The data, and the objective around the model. Puts the tokenizer into --out."""
    sources = Sources.of(args)
    sources.check()
    torch.manual_seed(args.seed)
    base = None
    if args.checkpoint_path:
        base = load_base(args.checkpoint_path, args.layers)
    tokenizer = prepare_tokenizer(args, sources, shard)
    model = base or new_model(args, tokenizer)
    objective = LayerSkipLoss(model, args.activation_checkpointing, args.distill, args.distill_temperature)
    if args.fsdp:
        shard_weights(objective, device, shard.size)
    model.to(device)
    tokenizer.check_model(model.config.vocab_size)
    return load_data(args, sources, tokenizer, shard, device), objective


def parallelize(objective: LayerSkipLoss, args: argparse.Namespace, world_size: int) -> nn.Module:
    """The module that a step calls: the objective, compiled under --compile, and under DDP in its wrapper."""
    if args.compile:
        for layer in objective.model.layers:
            layer.compile()
    if world_size > 1 and not args.fsdp:
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    return objective


def compute_gradients(
    parallel: nn.Module, data: Data, schedule: Schedule, step: int, autocast: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """Forward and backward on this process's part of the batch, --accumulate pieces one after the other.

    Returns the loss J () and the exits' losses (L,).
    """
    batch = data.batch(step)  # (b, T + 1)
    keep = schedule.keep(step)  # (L, B)
    weights = schedule.weights(step)  # (L,)
    count = schedule.args.accumulate
    pieces = batch.chunk(count)
    kept = keep[:, data.rows].chunk(count, dim=1)
    results = []
    for number, (piece, own) in enumerate(zip(pieces, kept, strict=True), 1):
        called = own.any(1)  # (L,)
        if schedule.args.fsdp:
            called = keep.any(1)
        with synchronized(parallel, number == count):
            with autocast:
                loss, losses = parallel(piece[:, :-1], piece[:, 1:], own, weights, called)
            (loss / count).backward()
        results.append(torch.cat((loss.detach()[None], losses)))
    mean = torch.stack(results).mean(0)
    return mean[0], mean[1:]


@contextmanager
def synchronized(parallel: nn.Module, last: bool) -> Iterator[None]:
    """Let gradients be exchanged between processes behind the last piece of a step only."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
    if isinstance(parallel, nn.parallel.DistributedDataParallel) and not last:
        with parallel.no_sync():
            yield
        return
    yield


def check_step(step: int, loss: float, norm: float) -> None:
    """Raise InputError, before it is taken, for a step whose loss or gradient's norm is not finite."""
    for what, value in (("the loss", loss), ("the norm of the gradient", norm)):
        if not math.isfinite(value):
            raise InputError(f"step {step}: {what} is {value}; lower --lr. What was saved before this step is kept")


def train(args: argparse.Namespace) -> list[float]:
    """Run the training that the options describe. Returns the loss J of each step that this call ran.

    Raises InputError for options that don't work, and if a step's loss or gradient is not finite. Ends the process with
    exit code 1 after SIGINT or SIGTERM.
    """
    shard = start()
    check_args(args, shard.size)
    args.precision = args.precision or default_precision(args.device)
    with own_folder(args.out, args.resume, shard.rank):
        return train_in_folder(args, shard)


def train_in_folder(args: argparse.Namespace, shard: Shard) -> list[float]:
    """The run, in the folder that is kept for it. See `train`."""
    device = own_device(args.device, shard)
    data, objective = load_data_and_model(args, shard, device)
    model = objective.model
    schedule = Schedule(args, model.config.n_layer)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    settings = fixed_settings(args, len(data.train_ids))
    train_state = TrainState(args.out / STATE_FILE, settings, model, optimizers, args.steps, shard.rank, args.fsdp)
    first_step = train_state.load(device) if args.resume else 0
    parallel = parallelize(objective, args, shard.size)
    autocast = mixed_precision(args.precision, device)
    report = Report(args, model.config, first_step, shard.rank)
    validates = shard.rank == 0 or args.fsdp  # under FSDP all processes are needed; the first one reports

    step, history = first_step, []
    with report.bar, caught_signals() as signals:
        while step < args.steps and not in_any_process(bool(signals), device, shard.size):
            if validates and step > first_step and is_due(step, args.eval_every):
                report.validation(step, data.validate(objective, args.eval_tokens, autocast))
            loss, losses = compute_gradients(parallel, data, schedule, step, autocast)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            rate = schedule.learning_rate(step)
            step += 1
            history.append(loss.item())
            gradient_norm = norm.item()
            check_step(step, history[-1], gradient_norm)
            optimizer_step(optimizers, rate)
            report.step(step, losses, learning_rate=rate, gradient_norm=gradient_norm)
            if is_due(step, args.save_every):
                train_state.save(step)
    train_state.save(step)  # also at the end, so that nothing is lost if the last validation fails
    if step < args.steps:
        sys.exit(f"stopped after step {step}; --resume goes on from there")

    if validates:
        seconds = report.seconds()
        result = data.validate(objective, len(data.val_ids), autocast)
        state_dict = full_state(model, [], args.fsdp)["model"]
    if shard.rank == 0:
        report.end(step, result, seconds, len(data.train_ids))
        tokens_seen = step * args.batch_size * args.context
        shutil.rmtree(args.out / "tokens", ignore_errors=True)
        save_model(args.out / "model.pth", state_dict, model.config, args.save_precision, tokens_seen)
        train_state.path.unlink(missing_ok=True)
        print_table(args.out / "model.pth", result)
    return history


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options as given; `train` checks them."""
    parser = Parser(description=__doc__)
    add_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    try:
        train(parse_args())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            "out of memory: lower --batch_size or --context, or give --accumulate, --activation_checkpointing or "
            "--precision bfloat16; --resume goes on from the last saved state"
        ) from None


if __name__ == "__main__":
    run_command(main, watch=False)
