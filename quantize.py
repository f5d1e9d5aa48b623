"""The command that quantizes a checkpoint's weights, to the nearest value or by GPTQ.

Quantized are the matrices of the layers and the head, which is int8 in either mode: every token reads all of it, and the choice of the
token is most sensitive to it. The embedding, of which a token reads one row, and the norms stay as they are; where the head is
tied to the embedding, it becomes an int8 copy.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import check_state, expected_tensors, load_config, read_state, release, saved
from command import InputError, check_device, run_command
from kernels.formats import GROUPSIZES, dequantize, int4_groups, int4_range, int4_round, int8_rows, pack
from model import Block, Linear, Transformer
from tokenizer import Tokenizer


def gptq(w, hessian, groupsize, act_order=False, damp=0.01):
    """w (N, K) as (weight, scale, zero) in int4, rounded column by column, each column's error made up for by those that follow
    (Frantar et al. 2210.17323, its Cholesky form).

    hessian: (K, K), the sum of x x^T over calibration inputs x. act_order: columns in the order of their weight in the
    Hessian, the ranges of the groups fixed beforehand; otherwise in their own order, each range chosen when its turn comes.
    """
    w, hessian = w.float().clone(), hessian.float().clone()
    dead = hessian.diagonal() == 0  # inputs that never occurred
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(w.shape[1], device=w.device)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order])), upper=True)
    scale, zero = int4_range(w.unflatten(1, (-1, groupsize)))
    q = torch.empty_like(w, dtype=torch.uint8)
    w = w[:, order]
    for start in range(0, w.shape[1], groupsize):  # a block at a time: the columns beyond it are updated once
        columns = slice(start, start + groupsize)
        if not act_order:
            scale[:, start // groupsize], zero[:, start // groupsize] = int4_range(w[:, columns])
        errors = torch.empty_like(w[:, columns])
        for i in range(start, start + groupsize):
            group = order[i] // groupsize
            s, z = scale[:, group].float(), zero[:, group].float()
            q[:, order[i]] = int4_round(w[:, i], s, z)
            error = (w[:, i] - ((q[:, order[i]].float() - 8) * s + z)) / inverse[i, i]
            w[:, i : start + groupsize] -= error[:, None] * inverse[i, i : start + groupsize]
            errors[:, i - start] = error
        w[:, start + groupsize :] -= errors @ inverse[columns, start + groupsize :]
    return pack(q), scale, zero


def quantize(w, quantization, groupsize, hessian=None, act_order=False):
    """The tensors of a Linear {"weight", "scale", "zero"} for w (N, K), in the format that Linear chooses."""
    if quantization == "int8" or w.shape[1] % groupsize:
        return dict(zip(("weight", "scale"), int8_rows(w)))
    tensors = int4_groups(w, groupsize) if hessian is None else gptq(w, hessian, groupsize, act_order)
    return dict(zip(("weight", "scale", "zero"), tensors))


def quantize_layer(state, config, groupsize, inputs, act_order):
    """One layer by GPTQ. state: its tensors by their names in Block. inputs: a list of what Block takes for a text, its hidden
    states (1, T, D) and positions.

    Returns the quantized tensors by their names; `inputs` are replaced by the quantized layer's outputs.
    """
    block = Block(config).requires_grad_(False).to(inputs[0][0].device)
    block.load_state_dict({name: t.float() for name, t in state.items()})
    hessians = {}

    def observe(name):
        def hook(module, args):
            x = args[0].flatten(0, 1)
            hessians[name] = hessians.get(name, 0) + x.T @ x

        return hook

    linears = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
    hooks = [module.register_forward_pre_hook(observe(name)) for name, module in linears.items()]
    for x, positions in inputs:
        block(x, *positions)
    for hook in hooks:
        hook.remove()
    out = {}
    for name, module in linears.items():
        tensors = quantize(module.weight, "int4", groupsize, hessians[name], act_order)
        out |= {f"{name}.{part}": t for part, t in tensors.items()}
        module.weight.copy_(dequantize(tensors["weight"], tensors["scale"], tensors.get("zero"), torch.float32))
    for i, (x, positions) in enumerate(inputs):
        inputs[i] = block(x, *positions), positions
    return out


@torch.inference_mode()
def quantize_checkpoint(path, out, mode, groupsize, calibration=(), act_order=False, device="cpu", exit_layer=None):
    """Write the quantized checkpoint `out` (and its description) of the checkpoint `path`, layer by layer, whole or not at all.

    mode: "int8", "int4" or "int4-gptq", which wants calibration, a list of token ids (T,), and computes on `device`. exit_layer: of a
    model that ends there, to draft for the whole one. Raises InputError.
    """
    config, state = load_config(path.with_suffix(".json")), read_state(path)
    check_state(state, config, path)
    if config.quantization:
        raise InputError(
            f"--checkpoint_path {path}: is quantized already ({config.quantization}); give the checkpoint that it was made from"
        )
    if exit_layer is not None:
        if not 1 <= exit_layer < config.n_layer:
            raise InputError(
                f"--early_exit {exit_layer}: the model has {config.n_layer} layers, so 1 to {config.n_layer - 1} can be drafted with"
            )
        config = replace(config, n_layer=exit_layer)
    quantization = mode.split("-")[0]
    new = replace(config, quantization=quantization, groupsize=groupsize if quantization == "int4" else None)
    wanted = expected_tensors(new)
    coarse = sorted(
        {name.split(".", 2)[-1] for name, t in wanted.items() if name.startswith("layers.") and t.dtype == torch.int8}
    )
    if quantization == "int4" and coarse:
        if not any(t.dtype == torch.uint8 for t in wanted.values()):
            raise InputError(
                f"--groupsize {groupsize}: divides the width of no matrix of {path}; take a smaller one, or --mode int8"
            )
        print(f"note: group size {groupsize} doesn't divide the width of {', '.join(coarse)}: left in int8")
    dtype = state["embed.weight"].dtype

    inputs = []
    if mode == "int4-gptq":
        whole = Transformer(replace(config, n_layer=1))  # for its embedding and positions
        whole.embed.load_state_dict({"weight": state["embed.weight"].float()})
        whole.to(device)
        inputs = [(whole.embed(ids[None].to(device)), whole.positions(len(ids), None)) for ids in calibration]

    def layer_state(i):
        prefix = f"layers.{i}."
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    with saved(
        out,
        {
            name: t.to(dtype) if t.dtype == torch.float32 and not name.endswith("scale") else t
            for name, t in wanted.items()
        },
        new,
    ) as result:
        for i in tqdm(range(config.n_layer), desc=mode, unit="layer", disable=None):
            tensors, matrices = layer_state(i), {}
            if inputs:
                matrices = quantize_layer(tensors, config, groupsize, inputs, act_order)
            for name, t in tensors.items():
                linear = name.removesuffix(".weight")
                if f"layers.{i}.{linear}.scale" not in wanted:
                    matrices[name] = t
                elif not inputs:
                    matrices |= {f"{linear}.{part}": q for part, q in quantize(t, quantization, groupsize).items()}
            for name, t in matrices.items():
                result[f"layers.{i}.{name}"].copy_(t)
            for t in tensors.values():
                release(t)
        for part, t in quantize(state["embed.weight" if config.tied else "head.weight"], "int8", None).items():
            result[f"head.{part}"].copy_(t)
        for name in ("embed.weight", "norm.weight"):
            result[name].copy_(state[name])


def calibration_windows(path, tokenizer, config, length, count):
    """Token ids [(T,), ...] of a text file, or of the prompts and references of a JSONL file: `count` windows of `length`, evenly spread."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            text = "\n".join(
                row["prompt"] + (row.get("reference") or "")
                for row in map(json.loads, filter(str.strip, text.split("\n")))
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--calibration {path}: not UTF-8 text, or not JSON objects with a 'prompt'") from None
    except OSError as error:
        raise InputError(f"--calibration {path}: can't be read ({error.strerror})") from None
    ids = torch.tensor(tokenizer.encode(text, special=False))
    length = min(length, config.context)
    if len(ids) < 2 * length:
        raise InputError(f"--calibration {path}: has {len(ids)} tokens; at least {2 * length} are needed")
    count = min(count, len(ids) // length)
    return [ids[start : start + length] for start in torch.linspace(0, len(ids) - length, count).long()]


def main():
    p = argparse.ArgumentParser(
        description="Quantize a checkpoint's weights. The result lies beside it, and generate.py takes it as any other."
    )
    p.add_argument("--checkpoint_path", type=Path, required=True, help="model.pth of a prepared checkpoint")
    p.add_argument(
        "--mode",
        choices=["int8", "int4", "int4-gptq"],
        default="int8",
        help="int4-gptq calibrates on a text (default: %(default)s)",
    )
    p.add_argument(
        "--groupsize",
        type=int,
        choices=GROUPSIZES,
        default=128,
        help="of int4: weights that share a scale (default: %(default)s)",
    )
    p.add_argument(
        "--early_exit",
        "--exit_layer",
        type=int,
        metavar="E",
        help="write the first E layers and the head alone: a draft model for the unquantized checkpoint, see --draft_checkpoint_path of generate.py",
    )
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like what the model will write, for int4-gptq, plain or as prompts.jsonl (default: prompts.jsonl beside the checkpoint, if it is there)",
    )
    p.add_argument("--calibration_windows", type=int, default=64, help="pieces of it to use (default: %(default)s)")
    p.add_argument("--calibration_length", type=int, default=512, help="tokens in each (default: %(default)s)")
    p.add_argument("--act_order", action="store_true", help="int4-gptq: the most important columns first")
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where int4-gptq computes (default here: %(default)s)",
    )
    args = p.parse_args()
    calibration = ()
    if args.mode == "int4-gptq":
        beside = args.checkpoint_path.with_name("prompts.jsonl")
        args.calibration = args.calibration or (beside if beside.is_file() else None)
        if not args.calibration:
            raise InputError("--mode int4-gptq: needs --calibration, a text file like what the model will write")
        check_device(args.device)
        if args.calibration_windows < 1 or args.calibration_length < 2:
            raise InputError("--calibration_windows and --calibration_length: must be 1 and 2 or more")
        config = load_config(args.checkpoint_path.with_suffix(".json"))
        calibration = calibration_windows(
            args.calibration,
            Tokenizer.load(args.checkpoint_path.parent),
            config,
            args.calibration_length,
            args.calibration_windows,
        )
    name = ("int8" if args.mode == "int8" else f"{args.mode}.g{args.groupsize}") + (
        f".e{args.early_exit}" if args.early_exit is not None else ""
    )
    out = args.checkpoint_path.with_name(f"{args.checkpoint_path.stem}_{name}.pth")
    quantize_checkpoint(
        args.checkpoint_path, out, args.mode, args.groupsize, calibration, args.act_order, args.device, args.early_exit
    )
    before, after = args.checkpoint_path.stat().st_size, out.stat().st_size
    print(f"wrote {out}: {after / 1e9:.3f} GB, {after / before:.0%} of {args.checkpoint_path.name}")


if __name__ == "__main__":
    run_command(main)
