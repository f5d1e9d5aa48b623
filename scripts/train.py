"""Train a Llama with the LayerSkip recipe (Elhoushi et al., arXiv 2404.16710): layer dropout and an early-exit loss.

From scratch, or from a converted checkpoint; on text files or folders of them; on a CPU, a GPU, or several under
torchrun, where each has a copy of the model or, with --fsdp, a part of it. Ends with a checkpoint folder that generate.py reads, and with loss and agreement at every exit.
"""
import argparse
import json
import math
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from checkpoint import load_model, read_state, save_checkpoint
from command import InputError, check_device
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from tp import run_command, start


# The recipe: three formulas. Layers l count from 0 to L - 1, steps t from 0 to T - 1.

def dropout_probabilities(n_layer, step, steps, p_max, from_scratch):
    """Probability (L,) that each layer is skipped at this step: S(t) D(l) p_max (paper, section 4.1).

    D grows exponentially over the layers from 0 to 1; S does so over time when training from scratch, and is 1
    when a trained model is continued.
    """
    depth = torch.arange(n_layer) * (math.log(2) / max(n_layer - 1, 1))
    time_scale = math.expm1(step * math.log(2) / max(steps - 1, 1)) if from_scratch else 1.0
    return p_max * time_scale * torch.expm1(depth)


def enabled_exits(n_layer, step, steps, curriculum, rotation):
    """Which exits (L,) bool take part in the loss at this step: C(t, l) (paper, section 4.2). The last always does.

    rotational: every `rotation`-th layer, shifted by one each step. gradual: from the last layer down, one more
    every T / (2L) steps, so that all are enabled from the middle of the run on.
    """
    layer = torch.arange(n_layer)
    if curriculum == "rotational":
        enabled = (layer - step) % rotation == 0
    else:
        enabled = layer >= n_layer - 1 - step * 2 * n_layer // steps
    enabled[-1] = True
    return enabled


def exit_weights(enabled, scale, power=None):
    """Weight (L,) of each exit's cross entropy, normalized to sum 1 over the enabled ones: e~(t, l) (paper, section 4.2).

    The paper's, power None: e(l) = scale * (0 + 1 + ... + l) for l < L - 1, and e(L - 1) = L - 1 + scale * (0 + 1 + ... + (L - 2)).
    Ours, for short runs, in which the paper's weights leave the earliest exits behind: e(l) = scale * (l + 1)^power for
    l < L - 1, and e(L - 1) = 1.
    """
    layer = torch.arange(len(enabled), dtype=torch.float64)
    last = len(enabled) - 1
    if power is None:
        weight = scale * layer * (layer + 1) / 2
        weight[last] = last + scale * (last - 1) * last / 2 if last else 1.0
    else:
        weight = scale * (layer + 1) ** power
        weight[last] = 1.0
    weight = weight * enabled
    return (weight / weight.sum()).float()


