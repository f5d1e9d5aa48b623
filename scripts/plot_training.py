"""Draw the logs of training runs: loss and agreement of every exit, learning rate, tokens per second."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import tasks
from command import InputError, Parser, run_command
from files import check_writable
from model import SIZES
from train_log import Line, read_log
from values import filled_path

STYLES = ("-", "--", ":", "-.")  # of the first run, the second, and so on


def curves(lines: list[Line], name: str) -> list[tuple[list[int], list[float]]]:
    """The curve of every exit: (steps, values) of the lines that have this field."""
    found: list[tuple[list[int], list[float]]] = []
    for line in lines:
        for number, value in enumerate(line.get(name, ())):
            if number == len(found):
                found.append(([], []))
            if value is not None:
                found[number][0].append(line["step"])
                found[number][1].append(value)
    return found


def curve(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines of training steps, of a field that is one number."""
    chosen = [line for line in lines if "exit_loss" in line]
    return [line["step"] for line in chosen], [line[name] for line in chosen]


def draw(runs: dict[str, list[Line]], path: Path) -> None:
    """Draw the runs, {name: lines}, as a PNG."""
    plt = tasks.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    (loss, agreement), (rate, speed) = axes
    exits = max(len(curves(lines, "val_loss")) for lines in runs.values())
    colours = plt.get_cmap("viridis")
    for (name, lines), style in zip(runs.items(), STYLES, strict=False):
        for number, (steps, values) in enumerate(curves(lines, "exit_loss")):
            loss.plot(steps, values, style, color=colours(number / exits), linewidth=0.5, alpha=0.4)
        for field, axis in (("val_loss", loss), ("agreement", agreement)):
            for number, (steps, values) in enumerate(curves(lines, field)):
                label = f"{name}, exit {number + 1}" if field == "agreement" else None
                axis.plot(steps, values, style + "o", color=colours(number / exits), markersize=3, label=label)
        rate.plot(*curve(lines, "learning_rate"), style, color="black", label=name)
        speed.plot(*curve(lines, "tokens_per_second"), style, color="black")
    loss.set(title="loss: validation (points), training (thin)", ylabel="nats per token")
    agreement.set(title="agreement with the last layer", ylim=(0, 1.02))
    rate.set(title="learning rate", xlabel="step")
    speed.set(title="tokens per second", xlabel="step", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize="x-small")
    tasks.save_figure(figure, path)


def draw_comparison(runs: dict[str, list[Line]], exit_layer: int, path: Path) -> None:
    """Draw a point for each run at its last validation: agreement at the exit over the loss of the last layer, as a
    PNG. Raises InputError for a run without one, or without this exit.
    """
    plt = tasks.pyplot()
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, lines in runs.items():
        validations = [line for line in lines if "val_loss" in line]
        if not validations:
            raise InputError(f"{name}: has no validation yet")
        last = validations[-1]
        agreement = [*last["agreement"], *[None] * exit_layer][exit_layer - 1]
        if agreement is None:
            raise InputError(f"--compare {exit_layer}: {name} has no such exit")
        axis.plot(last["val_loss"][-1], agreement, "o")
        axis.annotate(Path(name).name, (last["val_loss"][-1], agreement), xytext=(5, 3), textcoords="offset points")
    axis.set(xlabel="loss of the last layer, nats per token", ylabel=f"agreement with it at exit {exit_layer}")
    axis.margins(x=0.15)
    tasks.save_figure(figure, path)


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("runs", type=filled_path, nargs="+", help="the --out folders of runs, or their logs")
    p.add_argument(
        "--out", type=filled_path, default=Path("training.png"), help="picture to write (default: %(default)s)"
    )
    p.add_argument(
        "--compare",
        type=SIZES["n_layer"],
        metavar="E",
        help="draw one point for each run, at any number of them: agreement at exit E over the loss of the last layer",
    )
    args = p.parse_args()
    if len(args.runs) > len(STYLES) and not args.compare:
        raise InputError(f"{len(args.runs)} runs: at most {len(STYLES)} can be told apart in one picture")
    check_writable("--out", args.out)
    runs = {}
    for run in args.runs:
        log = run / "train_log.jsonl" if run.is_dir() else run
        if not log.exists():
            raise InputError(f"{log}: not found; name the --out of a training run")
        runs[str(run)] = read_log(log)
    if args.compare:
        draw_comparison(runs, args.compare, args.out)
    else:
        draw(runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
