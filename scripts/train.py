"""Train a Llama, new or converted, with the LayerSkip recipe (arXiv 2404.16710): layer dropout and an early-exit loss.

With --freeze, train early exits beside a model that stays as it is. It runs on a CPU, on a GPU, or on several under
torchrun. It ends with a table of the loss and the agreement of every exit.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

import kernels
from adapters import adapters_path, save_adapters
from checkpoint import save_checkpoint
from command import InputError, Parser, caught_signals
from data import Encoder, Sources, is_held_out, load, pack, window
from early import is_out_of_memory
from files import check_writable, replacing
from first_model import load_base, new_model
from freeze import AdapterLoss, check_unchanged, first_adapters, settle_exits
from model import Block, ModelConfig, Transformer
from optimizers import make_optimizers, optimizer_step
from own_text import Author, OwnTexts
from ranks import Shard, run_command, start
from recipe import LayerSkipLoss, Schedule, evaluate
from tokenizer import Tokenizer
from train_log import Evaluation, Report, print_table
from train_options import add_options, check_args, default_precision
from train_state import STATE_FILE, TrainState, fixed_settings, own_folder, whole_weights

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


def prepare_tokenizer(args: argparse.Namespace, sources: Any, shard: Shard) -> Tokenizer:
    """The tokenizer in --out. The first process writes it: --tokenizer, else the checkpoint's, else a new one.

    With --freeze, the checkpoint's own, where it is.
    """
    if args.freeze:
        return Tokenizer.load(args.checkpoint_path.parent)
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
    piece: int  # examples that are computed at once
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
        result = evaluate(objective, self.val_ids, self.context, self.piece, max_tokens, autocast, self.device)
        objective.model.train()
        return result


def load_data(args: argparse.Namespace, sources: Any, encoder: Any, shard: Shard, device: torch.device) -> Data:
    """The documents as ids, which the first process packs; see `pack`. Raises InputError if they are too short to train
    on.
    """
    folder = args.packed or args.out / "tokens"
    if shard.rank == 0:
        pack(sources, encoder, folder, args.val_fraction)
    shard.gather(None)
    ids, val_ids = load(folder, args.val_fraction)
    if len(ids) < 3 * args.context or len(val_ids) <= args.context:
        found = f"{len(ids)} training and {len(val_ids)} validation tokens"
        raise InputError(f"too little text: {found} for --context {args.context}")
    share = args.batch_size // shard.size
    rows = slice(shard.rank * share, (shard.rank + 1) * share)
    return Data(ids, val_ids, args.context, args.batch_size, rows, share // args.accumulate, args.seed, device)


def shard_weights(objective: LayerSkipLoss, device: torch.device, world_size: int) -> None:
    """Leave each process a part of every weight (FSDP2)."""
    mesh = init_device_mesh(device.type, (world_size,))
    for part in (*objective.model.layers, objective):  # layer by layer, so that no device ever has the whole model
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(objective, "exits")


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
    sources: Any
    if args.generate:
        sources = OwnTexts(args.generate)
    else:
        sources = Sources.of(args)
        sources.check()
    torch.manual_seed(args.seed)
    base = None
    if args.checkpoint_path:
        base = load_base(args, device)
    if args.freeze and base:
        settle_exits(args, base.config.n_layer)
    tokenizer = prepare_tokenizer(args, sources, shard)
    model = base or new_model(args, tokenizer)
    tokenizer.check_model(model.config.vocab_size)
    encoder: Any
    if args.generate:
        encoder = Author(model, tokenizer, args.checkpoint_path, args.context, args.seed)
    else:
        encoder = Encoder(tokenizer, args.workers)
    data = load_data(args, sources, encoder, shard, device)
    return data, make_objective(args, model, device, shard.size)


def make_objective(
    args: argparse.Namespace, model: Transformer, device: torch.device, world_size: int
) -> LayerSkipLoss:
    """What is minimized, around the model, on the device."""
    if args.freeze:
        adapters = first_adapters(model, args.exits, args.adapter == "block")
        return AdapterLoss(model, adapters, args.distill_temperature).to(device)
    objective = LayerSkipLoss(model, args.activation_checkpointing, args.distill, args.distill_temperature)
    if args.fsdp:
        shard_weights(objective, device, world_size)
    return objective.to(device)


def parallelize(objective: LayerSkipLoss, args: argparse.Namespace, world_size: int) -> nn.Module:
    """The module that a step calls: the objective, compiled under --compile, and under DDP in its wrapper."""
    if args.compile:
        for module in objective.modules():
            if isinstance(module, Block):
                module.compile()
    if world_size > 1 and not args.fsdp:
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    return objective


def compute_gradients(
    parallel: nn.Module, data: Data, schedule: Schedule, step: int, autocast: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """Forward and backward on this process's part of the batch, --accumulate pieces one after the other.

    Returns the loss J () and the exits' losses (L,), of the whole batch: in every process the same.
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
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
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
    if args.freeze:
        made = adapters_path(args.checkpoint_path)
        if made.exists() and not args.resume:
            raise InputError(f"{made}: exists already; move it and adapters.json away to train others")
        if shard.rank == 0:
            check_writable("--freeze", made)
        args.out = args.out or made.with_suffix("")
    with own_folder(args.out, args.resume, shard.rank):
        return train_in_folder(args, shard)


