"""Checkpoint files: model.pth, a plain state dict, and model.json, its description. Reading, checking, writing."""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tp
from command import InputError, caught_signals, check_memory, first_line
from files import check_regular, locked, read_object, replacing
from kernels import cpu
from model import Linear, ModelConfig, Transformer, rope_frequencies
from values import shown

if TYPE_CHECKING:
    from ranks import Shard

CACHE_LINE = 64  # bytes
BLOCK = 1 << 20  # bytes that are read at a time where a file is checked
CHECKERS = 2  # threads that do so
DIGEST = "weights"  # the field of model.json that says which model.pth it describes


def described_by(path: str | Path) -> Path:
    """The model.json of a model.pth."""
    path = Path(path)
    return path.parent / f"{path.stem}.json"


def load_config(path: str | Path) -> ModelConfig:
    """Read `model.json`. Raises InputError if it is missing, not JSON, or has a field that is missing or wrong."""
    if not Path(path).exists():
        raise InputError(f"{path}: not found; scripts/convert_hf_checkpoint.py writes it beside model.pth")
    values = read_object(path)
    names = [field.name for field in fields(ModelConfig)]
    for name in names:
        if name not in values:
            raise InputError(f"{path}: field {name!r} is missing; convert the checkpoint again")
    try:
        return ModelConfig(**{name: values[name] for name in names})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Name and meta tensor of everything in a checkpoint of this architecture.

    What is float32 here may have any floating type in the file.
    """
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    if config.tied and not config.quantization:
        del tensors["head.weight"]
    return tensors


def count_parameters(config: ModelConfig) -> int:
    """Numbers that the architecture has to learn, however they are stored."""
    return sum(t.numel() for t in expected_tensors(replace(config, quantization=None, groupsize=None)).values())


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_state(state: dict[str, Tensor], config: ModelConfig, path: str | Path) -> None:
    """Raise InputError, naming `path` and the first tensor at fault, unless `state` is exactly this architecture's."""
    check_tensors(state, expected_tensors(config), path)


