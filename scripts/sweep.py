"""Find the draft precision, exit layer and draft length that decode a checkpoint fastest, and keep them beside it for
`generate.py --early_exit auto --speculate_k auto`.

Every cell of the grid is decoded beside plain decoding, prompt by prompt in turn. Writes FILE.jsonl and FILE.csv, a row
per cell, and FILE.png, heat maps of tokens per second and of the speedup, with the best cell marked. An interrupted
sweep goes on where it was. With --predict the whole grid is predicted from one pass over the model's own text and a few
timed rounds, in FILE.predicted.*. Only the three cells that look best are then measured, and prediction and measurement
are compared on every cell that FILE.jsonl has.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import tasks
import tune
from command import run_command
from generate import DRAFT_LENGTH, Decoder, Stats, acceptance, load, total_counts, total_rounds
from model import SIZES
from tune import Build, Cell
from values import TEXT, filled, real, whole

PREDICTED_CELLS = 3  # how many of the cells that look best --predict measures
TIMED_REPEATS = 15  # how often --predict times a round
MAPS = (("tokens_per_second", "{:.0f}", "tokens/s"), ("speedup", "{:.2f}", "speedup"))  # value, form, title
NUMBERS = ("tokens_per_second", "plain_tokens_per_second", "speedup", "speedup_low", "speedup_high", "seconds")
COLUMNS = {  # of FILE.jsonl
    "draft_precision": TEXT,
    "exit_layer": SIZES["n_layer"],
    "k": DRAFT_LENGTH,
    **dict.fromkeys(NUMBERS, real()),
}

Prediction = dict[Cell, tuple[float, list[float]]]  # {cell: (speedup, accept counts)}, of tune.predict


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = tasks.parser(__doc__, [1, 2, 3, 4, 5, 6, 8])
    p.add_argument("--repeats", type=whole(1, tasks.MOST_REPEATS), default=1, help="timed passes over the prompts")
    p.add_argument("--predict", action="store_true", help="predict the grid, and measure only its three best cells")
    p.add_argument("--timed_k", type=DRAFT_LENGTH, default=3, help="how many draft lengths --predict times")
    p.add_argument("--out", type=filled, default="sweep", metavar="FILE", help="where to write, without suffix")
    p.add_argument(
        "--store",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the best setting beside the checkpoint",
    )
    args = p.parse_args(argv)
    tasks.check_outputs(args, ".jsonl", ".csv", ".png")
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tasks.pyplot()  # if it is missing, that shows now
    tasks.check(args)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    exits, ks = tasks.exits(args, model.config.n_layer), sorted(set(args.speculate_k))
    cells = [(precision, e, k) for precision, own in exits.items() for e, k in itertools.product(own, ks)]
    _, prompts = tasks.load_prompts(args, model, tokenizer, spare=max(ks))
    largest = max(map(len, prompts)) + args.max_new_tokens + max(ks)

    def build(precision: str, exit_layer: int | None, k: int, rows: int = largest) -> Decoder:
        return tasks.make_decoder(args, model, rows, exit_layer, k, draft_precision=precision)

    for cell in cells:  # a value that is out of range shows now, and all are compiled for the largest caches
        build(*cell)
    without = ("draft_precision", "early_exit", "speculate_k", "predict", "timed_k", "out", "store")
    results = tasks.Results(args.out, tasks.measured_with(args, *without), COLUMNS)
    predicted: Prediction = {}
    predict_seconds = 0.0
    plain = build("same", None, 0)
    if args.predict:
        began = time.perf_counter()
        predicted = predict(args, build, prompts, exits, ks)
        predict_seconds = time.perf_counter() - began
        cells = sorted(predicted, key=lambda cell: -predicted[cell][0])[:PREDICTED_CELLS]
    rows = measure_missing(args, build, plain, prompts, cells, results)
    chosen = [rows[cell] for cell in cells]
    tasks.write_csv(f"{args.out}.csv", results.rows)

    if args.predict:
        draw_prediction(args, predicted, rows)
        print_prediction(predicted, rows, predict_seconds)
    else:
        draw(f"{args.out}.png", chosen, title(args))
        print(f"\nmeasured {len(chosen)} cells in {sum(map(itemgetter('seconds'), chosen)):.0f} s")
    best = max(chosen, key=itemgetter("speedup"))
    setting: tuple[int | None, int, str] = None, 1, "same"
    if best["speedup"] > 1:
        setting = best["exit_layer"], best["k"], best["draft_precision"]
    print_fastest(best, tune.options(*setting))
    if args.store:
        tune.store(args.checkpoint_path, tune.key(model, args.compile, args.temperature), *setting)
        print_stored(args)


def predict(
    args: argparse.Namespace, build: Build, prompts: list[list[int]], exits: dict[str, list[int]], ks: list[int]
) -> Prediction:
    """The whole grid, predicted from the times of --timed_k of the draft lengths, evenly spread."""
    spread = np.linspace(0, len(ks) - 1, args.timed_k).round().astype(int)
    timed = np.unique(np.take(ks, spread)).tolist()
    return tune.predict(build, prompts, args.max_new_tokens, exits, ks, timed, repeats=TIMED_REPEATS)


def measure_missing(
    args: argparse.Namespace,
    build: Callable[[str, int, int], Decoder],
    plain: Decoder,
    prompts: list[list[int]],
    cells: list[Cell],
    results: tasks.Results,
) -> dict[Cell, tasks.Row]:
    """{cell: row} of all results, after measuring those of the cells that were not there."""
    rows = results.by("draft_precision", "exit_layer", "k")
    missing = [cell for cell in cells if cell not in rows]
    for cell in tqdm(missing, desc="measuring", disable=None):
        measured = measure(plain, build(*cell), prompts, args.max_new_tokens, args.repeats)
        rows[cell] = dict(draft_precision=cell[0], **measured)
        results.add(rows[cell])
    return rows


def measure(plain: Decoder, decoder: Decoder, prompts: list[list[int]], tokens: int, repeats: int) -> tasks.Row:
    """Decode every prompt both ways in turn, after a warm-up of each: the cell's row but for its precision."""
    began = time.perf_counter()
    tasks.warm_up(plain, prompts[0])
    tasks.warm_up(decoder, prompts[0])
    plain_seconds = np.zeros((len(prompts), repeats))
    seconds = np.zeros((len(prompts), repeats))
    rounds = []
    for repeat in range(repeats):
        for i, prompt in enumerate(prompts):
            plain_seconds[i, repeat] = decode(plain, prompt, tokens).decode_seconds
            stats = decode(decoder, prompt, tokens)
            seconds[i, repeat] = stats.decode_seconds
            rounds.append(stats.rounds)
    speedup, low, high = tasks.compare(plain_seconds, seconds)
    total = total_rounds(rounds)
    decoded = len(prompts) * (tokens - 1)  # the prompt's pass gives each text's first token
    return dict(
        exit_layer=decoder.exit_layer,
        k=decoder.K,
        tokens_per_second=decoded / tasks.typical(seconds),
        plain_tokens_per_second=decoded / tasks.typical(plain_seconds),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        ideal_speedup=decoder.ideal_speedup(total),
        mean_accepted=acceptance(total_counts(total.values()))[1],
        seconds=time.perf_counter() - began,
    )


