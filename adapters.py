"""Exit adapters beside a checkpoint: adapters.pth, a plain state dict, and adapters.json, its description.

scripts/train.py --freeze makes them for a model.pth that stays as it is. Whoever loads the checkpoint drafts with them.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import tp
from checkpoint import check_tensors, copy_state, described_by, read_tensors, verified, written
from command import InputError
from files import check_fields, read_object
from model import SIZES, ExitAdapter, ModelConfig, Transformer, into_one_block
from values import FLAG, TEXT, list_of

FIELDS = {"exits": list_of(SIZES["n_layer"]), "block": FLAG, "source": TEXT}  # of the description


def adapters_path(checkpoint: str | Path) -> Path:
    """Where the adapters of a model.pth are."""
    return Path(checkpoint).parent / "adapters.pth"


def new_adapters(config: ModelConfig, exits: list[int], block: bool) -> dict[int, ExitAdapter]:
    """{exit: adapter} whose weights are not set yet."""
    return {number: ExitAdapter(config, block) for number in exits}


def state_of(adapters: dict[int, ExitAdapter]) -> dict[str, Tensor]:
    """What adapters.pth holds: {"10.norm.weight": tensor}, with the exit in front."""
    state = {}
    for number, adapter in adapters.items():
        for name, tensor in adapter.state_dict().items():
            state[f"{number}.{name}"] = tensor
    return state


def save_adapters(path: Path, adapters: dict[int, ExitAdapter], source: str, dtype: torch.dtype) -> None:
    """Write adapters.pth, and adapters.json beside it, both whole or neither.

    source: where they came from, for people. Raises InputError if they can't be written.
    """
    block = any(adapter.layers for adapter in adapters.values())
    state = {name: tensor.to("cpu", dtype) for name, tensor in state_of(adapters).items()}
    with written(path, state, {"exits": list(adapters), "block": block, "source": source}) as result:
        for name, tensor in state.items():
            result[name].copy_(tensor)


def load_adapters(checkpoint: str | Path, model: Transformer, verify: bool = True) -> None:
    """Give the model the adapters that lie beside its checkpoint, if there are any, in its dtype and on its device.

    verify: check the file's checksums meanwhile. Raises InputError if a file is damaged, or was made for a model of
    another shape.
    """
    path = adapters_path(checkpoint)
    description = described_by(path)
    if not description.is_file():  # it appears last
        return
    fields = read_object(description)
    check_fields(fields, FIELDS, description)
    layers = model.config.n_layer
    for number in fields["exits"]:
        if number >= layers:
            raise InputError(f"{path}: has an adapter for exit {number}, but the model has {layers} layers")
    state = read_tensors(path, "adapters of scripts/train.py --freeze were expected")
    with torch.device("meta"):
        adapters = new_adapters(model.config, fields["exits"], fields["block"])
        check_tensors(state, state_of(adapters), path)
    share = (model.shard.rank, model.shard.size) if model.shard else (0, 1)
    with verified(path, description, *share) if verify else nullcontext():
        for number, adapter in adapters.items():
            own = {name: state[f"{number}.{name}"] for name in adapter.state_dict()}
            model.adapters[number] = with_weights(adapter, own, model)


def with_weights(adapter: ExitAdapter, state: dict[str, Tensor], model: Transformer) -> ExitAdapter:
    """An adapter on the meta device as the model uses it, with its weights, or a process's part of them."""
    weight = model.norm.weight
    if model.shard:
        tp.split_layers(adapter.layers, adapter.config, model.shard)
    adapter = adapter.to(weight.dtype).to_empty(device=weight.device)
    copy_state(state, adapter)
    into_one_block(list(adapter.layers))
    return adapter.eval().requires_grad_(False)