def check_tensors(state: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> None:
    """Raise InputError, naming `path` and the first tensor at fault, unless `state` has what is wanted."""
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            raise InputError(f"{path}: tensor {name} is missing")
        if name not in wanted:
            raise InputError(f"{path}: tensor {name} is not part of this architecture")
    for name, t in wanted.items():
        check_tensor(state[name], t, f"{path}: tensor {name}")


def check_tensor(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise InputError unless the shapes are the same, and the dtypes too or both floating."""
    if found.shape != wanted.shape:
        shapes = tuple(found.shape), tuple(wanted.shape)
        raise InputError(f"{what} has shape {shapes[0]}, the model's description wants {shapes[1]}")
    both_float = found.is_floating_point() and wanted.is_floating_point()
    if not both_float and found.dtype != wanted.dtype:
        types = dtype_name(found.dtype), dtype_name(wanted.dtype)
        raise InputError(f"{what} is {types[0]}, the model's description wants {types[1]}")


def check_name(path: Path) -> None:
    """Raise InputError if PyTorch can't open a file of this name."""
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: PyTorch reads no path that isn't UTF-8; rename the file or folder") from None


def allocate_file(path: Path, like: dict[str, Tensor]) -> None:
    """Write a checkpoint file of `like`'s names, shapes and dtypes. Its values are to be set later."""
    with torch.serialization.skip_data():
        save_tensors({name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}, path)
    if hasattr(os, "posix_fallocate"):  # a full disk shows now, and not later as a fault in the middle of writing
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def save_tensors(value: object, path: Path) -> None:
    """torch.save, with the same bytes whatever the file's name. Raises OSError if the disk is full."""
    try:
        with open(path, "wb") as file, caught_signals() as caught:  # in its midst they would be taken for such an error
            torch.save(value, file)
    except RuntimeError as error:  # how torch.save reports it
        raise OSError(f"{first_line(error, 'unknown reason')}; is the disk full?") from None
    for number in caught:
        signal.raise_signal(number)


@contextmanager
def saved(path: str | Path, like: dict[str, Tensor], config: ModelConfig) -> Iterator[dict[str, Tensor]]:
    """Write `model.pth` and the `model.json` beside it as `written` does. Raises InputError also if `like` is not what
    the architecture has.
    """
    check_state(like, config, path)
    with written(path, like, asdict(config)) as result:
        yield result


@contextmanager
def written(path: str | Path, like: dict[str, Tensor], description: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Write a file of tensors and its description beside it, both whole or neither, without having all of it in memory.

    like: {name: tensor} of the shapes and dtypes to come. Yields a dict of tensors to copy the values into: they are
    the file's own, mapped into memory. Raises InputError if the files can't be written, or another run writes them.
    """
    path = Path(path)
    check_name(path)
    with locked(path), replacing(described_by(path)) as text, replacing(path) as weights:
        allocate_file(weights, like)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            result = torch.load(weights, mmap=True, weights_only=True)
        yield result
        write_checksums(weights)
        # The two files can't appear at the same time. A crash in between leaves a digest that doesn't fit, which shows.
        text.write_text(json.dumps({**description, DIGEST: digest(weights)}, indent=2) + "\n")


def save_checkpoint(path: str | Path, state: dict[str, Tensor], config: ModelConfig) -> None:
    """Write the tensors of `state` as `model.pth`, and `model.json` beside it, both whole or neither."""
    with saved(path, state, config) as result:
        for name, t in state.items():
            result[name].copy_(t)


# A checkpoint file is a zip archive, as torch.save writes it. Each of its records has a checksum (CRC-32), which stands
# behind the record and in the directory at the archive's end.


def write_checksums(path: Path) -> None:
    """Set the checksums of an archive whose records were changed in place."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        entry = archive.start_dir
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for record in tqdm(records, desc="checksums", unit="tensor", disable=None):
            lengths = struct.unpack_from("<HH", data, record.header_offset + 26)  # of the name, and what follows it
            begin = record.header_offset + 30 + sum(lengths)
            end = begin + record.file_size
            checksum = struct.pack("<I", zlib.crc32(memoryview(data)[begin:end]))
            if data[end : end + 4] == b"PK\x07\x08":
                data[end + 4 : end + 8] = checksum
            else:
                data[record.header_offset + 14 : record.header_offset + 18] = checksum
            data[entry + 16 : entry + 20] = checksum
            entry += 46 + sum(struct.unpack_from("<HHH", data, entry + 28))


def digest(path: Path) -> str:
    """What tells a checkpoint file from every other: SHA-256 of the archive's directory, which has all checksums."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(archive.start_dir)
        return hashlib.sha256(file.read()).hexdigest()


@contextmanager
def verified(path: Path, description: Path, share: int = 0, shares: int = 1) -> Iterator[None]:
    """Check that a file is the one that its description names, and its checksums while the body runs.

    share, shares: check every shares-th record only, for processes that check a part each. Files without a digest in
    their description are older and have no right checksums: nothing is checked. Raises InputError at the end if a
    record is damaged.
    """
    wanted = read_object(description).get(DIGEST)
    if wanted is None:
        yield
        return
    if wanted != digest(path):
        raise InputError(f"{path}: not the file that {description.name} describes; make both anew")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()[share::shares]
    with ThreadPoolExecutor(CHECKERS) as pool:
        checks = [pool.submit(check_record, path, record) for record in records]
        try:
            yield
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)


def check_record(path: Path, record: zipfile.ZipInfo) -> None:
    """Raise InputError if a record of an archive doesn't have its checksum."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(record) as data:
            while data.read(BLOCK):
                pass
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: damaged ({first_line(error, 'unreadable')}); make it anew") from None


def check_records(path: Path) -> None:
    """Raise InputError if a record of an archive doesn't have its checksum."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            check_record(path, record)


def check_archive(path: Path) -> None:
    """Raise InputError if a file is an archive with compressed records, which can't be mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: {record.filename} is compressed; only what torch.save writes can be read")


def read_state(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What a checkpoint file holds, on the CPU mapped and not read; its checksums are for `verified` to check.

    Raises InputError if it is missing or not readable.
    """
    path = Path(path)
    check_name(path)
    check_regular(path)
    if not path.is_file():
        raise InputError(f"{path}: not found; scripts/prepare.sh downloads and converts a checkpoint")
    try:
        check_archive(path)
        return torch.load(path, mmap=True, weights_only=True, map_location=device)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged file surfaces as many kinds of error
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error, 'empty file')})") from None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """(the tensors, mapped and not read, the description) of a model.pth and its model.json, which fit together.

    Raises InputError if they don't, or one of them is missing or not readable.
    """
    state = read_tensors(path, "a checkpoint of scripts/convert_hf_checkpoint.py was expected")
    config = load_config(described_by(path))
    check_state(state, config, path)
    return state, config


def read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped and not read. Raises InputError if it has anything else, with what was expected."""
    state = read_state(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: holds no names and tensors; {expected}")
    return {name: plain(value, f"{path}: {shown(name)}") for name, value in state.items()}


def plain(value: object, what: str) -> Tensor:
    """The value, as a tensor that only has numbers. Raises InputError if it isn't one. what: its name in messages."""
    if not isinstance(value, Tensor):
        raise InputError(f"{what} is a {type(value).__name__}; a plain state dict of tensors was expected")
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise InputError(f"{what} is a nested, sparse, quantized or empty tensor; a plain one was expected")
    return value.detach()  # of older files, which hold nn.Parameters


def check_finite(t: Tensor, what: str) -> None:
    """Raise InputError if a tensor has a value that is infinite or no number. what: its name in the message."""
    if t.itemsize == 1:  # PyTorch has no aminmax for float8
        t = t.float()
    if not all(extreme.isfinite() for extreme in t.aminmax()):
        raise InputError(f"{what} holds values that are not finite: the file is damaged; make or download it anew")


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shard: "Shard | None" = None,
    verify: bool = True,
) -> Transformer:
    """Load `model.pth` with the `model.json` beside it, in evaluation mode, without caches; with a shard, its part.

    The file is mapped and never unpickled as code. Its tensors go to the device one by one; of each only the part that
    is needed is read. verify: check the file's checksums meanwhile; of several processes, each checks a part. Raises
    InputError if a file is missing or damaged, if names or shapes don't fit the description, or if the model can't be
    split.
    """
    path = Path(path)
    description = described_by(path)
    state, config = read_checkpoint(path)
    model = empty_model(config, device, dtype, path, shard)
    share = (shard.rank, shard.size) if shard else (0, 1)
    with verified(path, description, *share) if verify else nullcontext():
        copy_state(state, model)
    return model


def copy_state(state: dict[str, Tensor], model: nn.Module) -> None:
    """Copy a mapped file's tensors into the model, or what the model has of each of them."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, own in model.state_dict().items():
        if name not in state:
            continue
        linear = linears.get(name.rpartition(".")[0])
        pieces = linear.pieces(state[name]) if linear else [state[name]]
        parts = own.split([len(piece) for piece in pieces])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)
        release(state[name])


def release(mapped: Tensor) -> None:
    """Let go of the memory behind a tensor of a mapped file, of which a copy was made.

    Until the file is closed that memory would count as this process's, beside the copy. If the tensor is read again, it
    comes from the file.
    """
    first = -(-mapped.data_ptr() // mmap.PAGESIZE)  # whole pages
    last = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        address = ctypes.c_void_p(first * mmap.PAGESIZE)
        length = ctypes.c_size_t((last - first) * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)


def empty_model(
    config: ModelConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    what: str | Path,
    shard: "Shard | None" = None,
) -> Transformer:
    """A Transformer for inference, or a shard's part of it, whose weights are not set yet.

    dtype: of the weights that are not quantized. Raises InputError if `what` doesn't fit into memory or can't be split.
    """
    with torch.device("meta"):
        model = Transformer(config)
        if shard:
            tp.split(model, shard)
    model.load_state_dict(allocate(model, device, dtype, what), assign=True, strict=not config.tied)
    model.tie()
    model.inv_freq = rope_frequencies(config).to(device)
    return model.eval().requires_grad_(False)


def allocate(model: Transformer, device: str | torch.device, dtype: torch.dtype, what: str | Path) -> dict[str, Tensor]:
    """Memory for all that a checkpoint has of a model on the meta device, in one block. See `empty_model`."""
    names = expected_tensors(model.config).keys()
    layout = []  # name, tensor, its dtype to be, its bytes in whole cache lines
    total = 0
    for name, t in model.state_dict(keep_vars=True).items():
        if name in names:
            kind = dtype if isinstance(t, nn.Parameter) else t.dtype
            lines = -(-t.numel() * kind.itemsize // CACHE_LINE)
            layout.append((name, t, kind, lines * CACHE_LINE))
            total += lines * CACHE_LINE
    check_memory(total, device, f"{what} in {dtype_name(dtype)}")
    if torch.device(device).type == "cpu":
        memory = cpu.huge_pages(total)
    else:
        memory = torch.empty(total, dtype=torch.uint8, device=device)
    state = {}
    begin = 0
    for name, t, kind, nbytes in layout:
        part = memory[begin : begin + t.numel() * kind.itemsize]
        state[name] = part.view(kind).view(t.shape)
        begin += nbytes
    return state