def decode(decoder: Decoder, prompt: list[int], tokens: int) -> Stats:
    for _ in decoder.generate(prompt, tokens):
        pass
    return decoder.stats


def title(args: argparse.Namespace) -> str:
    path = args.checkpoint_path
    return f"{path.parent.name}/{path.name} on {args.device}, temperature {args.temperature}"


def draw_prediction(args: argparse.Namespace, predicted: Prediction, rows: dict[Cell, tasks.Row]) -> None:
    """Write the predicted grid as FILE.predicted.*, in tokens per second of this machine's plain decoding."""
    rate = statistics.median([row["plain_tokens_per_second"] for row in rows.values()])
    grid = []
    for (precision, e, k), (gain, counts) in predicted.items():
        cell = dict(draft_precision=precision, exit_layer=e, k=k)
        grid.append(dict(cell, tokens_per_second=gain * rate, speedup=gain, mean_accepted=acceptance(counts)[1]))
    tasks.write_rows(f"{args.out}.predicted", grid)
    draw(f"{args.out}.predicted.png", grid, f"{title(args)} (predicted)")


def draw(path: str, rows: list[tasks.Row], title: str) -> None:
    """Heat maps of the rows' tokens per second and speedup over exit layer and draft length, as a PNG: a line of maps
    for each draft precision, in the same colours.
    """
    plt = tasks.pyplot()
    precisions = list(dict.fromkeys(row["draft_precision"] for row in rows))
    exits = sorted({row["exit_layer"] for row in rows})
    ks = sorted({row["k"] for row in rows})
    size = (3 + 1.3 * len(ks), len(precisions) * (2 + 0.42 * len(exits)))  # inches
    figure, axes = plt.subplots(len(precisions), 2, figsize=size, layout="constrained", squeeze=False)
    for precision, line in zip(precisions, axes, strict=True):
        own = [row for row in rows if row["draft_precision"] == precision]
        for ax, (name, form, label) in zip(line, MAPS, strict=True):
            values = [row[name] for row in rows]
            figure.colorbar(draw_map(ax, own, exits, ks, name, form, min(values), max(values)), ax=ax)
            ax.set(title=f"{label}, draft precision {precision}", xlabel="drafted tokens K", ylabel="exit layer E")
    best = max(rows, key=itemgetter("speedup"))
    corner = (ks.index(best["k"]) - 0.5, exits.index(best["exit_layer"]) - 0.5)
    for ax in axes[precisions.index(best["draft_precision"])]:
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    figure.suptitle(title)
    tasks.save_figure(figure, path)


