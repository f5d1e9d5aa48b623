"""The options of train.py, and what is checked before a training run begins."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from command import InputError, check_device, usable_threads
from model import SIZES
from tokenizer import Tokenizer
from values import filled, filled_path, real, whole

MOST_BATCH = 2**16  # texts at once
POSITIVE = real(1e-12)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of train.py to its parser, in groups."""
    add_data_options(parser)
    add_model_options(parser)
    add_recipe_options(parser)
    add_adapter_options(parser)
    add_optimization_options(parser)
    add_run_options(parser)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What to train on."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=filled,
        nargs="+",
        default=[],
        help="texts, JSONL, parquet, folders of these, hub:OWNER/NAME[:CONFIGURATION]",
    )
    add(
        "--include",
        type=filled,
        default="*",
        help="of folders, the files whose names match (default: %(default)s)",
    )
    add("--exclude", nargs="*", default=[], help="but not those whose path in it matches")
    add(
        "--column",
        type=filled,
        default="text",
        help="of tables and datasets, where the text is (default: %(default)s)",
    )
    add("--template", type=filled, help='makes the text instead: "{question}\n{answer}"')
    add("--split", type=filled, default="train", help="of datasets of the hub (default: %(default)s)")
    add(
        "--packed",
        type=filled_path,
        help="folder for token ids, for several runs (default: in --out)",
    )
    add(
        "--workers",
        type=whole(1, 1024),
        default=usable_threads(),
        help="processes that encode (default: %(default)s)",
    )
    add(
        "--val_fraction",
        type=real(1e-4, 0.9),
        default=0.03,
        help="share of texts for validation (default: %(default)s)",
    )
    add(
        "--tokenizer",
        type=filled_path,
        help="folder with a tokenizer (default: the checkpoint's, or a new one)",
    )
    add(
        "--generate",
        type=whole(2, 10**9),
        metavar="N",
        help="train on N texts that the checkpoint writes itself",
    )
    add("--vocab_size", type=whole(1, 2**20), default=4096, help="tokens of a new tokenizer (default: %(default)s)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model: which checkpoint, or how large a new one is."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint_path", type=filled_path, help="model.pth to train further")
    add(
        "--layers",
        type=whole(0, 10_000),
        nargs="+",
        metavar="N",
        help="take these layers of it, in this order, from 1 on; 0: a new one, which at first changes nothing",
    )
    add("--n_layer", type=SIZES["n_layer"], default=12, help="layers of a new model (default: %(default)s)")
    add("--dim", type=SIZES["dim"], default=320, help="its width (default: %(default)s)")
    add("--n_head", type=SIZES["n_head"], default=5, help="its query heads (default: %(default)s)")
    add("--n_kv_head", type=SIZES["n_kv_head"], help="its key/value heads (default: --n_head)")
    add(
        "--intermediate_size",
        type=SIZES["intermediate_size"],
        default=832,
        help="its feed-forward width (default: %(default)s)",
    )
    add(
        "--context",
        type=whole(1, 2**22),
        default=512,
        help="tokens per example, and a new model's (default: %(default)s)",
    )
    add(
        "--untied",
        action="store_true",
        help="give it a head that is not the embedding",
    )


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Layer dropout and the early-exit loss."""
    add = parser.add_argument_group("recipe").add_argument
    add(
        "--max_dropout",
        type=real(0, 1),
        default=0.1,
        help="p_max: how often the last layer is skipped (default: %(default)s)",
    )
    add("--exit_scale", type=real(), default=1.0, help="e_scale: weight of the early exits (default: %(default)s)")
    add(
        "--exit_power",
        type=real(-100, 100),
        help="early exits weigh e_scale * layer^X, the last 1 (default: the paper's)",
    )
    add(
        "--distill",
        type=real(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of an exit's loss that goes by the last layer, not by the text (default: %(default)s)",
    )
    add(
        "--distill_temperature",
        type=real(0.01, 100),
        default=1.0,
        help="of both distributions (default: %(default)s)",
    )
    add(
        "--curriculum",
        choices=["rotational", "gradual"],
        default="rotational",
        help="which exits are in a step's loss (default: %(default)s)",
    )
    add(
        "--rotation",
        type=whole(1),
        default=4,
        help="R: every R-th exit at a step (default: %(default)s)",
    )


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Early exits for a model that stays as it is."""
    about = "Exits of a checkpoint that stays as it is learn to predict what its last layer does."
    add = parser.add_argument_group("adapters", about).add_argument
    add("--freeze", action="store_true", help="train adapters.pth, beside the checkpoint")
    add(
        "--exits",
        type=SIZES["n_layer"],
        nargs="+",
        metavar="E",
        help="exits that get an adapter (default: at 1/4, 1/2 and 3/4 of the layers)",
    )
    add(
        "--adapter",
        choices=["norm", "block"],
        default="block",
        help="a norm, or a block and a norm (default: %(default)s)",
    )


def add_optimization_options(parser: argparse.ArgumentParser) -> None:
    """Steps, batches and the optimizer."""
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=whole(1), default=4000, help="steps of the whole run (default: %(default)s)")
    add(
        "--batch_size",
        type=whole(1, MOST_BATCH),
        default=8,
        help="examples of a step, of all processes (default: %(default)s)",
    )
    add(
        "--accumulate",
        type=whole(1, MOST_BATCH),
        default=1,
        help="pieces of a step, one after the other (default: %(default)s)",
    )
    add(
        "--activation_checkpointing",
        action="store_true",
        help="less memory, a third more time",
    )
    add(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: of the layers' matrices (default: %(default)s)",
    )
    add("--lr", type=POSITIVE, default=2e-3, help="highest; it ends at a tenth (default: %(default)s)")
    add("--warmup", type=whole(), default=100, help="steps until it is highest (default: %(default)s)")
    add("--weight_decay", type=real(), default=0.1, help="weight decay of the matrices (default: %(default)s)")
    add("--grad_clip", type=POSITIVE, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=whole(0, 2**40), default=0, help="the same seed gives the same run (default: %(default)s)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Files, validations, and how to compute."""
    add = parser.add_argument_group("run").add_argument
    dtypes = ["bfloat16", "float32"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--out",
        type=filled_path,
        help="folder to write (with --freeze: adapters, beside the checkpoint)",
    )
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--save_every", type=whole(), default=500, help="steps between saved states; 0: none (default: %(default)s)")
    add("--eval_every", type=whole(), default=500, help="steps between validations; 0: none (default: %(default)s)")
    add("--eval_tokens", type=whole(1), default=20_000, help="tokens in each (default: %(default)s)")
    add(
        "--exit_layer",
        type=SIZES["n_layer"],
        help="exit whose loss is shown (default: at 1/4 of the layers)",
    )
    add(
        "--log_every",
        type=whole(1),
        default=10,
        help="steps between lines in train_log.jsonl (default: %(default)s)",
    )
    add("--tensorboard", action="store_true", help="write the log to --out/tensorboard too")
    add("--device", default=device, help="such as cpu or cuda (default here: %(default)s)")
    add("--precision", choices=dtypes, help="of products (default: bfloat16 if the processor has it)")
    add("--save_precision", choices=dtypes, default="bfloat16", help="of model.pth (default: %(default)s)")
    add("--compile", action="store_true", help="compile the layers")
    add("--fsdp", action="store_true", help="each process holds a part of the model (FSDP2)")


def check_args(args: argparse.Namespace, world_size: int) -> None:
    """Raise InputError for the first option that doesn't work. world_size: the number of processes."""
    if bool(args.data) == (args.generate is not None):
        raise InputError("name texts with --data, or let the checkpoint write them with --generate N")
    if not args.checkpoint_path:
        for option in ("freeze", "layers"):
            if getattr(args, option):
                raise InputError(f"--{option}: needs --checkpoint_path")
    check_adapter_options(args)
    if args.dim % (2 * args.n_head):
        raise InputError(f"--dim {args.dim}: must be an even multiple of --n_head {args.n_head}")
    if args.n_kv_head is not None and args.n_head % args.n_kv_head:
        raise InputError(f"--n_kv_head {args.n_kv_head}: must divide --n_head {args.n_head}")
    if args.fsdp and world_size == 1:
        raise InputError("--fsdp: needs several processes, which torchrun starts")
    if args.fsdp and args.optimizer == "muon":
        raise InputError("--fsdp: needs --optimizer adamw, as Muon needs whole matrices")
    if args.tokenizer:
        Tokenizer.load(args.tokenizer)
    check_device(args.device)
    if args.batch_size % world_size:
        raise InputError(f"--batch_size {args.batch_size} doesn't divide over {world_size} processes")
    if args.batch_size // world_size % args.accumulate:
        raise InputError(
            f"--accumulate {args.accumulate}: a process's {args.batch_size // world_size} examples of a step can't be "
            "divided into so many equal pieces"
        )


def check_adapter_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that don't go together with --freeze, or not without it."""
    if not args.freeze:
        for option in ("exits", "generate"):
            if getattr(args, option):
                raise InputError(f"--{option}: is for --freeze: give both")
        if not args.out:
            raise InputError("--out: name the checkpoint folder to write")
        return
    for option in ("layers", "fsdp", "tokenizer", "activation_checkpointing"):
        if getattr(args, option):
            raise InputError(f"--{option}: not with --freeze, which leaves the model as it is")


def default_precision(device: str) -> str:
    """The precision for --device if --precision isn't given: bfloat16 if the processor can multiply it."""
    if torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"
