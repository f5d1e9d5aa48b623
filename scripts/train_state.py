"""The state of an unfinished training run, from which it goes on exactly where it stopped."""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from command import InputError
from files import check_fields, locked, read_json, read_object, sync_folder, unwritable, write_json
from optimizers import empty_state
from parts import ENDING, checksum_of, names_in, own_pieces, read_parts, write_part
from ranks import Shard
from values import OBJECT, whole

STATE_FILE = "train_state.json"
PARTS = "train_state"  # the folder beside it

# Options that may differ between an interrupted run and the one that resumes it. With the same options the run goes on
# exactly as before. The number of steps, the learning rate and the exits' weights are here so that they can be changed
# on purpose; how the work is divided, so that a run can go on with another number of processes.
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
    "fsdp",
    "accumulate",
    "activation_checkpointing",
}


def whole_weights(model: nn.Module, fsdp: bool) -> dict[str, Tensor]:
    """The weights as a single process has them.

    Under FSDP all processes must call it. Only the first one then gets them, on the CPU.
    """
    if not fsdp:
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]  # all of them are tensors


def named_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """{"model.WEIGHT": the weight, "optimizer.WEIGHT.KIND": what its optimizer keeps of it}, under FSDP as DTensors."""
    state = model.state_dict()  # before the names, because FSDP takes the weights apart again here
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}  # of a tied one the first
    tensors = {f"model.{name}": state[name] for name in names.values()}
    for optimizer in optimizers:
        for weight, kept in optimizer.state.items():
            for kind, value in kept.items():
                tensors[f"optimizer.{names[weight]}.{kind}"] = value
    return tensors


def begin_states(model: nn.Module, optimizers: list[Optimizer], saved: set[str]) -> None:
    """Let the optimizers have a state of those weights that have one in `saved`, names as of `named_tensors`.

    The others had no gradient yet.
    """
    names = {weight: name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = empty_state(optimizer, weight)
                if any(f"optimizer.{names[weight]}.{kind}" in saved for kind in state):
                    optimizer.state[weight] = state


@dataclass(frozen=True)
class TrainState:
    """The state of an unfinished run. From it the run goes on exactly where it stopped.

    The file names the state that holds, with its step, the settings, and the checksums of its parts. These lie in a
    folder of that step in the folder PARTS beside the file. One process writes one part; under FSDP each writes its
    own, and any other number of processes can read them. Which state holds changes in one moment: when the file is
    replaced, after all parts are on the disk and before those of the last state are deleted.
    """

    path: Path
    settings: dict[str, str]  # what `fixed_settings` returns
    model: nn.Module  # what is trained
    optimizers: list[Optimizer]
    steps: int  # of the whole run
    shard: Shard
    fsdp: bool

    @property
    def together(self) -> Shard:
        """The processes that write and read one state together. Without FSDP each has everything."""
        return self.shard if self.fsdp else Shard()

    def parts(self, step: int) -> Path:
        """The folder of the state after `step` steps."""
        return self.path.with_name(PARTS) / f"step-{step}"

    def save(self, step: int) -> None:
        """Write the state after `step` steps, whole or not at all. All processes must call it."""
        if self.shard.rank != 0 and not self.fsdp:
            return
        is_new = self.shard.rank == 0 and self.make_room(step)
        if not self.together.share(is_new):
            return
        try:
            self.write(step)
        finally:
            if self.shard.rank == 0:
                self.delete_others()

    def make_room(self, step: int) -> bool:
        """Make the folder for the parts, and delete what a killed run left. Returns False if this state is there."""
        if self.last_step() == step:
            return False
        self.delete_others()
        try:
            self.parts(step).mkdir(parents=True)
        except OSError as error:
            raise unwritable(self.parts(step), error) from None
        return True

    def write(self, step: int) -> None:
        """Write this process's part and, when all have theirs, the file. Raises InputError if a process can't."""
        together, folder = self.together, self.parts(step)
        pieces = own_pieces(named_tensors(self.model, self.optimizers), together)
        name = f"part-{together.rank + 1}-of-{together.size}{ENDING}"
        checksum, problem = None, None
        try:
            checksum = write_part(folder / name, pieces)
        except InputError as error:
            problem = str(error)  # told to all, so that none waits for this one
        written = together.gather([name, checksum, problem])
        for _, _, problem in written:
            if problem:
                raise InputError(problem)
        if together.rank == 0:
            for changed in (folder, folder.parent, self.path.parent):
                sync_folder(changed)
            files = {name: checksum for name, checksum, _ in written}
            write_json(self.path, {"step": step, "settings": self.settings, "files": files}, indent=2)

    def last_step(self) -> int | None:
        """Of the state that holds."""
        return read_object(self.path).get("step")

    def delete_others(self) -> None:
        """Delete all parts but those of the state that holds. Only the first process may, as it alone changes that."""
        last = self.last_step()
        for folder in self.path.with_name(PARTS).glob("step-*"):
            if folder.name != f"step-{last}":
                shutil.rmtree(folder, ignore_errors=True)

    def delete(self) -> None:
        """Delete the state: the run is finished."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_name(PARTS), ignore_errors=True)

    def load(self) -> int:
        """Load the state. Returns the number of steps that are done. Raises InputError if it isn't this run's state."""
        record = read_json(self.path)
        fields = {"settings": OBJECT, "files": OBJECT, "step": whole(0, self.steps)}
        check_fields(record, fields, f"--resume: {self.path}, the state of a training run")
        for name, value in self.settings.items():
            before = record["settings"].get(name)
            if value != before:
                raise InputError(f"--resume: {name} was {before} in {self.path}, now {value}")
        folder = self.parts(record["step"])
        self.check_parts(folder, record["files"])
        wrong = f"--resume: {folder} is not the state of this training run"
        saved = names_in(folder, wrong)
        begin_states(self.model, self.optimizers, saved)
        tensors = named_tensors(self.model, self.optimizers)
        for name in sorted(saved ^ tensors.keys()):
            raise InputError(f"{wrong} ({name} is {'too much' if name in saved else 'missing'})")
        read_parts(folder, tensors, self.together, wrong)
        return record["step"]

    def check_parts(self, folder: Path, checksums: dict[str, Any]) -> None:
        """Raise InputError unless the folder has these parts. Of several processes each checks some of them."""
        found = {file.name for file in folder.glob(f"*{ENDING}")}
        for name in sorted(found ^ checksums.keys()):
            problem = "is not part of it" if name in found else "is missing"
            raise InputError(f"--resume: {self.path}, the state of a training run: {folder / name} {problem}")
        for name in sorted(found)[self.together.rank :: self.together.size]:
            try:
                checksum = checksum_of(folder / name)
            except OSError as error:
                raise InputError(f"--resume: {folder / name}: can't be read ({error.strerror})") from None
            if checksum != checksums[name]:
                raise InputError(f"--resume: {folder / name}: damaged (it has another checksum); start the run anew")


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