def train_in_folder(args: argparse.Namespace, shard: Shard) -> list[float]:
    """The run, in the folder that is kept for it. See `train`."""
    device = own_device(args.device, shard)
    data, objective = load_data_and_model(args, shard, device)
    with plain_products():
        return run(args, shard, device, data, objective)


@contextmanager
def plain_products() -> Iterator[None]:
    """Leave products and norms to PyTorch, whether or not decoding's kernels are loaded, which round otherwise: own
    texts were written with them in this process, or in an earlier one.
    """
    before = kernels.enabled
    kernels.enabled = False
    try:
        yield
    finally:
        kernels.enabled = before


def run(
    args: argparse.Namespace, shard: Shard, device: torch.device, data: Data, objective: LayerSkipLoss
) -> list[float]:
    """All steps from the first, or from the saved state on, and what follows them. See `train`."""
    model = objective.model
    schedule = Schedule(args, model.config.n_layer)
    trained = objective.trained
    optimizers = make_optimizers(trained, args.optimizer, args.lr, args.weight_decay)
    settings = fixed_settings(args, len(data.train_ids))
    train_state = TrainState(args.out / STATE_FILE, settings, trained, optimizers, args.steps, shard, args.fsdp)
    first_step = train_state.load() if args.resume else 0
    parallel = parallelize(objective, args, shard.size)
    autocast = mixed_precision(args.precision, device)
    report = Report(args, model.config, first_step, shard.rank)
    validates = shard.rank == 0 or args.fsdp  # under FSDP all processes are needed; the first one reports
    validated = shard.share(report.validated)

    step, history = first_step, []
    with report.bar, caught_signals() as signals:
        while step < args.steps and not in_any_process(bool(signals), device, shard.size):
            if validates and step > validated and is_due(step, args.eval_every):
                report.validation(step, data.validate(objective, args.eval_tokens, autocast))
            loss, losses = compute_gradients(parallel, data, schedule, step, autocast)
            norm = nn.utils.clip_grad_norm_(trained.parameters(), args.grad_clip)
            rate = schedule.learning_rate(step)
            step += 1
            history.append(loss.item())
            gradient_norm = norm.item()
            check_step(step, history[-1], gradient_norm)
            optimizer_step(optimizers, rate)
            report.step(step, history[-1], losses, learning_rate=rate, gradient_norm=gradient_norm)
            if is_due(step, args.save_every):
                train_state.save(step)
    train_state.save(step)  # also at the end, so that nothing is lost if the last validation fails
    if step < args.steps:
        sys.exit(f"stopped after step {step}; --resume goes on from there")

    if validates:
        seconds = report.seconds()
        result = data.validate(objective, len(data.val_ids), autocast)
        state_dict = whole_weights(trained, args.fsdp)
    if shard.rank == 0:
        report.end(step, result, seconds, len(data.train_ids))
        path = save_result(args, objective, state_dict)
        if not args.generate:  # that took long, and may be wanted again
            shutil.rmtree(args.out / "tokens", ignore_errors=True)
        train_state.delete()
        print_table(path, result)
    return history


def save_result(args: argparse.Namespace, objective: LayerSkipLoss, state: dict[str, Tensor]) -> Path:
    """Write the finished model.pth with these weights, or with --freeze adapters.pth. Returns its path.

    Raises InputError if a model that was to stay as it was did not.
    """
    note = f"trained by scripts/train.py on {args.steps * args.batch_size * args.context} tokens"
    dtype = getattr(torch, args.save_precision)
    if args.freeze:
        path = adapters_path(args.checkpoint_path)
        check_unchanged(objective.model, args.checkpoint_path)
        save_adapters(path, objective.model.adapters, note, dtype)
        return path
    path = args.out / "model.pth"
    save_model(path, state, objective.model.config, note, dtype)
    return path


def save_model(path: Path, state: dict[str, Tensor], config: ModelConfig, note: str, dtype: torch.dtype) -> None:
    """Write the finished model.pth in this dtype, and model.json beside it. note: where it comes from."""
    config.source = f"{config.source}, {note}" if config.source else note
    if config.tied:  # the head is the embedding, and the file has it once
        state = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    save_checkpoint(path, {name: tensor.to("cpu", dtype) for name, tensor in state.items()}, config)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options as given; `train` checks them."""
    parser = Parser(
        description=__doc__,
        usage="train.py (--data PATH... | --generate N) [--checkpoint_path PATH] --out FOLDER [options]",
    )
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
