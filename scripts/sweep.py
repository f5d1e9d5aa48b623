"""Find the exit layer and draft length that decode a checkpoint fastest, and keep them beside it for `generate.py --early_exit auto
--speculate_k auto`.

Every cell of the grid is decoded beside plain decoding, prompt by prompt in turn. Writes FILE.jsonl and FILE.csv, a row per cell,
and FILE.png, a heat map of tokens per second and of the speedup, the best cell marked. An interrupted sweep goes on where it was.
With --predict the whole grid is predicted from one pass over the model's own text and a few timed rounds, in FILE.predicted.*; only
the three cells that look best are then measured, and prediction and measurement are compared on every cell that FILE.jsonl has.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import tasks
import tune
from generate import Decoder, acceptance, load
from command import InputError, check_writable, run_command


def measure(plain, decoder, prompts, tokens, repeats):
    """Decode every prompt both ways in turn, after a warm-up of each: the cell's row."""
    began = time.perf_counter()
    for d in (plain, decoder):
        for _ in d.generate(prompts[0], 3 * (d.K + 1)):
            pass
    seconds, counts = {d: np.zeros((len(prompts), repeats)) for d in (plain, decoder)}, [0] * (decoder.K + 1)
    for repeat in range(repeats):
        for i, prompt in enumerate(prompts):
            for d in seconds:
                for _ in d.generate(prompt, tokens):
                    pass
                seconds[d][i, repeat] = d.stats.decode_seconds
            counts = [a + b for a, b in zip(counts, decoder.stats.accept_counts)]
    speedup, low, high = tasks.compare(seconds[plain], seconds[decoder])
    mean, decoded = acceptance(counts)[1], len(prompts) * (tokens - 1)  # the first token is the prefill's
    return dict(exit_layer=decoder.exit_layer, k=decoder.K, tokens_per_second=decoded / tasks.typical(seconds[decoder]),
                plain_tokens_per_second=decoded / tasks.typical(seconds[plain]), speedup=speedup, speedup_low=low, speedup_high=high,
                ideal_speedup=decoder.ideal_speedup(mean), mean_accepted=mean, seconds=time.perf_counter() - began)


