"""Tensors of a training state as files: each process writes what it holds, and any number of processes read them.

torch.distributed.checkpoint plans which process writes and which reads what. Its own files want a pickle beside them,
which is run as code when it is read. So here a part is a safetensors file, whose header says where in the whole tensors
its pieces lie, as PyTorch's HuggingFaceStorageReader expects it.
"""

import json
import os
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from checkpoint import BLOCK
from command import blaming
from files import sync, unwritable
from ranks import Shard

ENDING = ".safetensors"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


@dataclass(frozen=True)
class Piece:
    """What one process writes of a tensor."""

    name: str
    offsets: list[int]  # where it begins in the whole tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.itemsize


class Planned(StorageWriter):
    """Keeps what this process is to write, and writes nothing.

    Within torch.distributed.checkpoint a full disk or a signal would become an exception of another kind, and whoever
    waits there for a slower process has the time limit of a collective.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for item in plan.items:
            offsets = list(item.tensor_data.chunk.offsets)  # type: ignore[union-attr]  # all of them are tensors
            values: Any = planner.resolve_data(item)
            self.pieces.append(Piece(item.index.fqn, offsets, values.detach()))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def own_pieces(tensors: dict[str, Tensor], together: Shard) -> list[Piece]:
    """What this process is to write of the tensors: its part of a DTensor, and a share of what all have.

    All processes must call it.
    """
    planned = Planned()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant so
            dcp.save(tensors, storage_writer=planned, no_dist=together.size == 1)
    except CheckpointException as error:  # around what happened
        raise cause(error) from None
    return planned.pieces


def cause(error: CheckpointException) -> BaseException:
    """What happened in the first of the processes that failed."""
    return next(iter(error.failures.values()))[0]


def write_part(path: Path, pieces: list[Piece]) -> int:
    """Write a file of pieces, one at a time so that no more of them is copied. Returns its checksum (CRC-32).

    Raises InputError if it can't be written.
    """
    try:
        with open(path, "wb") as file:
            begin = header(pieces)
            file.write(begin)
            checksum = zlib.crc32(begin)
            for piece in pieces:
                values = memoryview(piece.values.cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                file.write(values)
                checksum = zlib.crc32(values, checksum)
        sync(path)
    except OSError as error:
        raise unwritable(path, error) from None
    return checksum


def header(pieces: list[Piece]) -> bytes:
    """The beginning of a safetensors file: the length of its description, and the description."""
    places = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
    described: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}}
    end = 0
    for piece in pieces:
        begin = end
        end += piece.nbytes
        dtype = DTYPES[piece.values.dtype]
        described[piece.name] = {"dtype": dtype, "shape": list(piece.values.shape), "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)  # so that the values behind it are aligned
    return struct.pack("<Q", len(text)) + text


def checksum_of(path: Path) -> int:
    """CRC-32 of a file. Raises OSError if it can't be read."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def names_in(folder: Path, what: str) -> set[str]:
    """The names of the tensors in a folder of parts. Raises InputError, which begins with `what`, for other files."""
    with blaming(what):
        return set(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read_parts(folder: Path, tensors: dict[str, Tensor], together: Shard, what: str) -> None:
    """Read into the tensors, or this process's parts of them, whoever wrote them. All processes must call it.

    Raises InputError, which begins with `what`, if a tensor is missing or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=together.size == 1)
    except CheckpointException as error:
        with blaming(what):
            raise cause(error) from None
