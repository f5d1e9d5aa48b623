"""Checkpoint files: model.pth, a plain state dict, and model.json beside it, which describes it. Reading, checking, writing, loading."""

import ctypes
import json
import mmap
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from command import InputError, check_memory
from model import Linear, ModelConfig, Transformer, rope_frequencies


def load_config(path):
    """Read `model.json`. Raises InputError if it is missing, not JSON, or lacks a field."""
    try:
        values = json.loads(Path(path).read_text())
        return ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig)})
    except FileNotFoundError:
        raise InputError(f"{path}: not found; scripts/convert_hf_checkpoint.py writes it beside model.pth") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a readable model description ({error})") from None
    except KeyError as error:
        raise InputError(f"{path}: field {error} is missing; convert the checkpoint again") from None


def expected_tensors(config: ModelConfig):
    """Name and meta tensor of everything in a checkpoint of this architecture; what is float32 here may have any floating type."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {
        name: t for name, t in state.items() if not (name == "head.weight" and config.tied and not config.quantization)
    }


def count_parameters(config: ModelConfig):
    """Numbers that the architecture has to learn, however they are stored."""
    return sum(t.numel() for t in expected_tensors(replace(config, quantization=None, groupsize=None)).values())


def check_state(state, config: ModelConfig, path):
    """Raise InputError, naming `path` and the first tensor at fault, unless `state` is exactly this architecture's."""
    wanted = expected_tensors(config)
    for name in sorted(wanted.keys() ^ state.keys()):
        raise InputError(f"{path}: tensor {name} is {'missing' if name in wanted else 'not part of this architecture'}")
    for name, t in wanted.items():
        if state[name].shape != t.shape:
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(state[name].shape)}, the model's description wants {tuple(t.shape)}"
            )
        if (
            state[name].is_floating_point() != t.is_floating_point()
            or not t.is_floating_point()
            and state[name].dtype != t.dtype
        ):
            raise InputError(
                f"{path}: tensor {name} is {str(state[name].dtype)[6:]}, the model's description wants {str(t.dtype)[6:]}"
            )


@contextmanager
def saved(path, like, config: ModelConfig):
    """Write `model.pth` and the `model.json` beside it, both whole or neither, without having all of it in memory.

    like: {name: tensor} of the shapes and dtypes to come. Gives a dict of tensors to copy the values into, which are the file's.
    """
    path = Path(path)
    check_state(like, config, path)
    description = path.with_suffix(".json")
    partial = {target: target.with_name(target.name + ".partial") for target in (description, path)}
    try:
        try:
            partial[description].write_text(config.to_json())
            with torch.serialization.skip_data():
                torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}, partial[path])
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not as a fault of some page later
                with open(partial[path], "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial[path].stat().st_size)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise InputError(f"{path}: can't be written ({str(error).splitlines()[0]})") from None
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            result = torch.load(partial[path], mmap=True, weights_only=True)
        yield result
        for target, written in partial.items():
            written.replace(target)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


def save_checkpoint(path, state, config: ModelConfig):
    """Write the tensors of `state` as `model.pth`, and `model.json` beside it, both whole or neither."""
    with saved(path, state, config) as result:
        for name, t in state.items():
            result[name].copy_(t)


def read_state(path, device="cpu"):
    """What a checkpoint file holds, mapped rather than read on the CPU. Raises InputError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found; scripts/prepare.sh downloads and converts a checkpoint")
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location=device)
    except Exception as error:  # a damaged file surfaces as many kinds of error
        raise InputError(
            f"{path}: not a readable checkpoint ({(str(error).splitlines() or ['empty file'])[0]})"
        ) from None


def load_model(path, device="cpu", dtype=torch.float32, shard=None):
    """Load `model.pth` with the `model.json` beside it, in evaluation mode, without caches; with a tp.Shard, that part of it.

    The file is mapped, never unpickled as code, and its tensors go to the device one by one, of which only the part is read.
    Raises InputError if a file is missing or damaged, if names or shapes don't fit the description, or if it can't be split.
    """
    path = Path(path)
    state = read_state(path)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(
            f"{path}: holds more than tensors; a checkpoint of scripts/convert_hf_checkpoint.py was expected"
        )
    config = load_config(path.with_suffix(".json"))
    check_state(state, config, path)
    model = empty_model(config, device, dtype, path, shard)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, t in model.state_dict().items():
        if name in state:
            linear = linears.get(name.rpartition(".")[0])
            pieces = linear.pieces(state[name]) if linear else [state[name]]
            for own, piece in zip(t.split([len(piece) for piece in pieces]), pieces):
                own.copy_(piece)
            release(state[name])
    return model


def release(mapped):
    """Let go of the memory behind a tensor of a mapped file: until the file is closed it would count as this process's, beside
    the copy that was made of it. Read again, it comes from the file."""
    first, last = -(-mapped.data_ptr() // mmap.PAGESIZE), (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE), mmap.MADV_DONTNEED
        )


def empty_model(config, device, dtype, what, shard=None):
    """A Transformer for inference, or a tp.Shard's part of it, whose weights are not set yet; dtype is theirs where they are not quantized.

    Raises InputError if `what` doesn't fit into memory or can't be split.
    """
    with torch.device("meta"):
        model = Transformer(config)
        if shard:
            shard.split(model)
    names = expected_tensors(config).keys()
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name in names}
    types = {name: dtype if isinstance(t, nn.Parameter) else t.dtype for name, t in tensors.items()}
    sizes = [-(-t.numel() * types[name].itemsize // 64) * 64 for name, t in tensors.items()]  # whole cache lines
    check_memory(sum(sizes), device, f"{what} in {str(dtype)[6:]}")
    on_cpu = torch.device(device).type == "cpu"
    memory = huge_pages(sum(sizes)) if on_cpu else torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    state = {
        name: part[: t.numel() * types[name].itemsize].view(types[name]).view(t.shape)
        for (name, t), part in zip(tensors.items(), memory.split(sizes))
    }
    model.load_state_dict(state, assign=True, strict=not config.tied)
    model.tie()
    model.inv_freq = rope_frequencies(config).to(device)
    return model.eval().requires_grad_(False)


def huge_pages(nbytes):
    """Memory (nbytes,) uint8 that the system may back by huge pages: streamed from 4 KB pages, weights come a fifth slower."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
