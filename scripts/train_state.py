"""The state of an unfinished training run: one file, from which the run goes on exactly where it stopped."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from checkpoint import check_records, read_state, save_tensors
from command import InputError, blaming
from files import check_fields, locked, replacing
from values import OBJECT, list_of, whole

STATE_FILE = "train_state.pth"

# Options that may differ between an interrupted run and the one that resumes it. With the same options the run goes on
# exactly as before. The number of steps, the learning rate and the exits' weights are here so that they can be changed
# on purpose.
FREE_TO_CHANGE = {
    "resume",
    "save_every",
    "eval_every",
    "eval_tokens",
    "exit_layer",
    "log_every",
    "tensorboard",
    "packed",
    "workers",
    "compile",
    "out",
    "device",
    "steps",
    "lr",
    "rotation",
    "exit_scale",
    "exit_power",
    "distill",
    "distill_temperature",
}


def full_state(model: nn.Module, optimizers: list[Optimizer], fsdp: bool) -> dict[str, Any]:
    """{"model", "optimizers"}: the state dicts as a single process has them.

    Under FSDP all processes must call it. Only the first one then gets the state, on the CPU.
    """
    if not fsdp:
        return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = [get_optimizer_state_dict(model, optimizer, options=options) for optimizer in optimizers]
    return {"model": get_model_state_dict(model, options=options), "optimizers": saved}


def load_full_state(state: dict[str, Any], model: nn.Module, optimizers: list[Optimizer], fsdp: bool) -> None:
    """Load what `full_state` returned, in place."""
    pairs = zip(optimizers, state["optimizers"], strict=True)
    if not fsdp:
        model.load_state_dict(state["model"])
        for optimizer, saved in pairs:
            optimizer.load_state_dict(saved)
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    for optimizer, saved in pairs:
        set_optimizer_state_dict(model, optimizer, saved, options=options)


@dataclass(frozen=True)
class TrainState:
    """One file with the state of an unfinished run. From it the run goes on exactly where it stopped."""

    path: Path
    settings: dict[str, str]  # what `fixed_settings` returns
    model: nn.Module  # what is trained
    optimizers: list[Optimizer]
    steps: int  # of the whole run
    rank: int
    fsdp: bool

    def save(self, step: int) -> None:
        """Write the state after `step` steps, whole or not at all. All processes must call it; the first writes."""
        state = {}
        if self.rank == 0 or self.fsdp:
            state = full_state(self.model, self.optimizers, self.fsdp)
        if self.rank == 0:
            with replacing(self.path) as file:
                save_tensors({**state, "step": step, "settings": self.settings}, file)

    def load(self, device: torch.device) -> int:
        """Load the state. Returns the number of steps that are done. Raises InputError if it isn't this run's state."""
        state: dict[str, Any] = read_state(self.path, device)
        check_records(self.path)
        fields = {"settings": OBJECT, "model": OBJECT, "optimizers": list_of(OBJECT), "step": whole(0, self.steps)}
        check_fields(state, fields, f"--resume: {self.path}, the state of a training run")
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if value != before:
                raise InputError(f"--resume: {name} was {before} in {self.path}, now {value}")
        with blaming(f"--resume: {self.path} is not the state of this training run"):
            load_full_state(state, self.model, self.optimizers, self.fsdp)
        return state["step"]


@contextmanager
def own_folder(out: Path, resume: bool, rank: int) -> Iterator[None]:
    """Keep the folder for this run, which the first process makes. Raises InputError as `check_folder` does, and if
    another run is writing there.
    """
    if rank != 0:
        check_folder(out, resume)
        yield
        return
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / STATE_FILE):
            check_folder(out, resume)
            yield
    finally:
        if made:
            with suppress(OSError):  # there is something in it
                out.rmdir()


def check_folder(out: Path, resume: bool) -> None:
    """Raise InputError unless the run can begin in the folder, or resume there."""
    state = out / STATE_FILE
    if resume and not state.is_file():
        raise InputError(f"--resume: {state} not found; start the run without --resume")
    if not resume and state.is_file():
        raise InputError(f"{out}: holds an unfinished run; pass --resume to go on with it, or delete {state}")
    if not resume and (out / "model.pth").is_file():
        raise InputError(f"--out {out}: holds a finished checkpoint; name another folder")


def fixed_settings(args: argparse.Namespace, training_tokens: int) -> dict[str, str]:
    """{name: value} of what must be the same in an interrupted run and the one that resumes it."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings["training tokens"] = str(training_tokens)
    return settings
