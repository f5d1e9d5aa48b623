"""The command that quantizes a checkpoint's weights, to the nearest value or by GPTQ.

Quantized are the matrices of the layers and the head. The head is int8 in either mode: every token reads all of it, and
the choice of the token is most sensitive to it. The norms stay as they are, and so does the embedding, of which a token
reads one row. Where the head is tied to the embedding, it becomes an int8 copy.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from early import begin

    begin()

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (
    check_finite,
    described_by,
    expected_tensors,
    load_config,
    read_checkpoint,
    release,
    saved,
    verified,
)
from command import InputError, Parser, check_device, run_command
from files import check_fields, read_lines, read_text
from kernels.formats import GROUPSIZES, dequantize, int4_range, int4_round, int8_rows, pack, round_weight
from model import SIZES, Block, Linear, ModelConfig, Transformer
from tokenizer import Tokenizer
from values import NOTHING, TEXT, filled_path, whole

State = dict[str, Tensor]
Inputs = list[tuple[Tensor, tuple]]  # for each text what Block takes: hidden states (1, T, D) and Transformer.positions


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a Hessian (K, K), its columns in this order (K,)."""
    ordered = hessian[order][:, order]
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)


def gptq(
    w: Tensor, hessian: Tensor, groupsize: int, act_order: bool = False, damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """w (N, K) as (weight, scale, zero) in int4, rounded column by column (Frantar et al. 2210.17323, Cholesky form).

    Each column's error is made up for by the columns that follow. hessian: (K, K), the sum of x x^T over calibration
    inputs x. act_order: take the columns in the order of their weight in the Hessian, with the ranges of the groups
    fixed beforehand; otherwise in their own order, each range chosen when its turn comes.
    """
    w = w.float().clone()
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that never occurred
    diagonal.add_(damp * diagonal.mean())
    order = torch.arange(w.shape[1], device=w.device)
    if act_order:
        order = diagonal.argsort(descending=True)
    inverse = inverse_factor(hessian, order)
    scale, zero = int4_range(w.unflatten(1, (-1, groupsize)))
    q = torch.empty_like(w, dtype=torch.uint8)
    w = w[:, order]
    for start in range(0, w.shape[1], groupsize):  # a block at a time: the columns beyond it are updated once
        end = start + groupsize
        if not act_order:
            g = start // groupsize
            scale[:, g], zero[:, g] = int4_range(w[:, start:end])
        errors = torch.empty_like(w[:, start:end])
        for i in range(start, end):
            group = order[i] // groupsize
            s = scale[:, group].float()
            z = zero[:, group].float()
            rounded = int4_round(w[:, i], s, z)
            q[:, order[i]] = rounded
            error = (w[:, i] - ((rounded.float() - 8) * s + z)) / inverse[i, i]
            w[:, i:end] -= error[:, None] * inverse[i, i:end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ inverse[start:end, end:]
    return pack(q), scale, zero


def quantize(
    w: Tensor, quantization: str, groupsize: int, hessian: Tensor | None = None, act_order: bool = False
) -> State:
    """A Linear's "weight", "scale" and, for int4, "zero" for w (N, K), in the format that Linear chooses."""
    if hessian is None or w.shape[1] % groupsize:
        weight, scale, zero = round_weight(w, quantization, groupsize)
    else:
        weight, scale, zero = gptq(w, hessian, groupsize, act_order)
    tensors = {"weight": weight, "scale": scale}
    if zero is not None:
        tensors["zero"] = zero
    return tensors


def observe(block: Block, linears: dict[str, Linear], inputs: Inputs) -> dict[str, Tensor]:
    """The Hessian (K, K) of each of a block's Linears: the sum of x x^T over what it gets for the block's inputs."""
    hessians: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].flatten(0, 1)
            hessians[name] = hessians.get(name, 0) + x.T @ x

        return add

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    for x, positions in inputs:
        block(x, *positions)
    for handle in hooks:
        handle.remove()
    return hessians


def quantize_layer(state: State, config: ModelConfig, groupsize: int, inputs: Inputs, act_order: bool) -> State:
    """One layer by GPTQ. state: its tensors by their names in Block.

    Returns the quantized tensors by their names. The `inputs` are replaced by the quantized layer's outputs.
    """
    block = Block(config).requires_grad_(False).to(inputs[0][0].device)
    block.load_state_dict({name: t.float() for name, t in state.items()})
    linears = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
    hessians = observe(block, linears, inputs)
    quantized = {}
    for name, module in linears.items():
        tensors = quantize(module.weight, "int4", groupsize, hessians[name], act_order)
        for part, t in tensors.items():
            quantized[f"{name}.{part}"] = t
        module.weight.copy_(dequantize(tensors["weight"], tensors["scale"], tensors.get("zero"), torch.float32))
    for i, (x, positions) in enumerate(inputs):
        inputs[i] = block(x, *positions), positions
    return quantized


def round_layer(state: State, quantization: str, groupsize: int) -> State:
    """One layer to the nearest value. Takes and returns what `quantize_layer` does."""
    quantized = {}
    for name, w in state.items():
        if w.dim() == 2:  # not a norm
            for part, t in quantize(w, quantization, groupsize).items():
                quantized[f"{name.removesuffix('.weight')}.{part}"] = t
    return quantized


def layer_state(state: State, i: int) -> State:
    """The tensors of layer i by their names in Block."""
    prefix = f"layers.{i}."
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def quantized_config(
    config: ModelConfig, quantization: str, groupsize: int, exit_layer: int | None, path: Path
) -> ModelConfig:
    """The description of the result for a checkpoint of this description. Raises InputError if it can't be made."""
    if config.quantization:
        advice = "give the checkpoint that it was made from"
        raise InputError(f"--checkpoint_path {path}: is quantized already ({config.quantization}); {advice}")
    if exit_layer is not None:
        if not 1 <= exit_layer < config.n_layer:
            depth = f"the model has {config.n_layer} layers, so 1 to {config.n_layer - 1} can be drafted with"
            raise InputError(f"--early_exit {exit_layer}: {depth}")
        config = replace(config, n_layer=exit_layer)
    return replace(config, quantization=quantization, groupsize=groupsize if quantization == "int4" else None)


def check_groupsize(wanted: State, groupsize: int, path: Path) -> None:
    """For int4: print which matrices stay in int8. Raises InputError if all do. wanted: what the result will hold."""
    coarse = set()  # matrices of a layer that are left in int8
    fine = False  # whether there is any int4
    for name, t in wanted.items():
        if name.startswith("layers.") and t.dtype == torch.int8:
            coarse.add(name.split(".", 2)[-1])
        fine = fine or t.dtype == torch.uint8
    if coarse and not fine:
        advice = "take a smaller one, or --mode int8"
        raise InputError(f"--groupsize {groupsize}: divides the width of no matrix of {path}; {advice}")
    if coarse:
        print(f"note: group size {groupsize} doesn't divide the width of {', '.join(sorted(coarse))}: left in int8")


def first_inputs(state: State, config: ModelConfig, calibration: Sequence[Tensor], device: str) -> Inputs:
    """What the first layer gets for each of the calibration texts, token ids (T,)."""
    model = Transformer(replace(config, n_layer=1))  # for its embedding and positions
    model.embed.load_state_dict({"weight": state["embed.weight"].float()})
    model.to(device)
    return [(model.embed(ids[None].to(device)), model.positions(len(ids), None)) for ids in calibration]


def result_types(wanted: State, dtype: torch.dtype) -> State:
    """The result's tensors: what is not quantized has the checkpoint's dtype; scales of int8 stay float32."""
    tensors = {}
    for name, t in wanted.items():
        keep = t.dtype != torch.float32 or name.endswith("scale")
        tensors[name] = t if keep else t.to(dtype)
    return tensors


@torch.inference_mode()
def quantize_checkpoint(
    path: Path,
    out: Path,
    mode: str,
    groupsize: int,
    calibration: Sequence[Tensor] = (),
    act_order: bool = False,
    device: str = "cpu",
    exit_layer: int | None = None,
) -> None:
    """Write the quantized checkpoint `out`, and its description, of the checkpoint `path`: layer by layer.

    mode: "int8", "int4" or "int4-gptq", which wants calibration, a list of token ids (T,), and computes on `device`.
    exit_layer: of a model that ends there, to draft for the whole one. The file is written whole or not at all. Raises
    InputError.
    """
    state, config = read_checkpoint(path)
    quantization = mode.split("-")[0]
    new = quantized_config(config, quantization, groupsize, exit_layer, path)
    wanted = expected_tensors(new)
    if quantization == "int4":
        check_groupsize(wanted, groupsize, path)
    inputs = []
    if mode == "int4-gptq":
        inputs = first_inputs(state, config, calibration, device)
    float_config = replace(new, quantization=None, groupsize=None)
    types = result_types(wanted, state["embed.weight"].dtype)
    with saved(out, types, new) as result, verified(path, described_by(path)):
        for i in tqdm(range(new.n_layer), desc=mode, unit="layer", disable=None):
            tensors = layer_state(state, i)
            for name, t in tensors.items():
                check_finite(t, f"{path}: tensor layers.{i}.{name}")
            if inputs:
                matrices = quantize_layer(tensors, float_config, groupsize, inputs, act_order)
            else:
                matrices = round_layer(tensors, quantization, groupsize)
            for name, t in (tensors | matrices).items():
                result[f"layers.{i}.{name}"].copy_(t)
            for t in tensors.values():
                release(t)
        for name in sorted(state.keys() & {"embed.weight", "head.weight", "norm.weight"}):
            check_finite(state[name], f"{path}: tensor {name}")
        head = state["embed.weight" if config.tied else "head.weight"]
        weight, scale = int8_rows(head)
        result["head.weight"].copy_(weight)
        result["head.scale"].copy_(scale)
        for name in ("embed.weight", "norm.weight"):
            result[name].copy_(state[name])


def calibration_text(path: Path) -> str:
    """A text file, or the prompts and references of a JSONL file. Raises InputError."""
    if path.suffix != ".jsonl":
        return read_text(path, pipes=True)
    texts = []
    for where, row in read_lines(path):
        check_fields(row, {"prompt": TEXT, "reference": TEXT | NOTHING}, where)
        texts.append(row["prompt"] + (row.get("reference") or ""))
    return "\n".join(texts)


def calibration_windows(
    path: str | Path, tokenizer: Tokenizer, config: ModelConfig, length: int, count: int
) -> list[Tensor]:
    """Token ids (T,) of `count` windows of `length`, evenly spread over the text that `calibration_text` reads."""
    ids = torch.tensor(tokenizer.encode(calibration_text(Path(path)), special=False))
    length = min(length, config.context)
    if len(ids) < 2 * length:
        raise InputError(f"--calibration {path}: has {len(ids)} tokens; at least {2 * length} are needed")
    count = min(count, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long()
    return [ids[start : start + length] for start in starts]


def arguments() -> argparse.Namespace:
    p = Parser(
        description="Quantize a checkpoint's weights. The result lies beside it, and generate.py takes it as any other."
    )
    p.add_argument("--checkpoint_path", type=filled_path, required=True, help="model.pth of a prepared checkpoint")
    p.add_argument(
        "--mode",
        choices=["int8", "int4", "int4-gptq"],
        default="int8",
        help="int4-gptq calibrates on a text (default: %(default)s)",
    )
    p.add_argument(
        "--groupsize",
        type=whole(1),
        choices=GROUPSIZES,
        default=128,
        help="of int4: weights that share a scale (default: %(default)s)",
    )
    p.add_argument(
        "--early_exit",
        "--exit_layer",
        type=SIZES["n_layer"],
        metavar="E",
        help="write the first E layers and the head alone: a draft model for the unquantized checkpoint, see "
        "--draft_checkpoint_path of generate.py",
    )
    p.add_argument(
        "--calibration",
        type=filled_path,
        metavar="FILE",
        help="text like what the model will write, for int4-gptq, plain or as prompts.jsonl (default: prompts.jsonl "
        "beside the checkpoint, if it is there)",
    )
    p.add_argument(
        "--calibration_windows", type=whole(1), default=64, help="pieces of it to use (default: %(default)s)"
    )
    p.add_argument("--calibration_length", type=whole(2), default=512, help="tokens in each (default: %(default)s)")
    p.add_argument("--act_order", action="store_true", help="int4-gptq: the most important columns first")
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where int4-gptq computes (default here: %(default)s)",
    )
    return p.parse_args()


def calibrate(args: argparse.Namespace) -> list[Tensor]:
    """The texts that the options name, as token ids (T,). Raises InputError."""
    checkpoint = args.checkpoint_path
    prompts = checkpoint.with_name("prompts.jsonl")
    path = args.calibration
    if not path and prompts.is_file():
        path = prompts
    if not path:
        raise InputError("--mode int4-gptq: needs --calibration, a text file like what the model will write")
    check_device(args.device)
    config = load_config(described_by(checkpoint))
    tokenizer = Tokenizer.load(checkpoint.parent)
    tokenizer.check_model(config.vocab_size)
    return calibration_windows(path, tokenizer, config, args.calibration_length, args.calibration_windows)


def main() -> None:
    args = arguments()
    source = args.checkpoint_path
    calibration = []
    if args.mode == "int4-gptq":
        calibration = calibrate(args)
    name = args.mode
    if args.mode != "int8":
        name += f".g{args.groupsize}"
    if args.early_exit is not None:
        name += f".e{args.early_exit}"
    out = source.with_name(f"{source.stem}_{name}.pth")
    quantize_checkpoint(
        source, out, args.mode, args.groupsize, calibration, args.act_order, args.device, args.early_exit
    )
    before = source.stat().st_size
    after = out.stat().st_size
    print(f"wrote {out}: {after / 1e9:.3f} GB, {after / before:.0%} of {source.name}")


if __name__ == "__main__":
    run_command(main)
