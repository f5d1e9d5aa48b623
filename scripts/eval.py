"""Measure how good a checkpoint is, at its last layer and at every exit.

--tasks: run tasks of EleutherAI's lm-evaluation-harness. Log-likelihoods are those of the whole model, or of
--exit_layer. Texts are decoded plainly, or with --self_speculative. Writes FILE.json (the harness's results), and
FILE.jsonl and FILE.csv (a row per metric). Each answer is kept at once, so that an interrupted evaluation goes on where
it was. Only rolling log-likelihoods are all kept at the end.

--text: measure every exit on a text file: loss, perplexity, and agreement with the last layer. With --draft_precision
int8 or int4, also every exit of a copy of the layers, behind which the head is still the model's own. Writes
FILE.text.csv and a plot, FILE.text.png. With --reference, the agreement is with the last layer of that checkpoint. For
example, compare a quantized checkpoint with the checkpoint that it was made from.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import argparse
import json
import math
from contextlib import nullcontext
from typing import Any

import torch

import tasks
from command import InputError, Parser, run_command
from drafters import check_precision
from files import read_text, write_text
from generate import CHECKPOINTS, DRAFT_LENGTH, Decoder, Sampling, load
from model import SIZES, Transformer
from recipe import LayerSkipLoss, evaluate
from tokenizer import Tokenizer
from train_options import MOST_BATCH
from values import MOST, filled, filled_path, whole


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises InputError for values that don't work."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--checkpoint_path",
        type=filled_path,
        default=CHECKPOINTS / "demo" / "model.pth",
        help="default: the demo checkpoint",
    )
    p.add_argument(
        "--out",
        type=filled,
        default="eval",
        metavar="FILE",
        help="where to write, without suffix (default: %(default)s)",
    )
    p.add_argument(
        "--batch_size", type=whole(1, MOST_BATCH), default=8, help="texts to score at once (default: %(default)s)"
    )
    p.add_argument("--device", default=tasks.default_device(), help="default here: %(default)s")
    p.add_argument(
        "--precision",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on CUDA, float32 on the CPU",
    )
    add_harness_options(p.add_argument_group("tasks of the harness"))
    add_text_options(p.add_argument_group("a text"))
    args = p.parse_args(argv)
    check_options(args)
    return args


def add_harness_options(g: argparse._ArgumentGroup) -> None:
    """What --tasks takes."""
    g.add_argument("--tasks", nargs="+", metavar="NAME", default=[], help="such as hellaswag arc_easy humaneval")
    g.add_argument(
        "--include_path", type=filled_path, metavar="DIR", help="folder with your own task descriptions (YAML)"
    )
    g.add_argument("--num_fewshot", type=whole(), help="solved examples before each question (default: the task's)")
    g.add_argument("--limit", type=whole(1), help="use only the first N examples of each task, to try things out")
    g.add_argument(
        "--exit_layer", type=SIZES["n_layer"], help="layer that gives the log-likelihoods (default: the last layer)"
    )
    g.add_argument(
        "--self_speculative",
        action="store_true",
        help="decode texts with self-speculation, which doesn't change their distribution",
    )
    g.add_argument(
        "--early_exit", type=SIZES["n_layer"], help="draft with this many layers (default: a quarter of them)"
    )
    g.add_argument(
        "--speculate_k", type=DRAFT_LENGTH, default=4, help="tokens to draft per round (default: %(default)s)"
    )
    g.add_argument("--compile", action="store_true", help="compile decoding")
    g.add_argument(
        "--max_gen_toks", type=whole(1), help="largest number of tokens in a generated text (default: the task's)"
    )
    g.add_argument(
        "--run_code",
        action="store_true",
        help="run code that the model wrote, as humaneval and mbpp need: UNSAFE outside a sandbox",
    )
    g.add_argument("--log_samples", action="store_true", help="keep every question and answer in FILE.json")


def add_text_options(g: argparse._ArgumentGroup) -> None:
    """What --text takes."""
    g.add_argument(
        "--text",
        type=filled_path,
        metavar="FILE",
        help="measure loss, perplexity and agreement of every exit on this text",
    )
    g.add_argument(
        "--draft_precision",
        nargs="+",
        choices=["same", "int8", "int4"],
        help="measure the layers themselves, or copies of them in int8 or int4 (default: same)",
    )
    g.add_argument(
        "--window",
        type=whole(1),
        default=512,
        help="tokens to score together, at most the context (default: %(default)s)",
    )
    g.add_argument(
        "--max_tokens",
        type=whole(1),
        default=MOST,
        help="score this many tokens of the text, in evenly spread windows (default: all)",
    )
    g.add_argument(
        "--reference",
        type=filled_path,
        metavar="CHECKPOINT",
        help="model.pth whose last layer the exits must agree with (default: the checkpoint's own)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for values that don't work, or don't work together."""
    if not args.tasks and not args.text:
        raise InputError("nothing to do: give --tasks, --text or both")
    if args.early_exit is not None and not args.self_speculative:
        raise InputError("--early_exit is for --self_speculative: give both; --exit_layer is for log-likelihoods")
    if args.draft_precision and not args.text:
        raise InputError("--draft_precision is for --text: give both")
    tasks.check_machine(args.device)
    tasks.check_outputs(args, ".json", ".jsonl", ".csv", ".png")


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    if args.exit_layer is not None and not 1 <= args.exit_layer <= model.config.n_layer:
        raise InputError(f"--exit_layer {args.exit_layer}: the model has layers 1 to {model.config.n_layer}")
    for precision in args.draft_precision or ():
        check_precision(precision, model.config.quantization)
    if args.tasks:
        evaluate_tasks(args, model, tokenizer)
    if args.text:
        evaluate_text(args, model, tokenizer)


