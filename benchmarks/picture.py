"""Draw plain and self-speculative decoding side by side from a line that benchmark.py wrote.

usage: python benchmarks/picture.py benchmark.json picture.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS = 24  # whose arrival is drawn


def arrivals(row: dict) -> list[float]:
    """When each of the first tokens comes, in ms: rounds of the mean length, each with the mean number of tokens."""
    per_round = 1 + row["mean_accepted"]
    return [(index // per_round + 1) * per_round * row["ms_per_token"] for index in range(TOKENS)]


def main() -> None:
    source, picture = map(Path, sys.argv[1:])
    table = json.loads(source.read_text())["table"]
    best = max(table[1:], key=lambda row: row["speedup"])
    # Lines of before 2026-11-26 have no name.
    label = best.get("decoding") or f"self-speculative, E={best['exit_layer']} K={best['k']}"
    rows = {
        "plain": (table[0], "#8c959f"),
        label.replace(", ", "\n"): (best, "#0969da"),
    }
    figure, axes = plt.subplots(figsize=(7.5, 2.1))
    for height, (row, colour) in enumerate(rows.values()):
        times = arrivals(row)
        lift = [
            0.11 * times[:index].count(time) for index, time in enumerate(times)
        ]  # those of one round lie in a pile
        axes.scatter(times, [height - up for up in lift], color=colour, s=20)
        axes.annotate(
            f"{row['tokens_per_second']:.0f} tokens/s", (times[-1], height), (8, -4), textcoords="offset points"
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(1.3, -0.4)
    axes.set_xlim(0, arrivals(table[0])[-1] * 1.25)
    axes.set_xlabel(f"milliseconds until each of {TOKENS} tokens is there ({best['speedup']:.2f}x)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