class LayerSkipLoss(nn.Module):
    """The training objective around a Transformer; a module, so that DDP and FSDP can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets, keep, weights, called):
        """tokens, targets: (B, T) ids. keep: (L, B) bool on the CPU, which sequences pass each layer. weights: (L,). called: (L,)
        bool, which layers are computed, with no sequence if need be: under FSDP all processes must call a layer that one calls.

        Returns (J, losses): the weighted loss, and the cross entropy (L,) of each exit with a weight, NaN elsewhere.
        """
        model, losses = self.model, []
        x = model.embed(tokens)
        positions = model.positions(tokens.shape[1], None)
        total = 0.0
        for layer, kept, weight, call in zip(model.layers, keep, weights.tolist(), called.tolist()):
            if kept.all():
                x = layer(x, *positions)
            elif call:  # only the sequences that keep the layer are computed
                rows = kept.nonzero().squeeze(1).to(x.device)
                x = x.index_copy(0, rows, layer(x[rows], *positions).to(x.dtype))
            if weight:
                loss = F.cross_entropy(model.logits(x).flatten(0, 1).float(), targets.flatten())
                total = total + weight * loss
            losses.append(loss.detach() if weight else torch.tensor(math.nan, device=x.device))
        return total, torch.stack(losses)

    def exits(self, tokens, targets):
        """Of every exit, the cross entropy (L,) summed over the targets (B, T), and the most likely tokens (L, B, T)."""
        x, losses, choices = tokens, [], []
        for i in range(self.model.config.n_layer):
            x = self.model(x, None, i, i + 1)
            logits = self.model.logits(x).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            choices.append(logits.argmax(-1))
        return torch.stack(losses), torch.stack(choices)


# Data: every document as BOS ... EOS in one long row of ids, cut into windows.

def read_documents(paths, include, exclude):
    """The texts of the given files and of the files below the given folders, as [(relative name, text)], sorted.

    Files that are not UTF-8 are left out. Raises InputError if a path is missing or nothing is left.
    """
    documents = []
    for root in map(Path, paths):
        if not root.exists():
            raise InputError(f"--data {root}: no such file or folder")
        files = [root] if root.is_file() else sorted(p for p in root.rglob(include) if p.is_file())
        for file in files:
            name = file.name if file == root else file.relative_to(root).as_posix()
            if any(fnmatch(name, pattern) for pattern in exclude):
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                documents.append((name, text))
    if not documents:
        raise InputError(f"--data {' '.join(map(str, paths))}: no UTF-8 text files there that match {include}")
    return documents


def is_held_out(name, fraction):
    """Whether a document is kept for validation: decided by its name alone, so that it never changes sides."""
    return zlib.crc32(name.encode()) % 10_000 < fraction * 10_000


def train_tokenizer(texts, vocab_size, folder):
    """Train a sentencepiece BPE tokenizer that reproduces any text byte for byte; writes folder/tokenizer.model."""
    import sentencepiece
    lines = (line for text in texts for line in text.split("\n") if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_digits=True, user_defined_symbols=["\n"],
            max_sentence_length=1 << 16, minloglevel=2)
    except RuntimeError as error:
        raise InputError(f"--vocab_size {vocab_size}: sentencepiece can't train it on this text ({str(error).splitlines()[-1]})") from None
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer.load(folder)


def encode_documents(documents, tokenizer):
    """All documents as one row of ids (N,): each as the tokenizer reads a text, BOS included where it adds that, and EOS behind it."""
    ids = []
    for _, text in tqdm(documents, desc="tokenizing", unit="file", disable=None):
        ids += tokenizer.encode(text)
        if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
    return torch.tensor(ids, dtype=torch.int32)


def window(ids, index, context, seed):
    """Training example number `index` of the endless sequence: context + 1 ids.

    Each epoch cuts the row anew, at a random offset and in a random order, both from (seed, epoch): the position in
    the data is the example's number and nothing else, which is what makes a resumed run exact.
    """
    per_epoch = (len(ids) - 1) // context - 1
    epoch, place = divmod(index, per_epoch)
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=g))
    start = offset + int(torch.randperm(per_epoch, generator=g)[place]) * context
    return ids[start:start + context + 1].long()


@torch.no_grad()
def evaluate(objective, ids, context, batch_size, max_tokens, amp, device, reference=None):
    """Loss and agreement of every exit on consecutive windows of the validation ids. A progress bar shows where it is.

    Returns (losses (L,) in nats per token, agreement (L,): share of positions where the exit's greedy token is the
    last layer's, or that of another model, the reference; tokens counted).
    """
    count = min((len(ids) - 1) // context, max(1, max_tokens // context))
    starts = torch.linspace(0, len(ids) - 1 - context, count).long()
    losses = agreement = 0
    for chunk in tqdm(starts.split(batch_size), desc="evaluating", leave=False, disable=None):
        batch = torch.stack([ids[s:s + context + 1] for s in chunk.tolist()]).long().to(device)
        with amp:
            loss, choices = objective.exits(batch[:, :-1], batch[:, 1:])
            wanted = reference.logits(reference(batch[:, :-1])).argmax(-1) if reference else choices[-1]
        losses = losses + loss.double().cpu()
        agreement = agreement + (choices == wanted).sum((1, 2)).double().cpu()
    total = count * context
    return losses / total, agreement / total, total


def initialize(model):
    """Random weights as GPT-2's: what writes into the residual stream starts smaller."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            shrink = math.sqrt(2 * model.config.n_layer) if name.endswith(("wo.weight", "w2.weight")) else 1
            nn.init.normal_(weight, std=0.02 / shrink)


def restack(model, order):
    """A model made of a trained one's layers, by their numbers from 1, and where order has a 0, of a new layer that begins as
    the identity (block expansion, Wu et al. 2401.02415). Raises InputError for a layer that isn't there."""
    for number in order:
        if not 0 <= number <= model.config.n_layer:
            raise InputError(f"--layers {number}: the checkpoint has layers 1 to {model.config.n_layer}; 0 is a new one")
    new = Transformer(replace(model.config, n_layer=len(order)))
    initialize(new)
    for name in ("embed", "norm", "head"):
        getattr(new, name).load_state_dict(getattr(model, name).state_dict())
    for layer, number in zip(new.layers, order):
        if number:
            layer.load_state_dict(model.layers[number - 1].state_dict())
        else:
            nn.init.zeros_(layer.attention.wo.weight), nn.init.zeros_(layer.ffn.w2.weight)
    return new


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each matrix is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon), scaled to AdamW's usual size (Liu et al. 2502.16982).

    In float32, unlike torch.optim.Muon, whose bfloat16 products took a minute per step on a processor that lacks it.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
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


