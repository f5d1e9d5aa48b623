"""What a training run tells: a progress bar, and train_log.jsonl, which plot_training.py draws.

The log has two kinds of lines. Those with "exit_loss" are of one training step: the losses of its exits (null for those
that it didn't compute), learning rate, norm of the gradient, tokens per second since the line before. Those with
"val_loss" are of a validation: loss and agreement of every exit.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch import Tensor
from tqdm import tqdm

from command import InputError
from files import append_line, parse_json, read_text, write_text
from model import ModelConfig

Line = dict[str, Any]


class Evaluation(NamedTuple):
    """How good every exit is; NaN for those that were not scored."""

    losses: Tensor  # (L,) float64, nats per token
    agreement: Tensor  # (L,) float64, share of positions where the exit's most likely token is the reference's
    tokens: int  # how many were scored


class Report:
    """A progress bar and the log. Only the first process writes anything."""

    def __init__(self, args: argparse.Namespace, config: ModelConfig, first_step: int, rank: int) -> None:
        """Raises InputError if the model doesn't have the --exit_layer, or TensorBoard is asked for and not there."""
        self.exit_layer = config.default_exit if args.exit_layer is None else args.exit_layer
        if not 1 <= self.exit_layer <= config.n_layer:
            raise InputError(f"--exit_layer {self.exit_layer}: the model has {config.n_layer} layers")
        self.exit_loss = math.nan  # the newest known: not every step computes this exit's
        self.first_step = first_step
        self.tokens_per_step = args.batch_size * args.context
        self.log_every = args.log_every
        self.rank = rank
        self.log = args.out / "train_log.jsonl"
        self.board: Any = None
        self.validated = 0  # steps until the last validation that the log has
        if rank == 0:
            kept = keep_until(self.log, first_step)
            self.validated = max((line["step"] for line in kept if "val_loss" in line), default=0)
            if args.tensorboard:
                self.board = open_board(args.out / "tensorboard", first_step)
        disable = None if rank == 0 else True  # None: tqdm shows the bar only in a terminal
        self.bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=disable, smoothing=0.05)
        self.began = time.perf_counter()
        self.logged = (first_step, self.began)  # step and time of the newest line of a step

    def seconds(self) -> float:
        """Seconds since the first step began."""
        return time.perf_counter() - self.began

    def step(self, step: int, loss: float, losses: Tensor, **more: float) -> None:
        """Step number `step` is done. loss: what was minimized. losses: (L,), NaN for exits that were not computed.
        more: goes into the log.
        """
        exit_loss = losses[self.exit_layer - 1]
        if not exit_loss.isnan():
            self.exit_loss = exit_loss.item()
        rate = (step - self.first_step) * self.tokens_per_step / max(self.seconds(), 1e-9)
        shown = loss if losses[-1].isnan() else losses[-1]
        text = f"loss {shown:.3f}, exit {self.exit_layer} {self.exit_loss:.3f}, {rate:.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.rank == 0 and step % self.log_every == 0:
            before, then = self.logged
            now = time.perf_counter()
            self.logged = step, now
            values = without_nan(losses)
            rate = (step - before) * self.tokens_per_step / max(now - then, 1e-9)
            self.write(step, exit_loss=values, **more, tokens_per_second=rate)

    def write(self, step: int, **values: Any) -> None:
        """Add a line to the log."""
        append_line(self.log, json.dumps({"step": step, **values}))
        if self.board:
            for name, value in scalars(values).items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def validation(self, step: int, result: Evaluation) -> None:
        """Log a validation during the run, and print a line about it."""
        if self.rank != 0:
            return
        losses, agreement = result.losses.tolist(), result.agreement.tolist()
        self.write(
            step,
            val_loss=without_nan(result.losses),
            agreement=without_nan(result.agreement),
            seconds=self.seconds(),
        )
        place = self.exit_layer - 1
        at_exit = f"at exit {self.exit_layer} {losses[place]:.3f}, agreement there {agreement[place]:.1%}"
        self.bar.write(f"step {step}: validation loss {losses[-1]:.3f}, {at_exit}", file=sys.stderr)

    def end(self, step: int, result: Evaluation, seconds: float, training_tokens: int) -> None:
        """Log the validation of the finished model, and how fast the steps of this call were."""
        tokens = (step - self.first_step) * self.tokens_per_step
        self.write(
            step,
            val_loss=without_nan(result.losses),
            agreement=without_nan(result.agreement),
            val_tokens=result.tokens,
            seconds=seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            tokens_seen=step * self.tokens_per_step,
            training_tokens=training_tokens,
        )


def without_nan(values: Tensor) -> list[float | None]:
    """The values as JSON has them, with null for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def read_log(path: Path) -> list[Line]:
    """The whole lines of a log. Raises InputError if it is something else."""
    lines = []
    for text in read_text(path).rpartition("\n")[0].splitlines():
        try:
            line = parse_json(text)
            line["step"] + 0  # raises if it is something else
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not the log of a training run") from None
        lines.append(line)
    return lines


def keep_until(log: Path, step: int) -> list[Line]:
    """Drop the lines of steps behind `step`, which come again, and a line that a killed run didn't finish. Returns the
    others.
    """
    kept = []
    if step and log.exists():
        kept = [line for line in read_log(log) if line["step"] <= step]
    write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """{name: number} of a line of the log: of lists, one for each exit."""
    found = {}
    for name, value in values.items():
        if not isinstance(value, list):
            found[name] = value
            continue
        for number, part in enumerate(value, 1):
            if part is not None:
                found[f"{name}/exit {number}"] = part
    return found


def open_board(folder: Path, first_step: int) -> Any:
    """A writer of TensorBoard's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # an optional package
    except ImportError:
        raise InputError("--tensorboard: needs a package; pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=first_step)


def print_table(path: Path, result: Evaluation) -> None:
    """Print every exit's loss and agreement."""
    print(f"{path}: validation on {result.tokens} tokens of held-out text")
    print("exit   loss  agreement with the last layer")
    for number, (loss, share) in enumerate(zip(result.losses, result.agreement, strict=True), 1):
        if not loss.isnan():
            print(f"{number:4d}  {loss:.3f}  {share:.1%}")