def draw_map(
    ax: Any, rows: list[tasks.Row], exits: list[int], ks: list[int], name: str, form: str, low: float, high: float
) -> Any:
    """One heat map: the value `name` of each row, between low and high, written as `form` says. Cells without a row
    stay empty. Returns the image.
    """
    grid = np.full((len(exits), len(ks)), np.nan)
    for row in rows:
        grid[exits.index(row["exit_layer"]), ks.index(row["k"])] = row[name]
    image = ax.imshow(grid, aspect="auto", origin="lower", cmap="viridis", vmin=low, vmax=high)
    ax.set_xticks(range(len(ks)), ks)
    ax.set_yticks(range(len(exits)), exits)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "black" if value > low + 0.6 * (high - low) else "white"  # readable on the map's colours
            ax.text(j, i, form.format(value), ha="center", va="center", color=colour, fontsize=8)
    return image


def print_prediction(predicted: Prediction, rows: dict[Cell, tasks.Row], seconds: float) -> None:
    """Compare the prediction, which took `seconds`, with all cells that were measured."""
    both = sorted(rows.keys() & predicted.keys())
    print(f"\npredicted {len(predicted)} cells in {seconds:.0f} s; against the {len(both)} measured:")
    print("draft  E  K  predicted  measured (95% interval)  difference")
    differences = []
    for cell in both:
        (precision, e, k), gain, row = cell, predicted[cell][0], rows[cell]
        difference = gain / row["speedup"] - 1
        differences.append(abs(difference))
        print(f"{precision:4s} {e:3d} {k:2d}  {gain:8.2f}x {tasks.interval(row, '8.2f')} {difference:+13.1%}")
    within = np.count_nonzero(np.less_equal(differences, 0.1))
    print(f"median difference {statistics.median(differences):.1%}, within 10% on {within} of {len(both)}")


def print_fastest(best: tasks.Row, setting: str) -> None:
    """best: the row of the fastest drafts. setting: what is fastest, plain decoding included."""
    print(
        f"fastest: {setting}; the best drafts reach {best['tokens_per_second']:.1f} tokens/s, "
        f"{tasks.interval(best, '.2f')} of plain decoding's {best['plain_tokens_per_second']:.1f}"
    )


def print_stored(args: argparse.Namespace) -> None:
    kind = "0" if args.temperature == 0 else "above 0"
    path = tune.tuned_path(args.checkpoint_path)
    print(f"stored in {path} for --early_exit auto --speculate_k auto at temperature {kind}")


if __name__ == "__main__":
    run_command(main)