def orthogonalize(m):
    """The nearest orthogonal matrix to m (A, B), roughly: singular values between 0.7 and 1.2 instead of 1."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x if m.shape[0] <= m.shape[1] else x.T


def make_optimizers(model, kind, lr, weight_decay):
    """AdamW over everything, or Muon over the layers' matrices with AdamW for the rest (embedding, head, norms)."""
    layers = [w for w in model.layers.parameters() if w.dim() == 2] if kind == "muon" else []
    muon = {id(w) for w in layers}
    rest = [w for w in model.parameters() if id(w) not in muon]
    groups = [{"params": [w for w in rest if w.dim() == 2], "weight_decay": weight_decay},
              {"params": [w for w in rest if w.dim() != 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if layers:
        optimizers.append(Muon(layers, lr, weight_decay))
    return optimizers


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", required=True, help="text files, or folders that are searched for them")
    g.add_argument("--include", default="*", help="pattern of file names to take from folders")
    g.add_argument("--exclude", nargs="*", default=[], help="patterns of names (relative to the folder) to leave out")
    g.add_argument("--val_fraction", type=float, default=0.03, help="share of the files held out for validation")
    g.add_argument("--tokenizer", type=Path, help="folder with a tokenizer (default: the checkpoint's, or train one)")
    g.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer trained here")
    g = p.add_argument_group("model")
    g.add_argument("--checkpoint_path", type=Path, help="continue from this model.pth instead of starting from scratch")
    g.add_argument("--layers", type=int, nargs="+", metavar="N", help="with --checkpoint_path: which of its layers the model gets, from 1, in this order; 0: a new one, at first without effect")
    g.add_argument("--n_layer", type=int, default=12)
    g.add_argument("--dim", type=int, default=320)
    g.add_argument("--n_head", type=int, default=5)
    g.add_argument("--n_kv_head", type=int, help="default: as many as --n_head")
    g.add_argument("--intermediate_size", type=int, default=832)
    g.add_argument("--context", type=int, default=512, help="tokens per training example; the new model's context")
    g.add_argument("--untied", action="store_true", help="give the output head weights of its own")
    g = p.add_argument_group("recipe")
    g.add_argument("--max_dropout", type=float, default=0.1, help="p_max: how often the last layer is skipped")
    g.add_argument("--exit_scale", type=float, default=1.0, help="e_scale: how much the early exits weigh in the loss")
    g.add_argument("--exit_power", type=float, help="exits before the last weigh --exit_scale * (layer number)^this, the last 1 (default: the paper's weights)")
    g.add_argument("--curriculum", choices=["rotational", "gradual"], default="rotational")
    g.add_argument("--rotation", type=int, default=4, help="R: every R-th exit is trained in a step (rotational)")
    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=int, default=4000)
    g.add_argument("--batch_size", type=int, default=8, help="examples per step, over all processes")
    g.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the layers' matrices")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; warm-up, then cosine to a tenth")
    g.add_argument("--warmup", type=int, default=100, help="steps")
    g.add_argument("--weight_decay", type=float, default=0.1)
    g.add_argument("--grad_clip", type=float, default=1.0)
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("run")
    g.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    g.add_argument("--resume", action="store_true", help="go on from the state in --out, with the same settings")
    g.add_argument("--save_every", type=int, default=500, help="steps between saved states")
    g.add_argument("--eval_every", type=int, default=500, help="steps between validations on --eval_tokens tokens")
    g.add_argument("--eval_tokens", type=int, default=20_000)
    g.add_argument("--exit_layer", type=int, help="exit whose loss the progress shows (default: a quarter of the way)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--precision", choices=["bfloat16", "float32"], help="of the products; weights stay float32 (default: bfloat16 where the processor multiplies it)")
    g.add_argument("--save_precision", choices=["bfloat16", "float32"], default="bfloat16", help="of model.pth")
    g.add_argument("--compile", action="store_true", help="compile the layers")
    g.add_argument("--fsdp", action="store_true", help="under torchrun, for models that need it: each process keeps a part of weights, gradients and optimizer state (FSDP2), instead of a copy")
    return p.parse_args(argv)


# What may differ between an interrupted run and the one that resumes it. With the same settings the run goes on exactly;
# the schedule's length and the exits' weights may be changed on purpose.
FREE_TO_CHANGE = {"resume", "save_every", "eval_every", "eval_tokens", "exit_layer", "compile", "out", "device",
                  "steps", "rotation", "exit_scale", "exit_power"}


def check_args(args):
    """Raise InputError for the first setting that can't be trained with."""
    for names, low, high in ((("steps", "batch_size", "context", "n_layer", "n_head", "intermediate_size", "rotation", "vocab_size"), 1, math.inf),
                             (("warmup", "save_every", "eval_every", "weight_decay", "exit_scale"), 0, math.inf), (("seed",), 0, 2**40),
                             (("max_dropout",), 0, 1), (("val_fraction",), 1e-4, 0.9), (("lr", "grad_clip"), 1e-12, math.inf), (("eval_tokens",), 1, math.inf)):
        for name in names:
            if not low <= getattr(args, name) <= high:  # false for NaN too
                raise InputError(f"--{name} {getattr(args, name)}: must be {low} to {high}")
    if args.dim < 1 or args.dim % (2 * args.n_head):
        raise InputError(f"--dim {args.dim}: must be an even multiple of --n_head {args.n_head}")
    if args.n_kv_head is not None and (args.n_kv_head < 1 or args.n_head % args.n_kv_head):
        raise InputError(f"--n_kv_head {args.n_kv_head}: must divide --n_head {args.n_head}")
    if args.fsdp and (args.optimizer == "muon" or start().size == 1):
        raise InputError("--fsdp: is for several processes, which torchrun starts, and for --optimizer adamw: Muon needs whole matrices")
    if args.layers and not args.checkpoint_path:
        raise InputError("--layers: needs --checkpoint_path, the model that they come from; a new one has --n_layer")
    if args.tokenizer:
        Tokenizer.load(args.tokenizer)
    check_device(args.device)
    if args.precision is None:
        fast = torch.device(args.device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.precision = "bfloat16" if fast else "float32"


def full_state(model, optimizers, fsdp):
    """{"model", "optimizers"}: their states as one process has them, on the CPU. Under FSDP all processes must ask, and the first gets it."""
    if not fsdp:
        return {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"model": get_model_state_dict(model, options=options), "optimizers": [get_optimizer_state_dict(model, o, options=options) for o in optimizers]}


def load_full_state(state, model, optimizers, fsdp):
    """Set what `full_state` gave."""
    options = StateDictOptions(full_state_dict=True)
    if fsdp:
        set_model_state_dict(model, state["model"], options=options)
    else:
        model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        if fsdp:
            set_optimizer_state_dict(model, optimizer, saved, options=options)
        else:
            optimizer.load_state_dict(saved)


def train(args):
    """Run the training that `parse_args` describes; returns the list of losses J of the steps that this call ran."""
    check_args(args)
    shard = start()
    world, rank = shard.size, shard.rank
    device = torch.device(shard.device(args.device))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} doesn't divide over {world} processes")
    state_path = args.out / "train_state.pth"
    if args.resume and not state_path.is_file():
        raise InputError(f"--resume: {state_path} not found; start the run without --resume")
    if not args.resume and state_path.is_file():
        raise InputError(f"{args.out}: holds an unfinished run; pass --resume to go on with it, or delete {state_path}")
    if not args.resume and (args.out / "model.pth").is_file():
        raise InputError(f"--out {args.out}: holds a finished checkpoint; name another folder")

    documents = read_documents(args.data, args.include, args.exclude)
    held_out = [d for d in documents if is_held_out(d[0], args.val_fraction)]
    kept = [d for d in documents if not is_held_out(d[0], args.val_fraction)]
    if not held_out or not kept:  # too few files to split by name: split the text
        text = "".join(text for _, text in documents)
        cut = int(len(text) * (1 - args.val_fraction))
        kept, held_out = [("head", text[:cut])], [("tail", text[cut:])]

    torch.manual_seed(args.seed)
    base = load_model(args.checkpoint_path).requires_grad_(True).train() if args.checkpoint_path else None
    if base and base.config.quantization:
        raise InputError(f"--checkpoint_path {args.checkpoint_path}: is quantized ({base.config.quantization}); train the checkpoint that it was made from")
    if args.layers:
        base = restack(base, args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.tokenizer or (args.checkpoint_path.parent if base else None)
    if rank == 0 and source and source.resolve() != args.out.resolve():
        Tokenizer.load(source).save(args.out)
    if rank == 0 and not source and not args.resume:
        train_tokenizer((text for _, text in kept), args.vocab_size, args.out)
    shard.gather(None)  # the tokenizer is there
    tokenizer = Tokenizer.load(args.out)

    if base:
        model = base
    else:
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=args.dim, n_layer=args.n_layer, n_head=args.n_head,
            n_kv_head=args.n_kv_head or args.n_head, head_dim=args.dim // args.n_head,
            intermediate_size=args.intermediate_size, context=args.context, tied=not args.untied,
            bos_id=tokenizer.bos_id, eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,))
        model = Transformer(config)
        initialize(model)
    objective = LayerSkipLoss(model)
    if args.fsdp:
        mesh = init_device_mesh(device.type, (world,))
        for part in (*model.layers, objective):  # layer by layer, so that no device ever has the whole model
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(objective, "exits")
    model.to(device)
    config = model.config
    tokenizer.check_model(config.vocab_size)
    ids = encode_documents(kept, tokenizer)
    val_ids = encode_documents(held_out, tokenizer)
    if len(ids) < 3 * args.context or len(val_ids) <= args.context:
        raise InputError(f"too little text: {len(ids)} training and {len(val_ids)} validation tokens for --context {args.context}")

    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)

    def learning_rate(step):
        if step < args.warmup:
            return args.lr * (step + 1) / args.warmup
        progress = (step - args.warmup) / max(1, args.steps - args.warmup)  # 0 to 1
        return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

    settings = {k: str(v) for k, v in vars(args).items() if k not in FREE_TO_CHANGE}
    settings["training tokens"] = str(len(ids))
    first_step, history = 0, []
    if args.resume:
        state = read_state(state_path, device)
        if not {"settings", "model", "optimizers", "step"} <= state.keys():
            raise InputError(f"--resume: {state_path} is not the state of a training run")
        changed = [k for k in settings if settings[k] != state["settings"].get(k)]
        if changed:
            raise InputError(f"--resume: {changed[0]} was {state['settings'].get(changed[0])} in {state_path}, now {settings[changed[0]]}")
        load_full_state(state, model, optimizers, args.fsdp)
        first_step = state["step"]

    if args.compile:
        for layer in model.layers:
            layer.compile()
    wrapped = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True) if world > 1 and not args.fsdp else objective
    amp = torch.autocast(device.type, torch.bfloat16) if args.precision == "bfloat16" else nullcontext()
    shown = config.default_exit if args.exit_layer is None else args.exit_layer
    if not 1 <= shown <= config.n_layer:
        raise InputError(f"--exit_layer {shown}: the model has {config.n_layer} layers")
    share = args.batch_size // world

    def save_state(step):
        state = full_state(model, optimizers, args.fsdp) if rank == 0 or args.fsdp else {}
        if rank == 0:
            partial = state_path.with_suffix(".partial")
            torch.save({**state, "step": step, "settings": settings}, partial)
            partial.replace(state_path)

    def interrupted():
        """Whether any process was told to stop: they must all leave the loop at the same step."""
        flag = torch.tensor(len(stop), device=device)
        if world > 1:
            dist.all_reduce(flag)
        return bool(flag)

    def validate(tokens):
        model.eval()
        result = evaluate(objective, val_ids, args.context, share, tokens, amp, device)
        model.train()
        return result

    log = open(args.out / "train_log.jsonl", "a" if args.resume else "w") if rank == 0 else None
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=None if rank == 0 else True, smoothing=0.05)
    step, began, exit_loss = first_step, time.perf_counter(), math.nan
    stop = []  # signals that came; a step is always finished first, so that the saved state is consistent
    previous = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while step < args.steps and not interrupted():
            due = args.eval_every and step % args.eval_every == 0 and step > first_step
            if due and (rank == 0 or args.fsdp):
                losses, agreement, _ = validate(args.eval_tokens)
            if due and rank == 0:
                record = {"step": step, "val_loss": losses.tolist(), "agreement": agreement.tolist(), "seconds": time.perf_counter() - began}
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.write(f"step {step}: validation loss {losses[-1]:.3f}, at exit {shown} {losses[shown - 1]:.3f}, agreement there {agreement[shown - 1]:.1%}", file=sys.stderr)
            g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            skip = dropout_probabilities(config.n_layer, step, args.steps, args.max_dropout, base is None)
            keep = torch.rand(config.n_layer, args.batch_size, generator=g) >= skip[:, None]
            called, keep = keep.any(1), keep[:, rank * share:(rank + 1) * share]
            weights = exit_weights(enabled_exits(config.n_layer, step, args.steps, args.curriculum, args.rotation), args.exit_scale, args.exit_power)
            first = step * args.batch_size + rank * share
            batch = torch.stack([window(ids, i, args.context, args.seed) for i in range(first, first + share)]).to(device)
            with amp:
                loss, losses = wrapped(batch[:, :-1], batch[:, 1:], keep, weights, called if args.fsdp else keep.any(1))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            history.append(loss.item())
            if not math.isfinite(history[-1]):
                raise InputError(f"the loss is {history[-1]} at step {step}: lower --lr")
            exit_loss = exit_loss if losses[shown - 1].isnan() else losses[shown - 1].item()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, exit {shown} {exit_loss:.3f}", refresh=False)
            bar.update()
            if args.save_every and step % args.save_every == 0:
                save_state(step)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    save_state(step)  # also at the end: whatever happens during the last validation, nothing is lost
    if step < args.steps:
        sys.exit(f"stopped after step {step}; --resume goes on from there")

    seconds = time.perf_counter() - began
    if rank == 0 or args.fsdp:
        losses, agreement, tokens = validate(10 ** 9)
        state = full_state(model, [], args.fsdp)["model"]
    if rank == 0:
        record = {"step": step, "val_loss": losses.tolist(), "agreement": agreement.tolist(), "val_tokens": tokens, "seconds": seconds,
                  "tokens_per_second": (step - first_step) * args.batch_size * args.context / max(seconds, 1e-9),
                  "tokens_seen": step * args.batch_size * args.context, "training_tokens": len(ids)}
        log.write(json.dumps(record) + "\n")
        log.close()
        config.source = f"{config.source + ', ' if config.source else ''}trained by scripts/train.py on {record['tokens_seen']} tokens"
        dtype = getattr(torch, args.save_precision)
        state = {k: v.to("cpu", dtype) for k, v in state.items() if not (config.tied and k == "head.weight")}
        save_checkpoint(args.out / "model.pth", state, config)
        state_path.unlink(missing_ok=True)
        print(f"{args.out}/model.pth: validation on {tokens} tokens of held-out text\nexit   loss  agreement with the last layer")
        for i in range(config.n_layer):
            print(f"{i + 1:4d}  {losses[i]:.3f}  {agreement[i]:.1%}")
    return history


if __name__ == "__main__":
    run_command(lambda: train(parse_args()), watch=False)