# Tasks of the harness.


def evaluate_tasks(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> None:
    """Run --tasks. Write and print their metrics."""
    draft = None
    if args.self_speculative:
        draft = model.default_exit if args.early_exit is None else args.early_exit

    def build(sampling: Sampling, rows: int) -> Decoder:
        how = dict(exit_layer=draft, k=args.speculate_k, compile=args.compile, seed=0)
        return Decoder(model, sampling=sampling, rows=rows, **how)

    build(Sampling(), 1)  # if an option is out of range, the error comes now
    from harness import Engine, run_tasks

    results = run_tasks(args, Engine(model, tokenizer, args.exit_layer, build, args.batch_size))
    write_text(f"{args.out}.json", json.dumps(results, default=str) + "\n")
    rows = metric_rows(results["results"])
    tasks.write_rows(args.out, rows)
    layers = "all layers"
    if args.exit_layer is not None:
        layers = f"exit {args.exit_layer}"
    print(f"\n{args.checkpoint_path}, {layers}")
    for row in rows:
        error = ""
        if row["stderr"] is not None:
            error = f" ± {row['stderr']:.4f}"
        print(f"{row['task']:30s} {row['metric']:30s} {row['value']:.4f}{error}")


def metric_rows(results: dict[str, dict[str, Any]]) -> list[tasks.Row]:
    """A row for each metric, with its standard error. results: the harness's, {task: {"metric,filter": value}}."""
    rows = []
    for task, values in results.items():
        for name, value in values.items():
            if not isinstance(value, (int, float)) or "_stderr" in name or name == "sample_len":
                continue
            stderr = values.get(name.replace(",", "_stderr,"))
            if not isinstance(stderr, float):  # the harness writes "N/A"
                stderr = None
            rows.append(dict(task=task, metric=name, value=value, stderr=stderr))
    return rows


# Every exit on a text.


def evaluate_text(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> None:
    """Score --text. Write, plot and print the table."""
    count, rows = score_text(args, model, tokenizer)
    tasks.write_rows(f"{args.out}.text", rows)
    path = args.checkpoint_path
    plot(f"{args.out}.text.png", rows, f"{path.parent.name}/{path.name} on {args.text.name}")
    of = ""
    if args.reference:
        of = f" of {args.reference}"
    print(f"\n{path} on {count} tokens of {args.text}; agreement with the last layer{of}")
    print("draft  exit   loss  perplexity  bits/byte  agreement")
    for row in rows:
        print(
            f"{row['draft_precision']:5s}  {row['exit_layer']:4d}  {row['loss']:.3f}  {row['perplexity']:10.3f}  "
            f"{row['bits_per_byte']:9.3f}  {row['agreement']:9.1%}"
        )


def score_text(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> tuple[int, list[tasks.Row]]:
    """(number of tokens scored, a row for each draft precision and exit: loss in nats per token, perplexity, bits per
    byte, agreement).

    Raises InputError if the text can't be read or is too short, or --reference can't be compared.
    """
    text = read_text(args.text, pipes=True)
    ids = torch.tensor(tokenizer.encode(text))
    context = min(args.window, model.config.context)
    if len(ids) <= context:
        raise InputError(
            f"--text {args.text}: has {len(ids)} tokens; more than the window of {context} are needed, see --window"
        )
    reference = load_reference(args, tokenizer)
    model.drop_caches()
    scale = (len(ids) - 1) / len(text.encode()) / math.log(2)  # bits per byte, if a token costs one nat
    rows = []
    for precision in dict.fromkeys(args.draft_precision or ["same"]):
        layers, wanted = model.layers, reference
        if precision != "same":
            layers, wanted = model.rounded_layers(model.config.n_layer, precision), reference or model
        losses, agreement, count = evaluate(
            LayerSkipLoss(model),
            ids,
            context,
            args.batch_size,
            args.max_tokens,
            nullcontext(),
            model.embed.weight.device,
            wanted,
            layers,
        )
        for i, (loss, share) in enumerate(zip(losses.tolist(), agreement.tolist(), strict=True), 1):
            rows.append(
                dict(
                    draft_precision=precision,
                    exit_layer=i,
                    loss=loss,
                    perplexity=math.exp(loss),
                    bits_per_byte=loss * scale,
                    agreement=share,
                )
            )
    return count, rows


def load_reference(args: argparse.Namespace, tokenizer: Tokenizer) -> Transformer | None:
    """The model of --reference, or None. Raises InputError if it has another tokenizer."""
    if not args.reference:
        return None
    model, other = load(args.reference, args.device, args.precision, adapters=False)
    if not tokenizer.same_as(other):
        raise InputError(
            f"--reference {args.reference}: has another tokenizer than {args.checkpoint_path}, "
            "so their tokens can't be compared"
        )
    return model


def plot(path: str, rows: list[tasks.Row], title: str) -> None:
    """Draw perplexity and agreement over the exit layer, for each draft precision, as a PNG."""
    plt = tasks.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set(title=title, xlabel="exit layer", ylabel="perplexity", yscale="log")
    other = axis.twinx()
    other.set_ylim(0, 102)
    lines = []
    for precision, marker in zip(dict.fromkeys(row["draft_precision"] for row in rows), "os^", strict=False):
        own = [row for row in rows if row["draft_precision"] == precision]
        layers = [row["exit_layer"] for row in own]
        perplexity = [row["perplexity"] for row in own]
        agreement = [100 * row["agreement"] for row in own]
        lines += axis.plot(layers, perplexity, f"{marker}-", color="tab:blue", label=f"perplexity, {precision} (left)")
        lines += other.plot(
            layers, agreement, f"{marker}--", color="tab:orange", label=f"agreement in %, {precision} (right)"
        )
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines) // 2)
    tasks.save_figure(figure, path)


if __name__ == "__main__":
    run_command(main)