def draw(path, rows, title):
    """A heat map of the rows' tokens per second and speedup over exit layer and draft length, as a PNG."""
    plt = tasks.pyplot()
    exits, ks = sorted({r["exit_layer"] for r in rows}), sorted({r["k"] for r in rows})
    best = max(rows, key=lambda r: r["speedup"])
    figure, axes = plt.subplots(1, 2, figsize=(3 + 1.3 * len(ks), 2 + 0.42 * len(exits)), layout="constrained")
    for ax, name, form, label in ((axes[0], "tokens_per_second", "{:.0f}", "tokens/s"), (axes[1], "speedup", "{:.2f}", "speedup over plain decoding")):
        grid = np.full((len(exits), len(ks)), np.nan)
        for r in rows:
            grid[exits.index(r["exit_layer"]), ks.index(r["k"])] = r[name]
        image = ax.imshow(grid, aspect="auto", origin="lower", cmap="viridis")
        figure.colorbar(image, ax=ax)
        ax.set(title=label, xlabel="drafted tokens K", ylabel="exit layer E")
        ax.set_xticks(range(len(ks)), ks), ax.set_yticks(range(len(exits)), exits)
        dark = np.nanmin(grid) + 0.6 * (np.nanmax(grid) - np.nanmin(grid))
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ax.text(j, i, form.format(value), ha="center", va="center", color="black" if value > dark else "white", fontsize=8)
        ax.add_patch(plt.Rectangle((ks.index(best["k"]) - 0.5, exits.index(best["exit_layer"]) - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_args(argv=None):
    p = tasks.parser(__doc__, [1, 2, 3, 4, 5, 6, 8])
    p.add_argument("--repeats", type=int, default=1, help="timed passes over the prompts")
    p.add_argument("--predict", action="store_true", help="predict the grid instead, and measure its three best cells alone")
    p.add_argument("--timed_k", type=int, default=3, help="how many draft lengths --predict times")
    p.add_argument("--out", default="sweep", metavar="FILE", help="where to write, without suffix")
    p.add_argument("--store", action=argparse.BooleanOptionalAction, default=True, help="keep the best setting beside the checkpoint")
    args = p.parse_args(argv)
    for name in ("repeats", "timed_k"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    check_writable("--out", f"{args.out}.png")
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    tasks.pyplot()  # if it is missing, that shows now
    sampling = tasks.check(args)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    exits, ks = tasks.grid(args, model.config.n_layer)
    _, prompts = tasks.load_prompts(args, model, tokenizer, spare=max(ks))
    largest = max(map(len, prompts)) + args.max_new_tokens + max(ks)

    def build(exit_layer, k, rows=largest):
        how = dict(exit_layer=exit_layer, k=k, draft_head=args.draft_head) if exit_layer is not None else {}
        return Decoder(model, sampling=sampling, rows=rows, compile=args.compile, seed=args.seed, **how)

    build(exits[0], ks[-1]), build(exits[-1], ks[0])  # the largest caches first; and what is out of range shows now
    plain = build(None, 0)
    results = tasks.Results(args.out, tasks.measured_with(args, "early_exit", "speculate_k", "predict", "timed_k", "out", "store"))
    rows = {(r["exit_layer"], r["k"]): r for r in results.rows}
    cells, predicted = [(e, k) for e in exits for k in ks], {}
    if args.predict:
        began = time.perf_counter()
        timed = sorted({ks[i] for i in np.linspace(0, len(ks) - 1, args.timed_k).round().astype(int)})
        predicted = tune.predict(build, prompts, args.max_new_tokens, exits, ks, timed, repeats=15)
        seconds = time.perf_counter() - began
        cells = sorted(predicted, key=lambda cell: -predicted[cell][0])[:3]
    for e, k in tqdm([c for c in cells if c not in rows], desc="measuring", disable=None):
        rows[e, k] = measure(plain, build(e, k), prompts, args.max_new_tokens, args.repeats)
        results.add(rows[e, k])
    tasks.write_csv(f"{args.out}.csv", results.rows)

    title = f"{args.checkpoint_path.parent.name}/{args.checkpoint_path.name} on {args.device}, temperature {args.temperature}"
    if args.predict:
        rate = statistics.median(r["plain_tokens_per_second"] for r in rows.values())
        map_rows = [dict(exit_layer=e, k=k, tokens_per_second=gain * rate, speedup=gain, mean_accepted=acceptance(counts)[1]) for (e, k), (gain, counts) in predicted.items()]
        tasks.write_rows(f"{args.out}.predicted", map_rows)
        draw(f"{args.out}.predicted.png", map_rows, f"{title} (predicted)")
        both = [(predicted[c][0] / r["speedup"] - 1, c, r) for c, r in rows.items() if c in predicted]
        print(f"\npredicted {len(predicted)} cells in {seconds:.0f} s; against the {len(both)} measured:")
        print(" E  K  predicted  measured (95% interval)  difference")
        for difference, (e, k), r in sorted(both, key=lambda d: d[1]):
            print(f"{e:2d} {k:2d}  {predicted[e, k][0]:8.2f}x {r['speedup']:8.2f}x ({r['speedup_low']:.2f} to {r['speedup_high']:.2f}) {difference:+13.1%}")
        print(f"median difference {statistics.median(abs(d) for d, *_ in both):.1%}, within 10% on {sum(abs(d) <= 0.1 for d, *_ in both)} of {len(both)}")
    else:
        map_rows = [rows[c] for c in cells]
        draw(f"{args.out}.png", map_rows, title)
        print(f"\nmeasured {len(cells)} cells in {sum(r['seconds'] for r in map_rows):.0f} s")
    best = max((rows[c] for c in cells), key=lambda r: r["speedup"])
    wins = best["speedup"] > 1
    print(f"fastest: {'--self_speculative --early_exit {exit_layer} --speculate_k {k}'.format(**best) if wins else 'plain decoding'}, at {best['tokens_per_second']:.1f} tokens/s "
          f"{best['speedup']:.2f}x ({best['speedup_low']:.2f} to {best['speedup_high']:.2f}) of plain decoding's {best['plain_tokens_per_second']:.1f}")
    if args.store:
        tune.store(args.checkpoint_path, tune.key(model, args.compile, args.temperature), best["exit_layer"] if wins else None, best["k"])
        print(f"stored in {tune.tuned_path(args.checkpoint_path)} for --early_exit auto --speculate_k auto at temperature {'0' if args.temperature == 0 else 'above 0'}")


if __name__ == "__main__":
    run_command(main)
