"""Training data: texts of files, tables or datasets of the hub, packed once as token ids into files that are mapped.

Every document gets BOS before and EOS behind it. All are joined to one long row of ids for training and one for
validation. The rows are cut into windows, the training examples. Only what is read of a row is ever in memory.
"""

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from command import InputError, first_line
from files import locked, read_object, write_json
from tokenizer import Tokenizer

TABLES = {".jsonl": "json", ".parquet": "parquet"}  # what `datasets` calls the formats of files
HUB = "hub:"  # what a dataset of the hub is named with
BATCH = 256  # documents per process that are encoded between two notes of progress
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

Document = tuple[str, str]  # name, text


# Where texts come from.


@dataclass(frozen=True)
class Sources:
    """The texts that the options of a training run name, in an order that is always the same."""

    data: list[str]  # files, folders, and hub:REPO or hub:REPO:CONFIGURATION
    include: str  # of folders, the files whose names match this pattern
    exclude: list[str]  # but none whose relative name matches one of these
    column: str  # of tables and datasets, where the text is
    template: str | None  # or what makes the text of a row, such as "{question} {answer}"
    split: str  # of datasets of the hub

    @staticmethod
    def of(args: argparse.Namespace) -> "Sources":
        return Sources(args.data, args.include, args.exclude, args.column, args.template, args.split)

    def documents(self) -> Iterator[Document]:
        """Every text that isn't empty, with a name. Files of folders that are not UTF-8 are left out.

        Raises InputError if something is missing or can't be read.
        """
        for source in self.data:
            if source.startswith(HUB):
                yield from self.rows(source, self.hub(source))
                continue
            for name, path in self.files(Path(source)):
                if path.suffix in TABLES:
                    yield from self.rows(name, self.table(path))
                else:
                    yield from read_file(name, path)

    def files(self, root: Path) -> list[tuple[str, Path]]:
        """[(relative name, path)]: of root if it is a file, else of the files below it, sorted."""
        if root.is_file():
            return [(root.name, root)]
        if not root.is_dir():
            raise InputError(f"--data {root}: no such file or folder; a dataset of the hub is {HUB}OWNER/NAME")
        try:
            paths = sorted(root.rglob(self.include))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--include {self.include}: not a pattern of file names ({error})") from None
        found = []
        for path in paths:
            name = path.relative_to(root).as_posix()
            if path.is_file() and not any(fnmatch(name, pattern) for pattern in self.exclude):
                found.append((name, path))
        return found

    def table(self, path: Path) -> Iterable[dict[str, Any]]:
        """The rows of a JSONL or parquet file, read as they are wanted."""
        import datasets  # takes seconds to import, and is needed for tables only

        try:
            return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
        except Exception as error:  # each format has its own errors
            raise InputError(f"--data {path}: can't be read ({first_line(error, 'damaged')})") from None

    def hub(self, source: str) -> Iterable[dict[str, Any]]:
        """The rows of a dataset of the hub, downloaded as they are wanted."""
        import datasets

        repo, _, configuration = source.removeprefix(HUB).partition(":")
        try:
            return datasets.load_dataset(repo, configuration or None, split=self.split, streaming=True)
        except Exception as error:  # the network fails in many ways
            reason = first_line(error, type(error).__name__)
            raise InputError(f"--data {source}: can't be had from the hub ({reason})") from None

    def rows(self, source: str, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
        """The texts of a table's rows, named by their numbers."""
        try:
            for number, row in enumerate(rows):
                text = self.text(row, source)
                if text.strip():
                    yield f"{source}#{number}", text
        except InputError:
            raise
        except Exception as error:  # a damaged file or a broken connection, met on the way
            raise InputError(f"--data {source}: can't be read on ({first_line(error, type(error).__name__)})") from None

    def text(self, row: dict[str, Any], source: str) -> str:
        """The text of a row. Raises InputError if the row doesn't have what makes it."""
        try:
            text = self.template.format_map(row) if self.template else row[self.column]
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            option = f"--template {self.template}" if self.template else f"--column {self.column}"
            raise InputError(f"{option}: {source} has the columns {', '.join(row)} ({error!r})") from None
        if not isinstance(text, str):
            raise InputError(f"--column {self.column}: {source} has {type(text).__name__} there; text was expected")
        return text

    def check(self) -> None:
        """Raise InputError unless there is a text."""
        if next(self.documents(), None) is None:
            raise InputError(f"--data {' '.join(self.data)}: no UTF-8 text files there that match {self.include}")

    def describe(self) -> dict[str, Any]:
        """What the texts depend on, as JSON has it: the options, and files as they are now."""
        found: list[Any] = []
        for source in self.data:
            if source.startswith(HUB):
                found.append(source)
                continue
            for name, path in self.files(Path(source)):
                stat = path.stat()
                found.append([name, stat.st_size, stat.st_mtime_ns])
        settings = [self.include, self.exclude, self.column, self.template, self.split]
        return {"sources": digest(repr(found).encode()), "settings": settings}


def read_file(name: str, path: Path) -> Iterator[Document]:
    """The text of a file, unless it is empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if text.strip():
        yield name, text


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document is kept for validation. Only its name decides, so that more data never moves it."""
    return zlib.crc32(name.encode()) % 10_000 < fraction * 10_000


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Packing.


class Encoder:
    """Encodes documents, in this process or in several."""

    tokenizer: ClassVar[Tokenizer]  # of a process of its own

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self.pool: Any = None
        self.batch_size = BATCH * processes
        self.vocab_size = tokenizer.vocab_size
        Encoder.tokenizer = tokenizer
        self.processes = processes

    def describe(self) -> dict[str, Any]:
        """What the ids depend on beside the texts, as JSON has it."""
        return {"tokenizer": tokenizer_digest(Encoder.tokenizer.folder)}

    @staticmethod
    def begin(folder: Path) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
        Encoder.tokenizer = Tokenizer.load(folder)

    @staticmethod
    def encode(document: Document) -> list[int]:
        """The ids of a document. The tokenizer adds BOS if it does so; EOS follows."""
        ids = Encoder.tokenizer.encode(document[1])
        end = Encoder.tokenizer.eos_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids

    def batch(self, documents: list[Document]) -> Iterable[list[int]]:
        """The ids of each document, in their order."""
        if self.pool:
            return self.pool.imap(Encoder.encode, documents, chunksize=16)
        return map(Encoder.encode, documents)

    def __enter__(self) -> "Encoder":
        if self.processes > 1:
            spawned = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self.pool = spawned.Pool(self.processes, Encoder.begin, (Encoder.tokenizer.folder,))
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.terminate()


class Row:
    """A file of ids that is being written."""

    def __init__(self, path: Path, count: int, dtype: np.dtype) -> None:
        """count: ids that are there already; what comes after them was not noted, and is written again."""
        self.dtype = dtype
        self.count = count
        self.file: BinaryIO = open(path, "ab")  # noqa: SIM115  closed by `pack`
        self.file.truncate(count * dtype.itemsize)

    def add(self, ids: list[int]) -> None:
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.count += len(ids)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def pack(sources: Any, encoder: Any, folder: Path, val_fraction: float) -> None:
    """Write the ids of all documents to folder/train.bin and folder/val.bin, and their description to tokens.json.

    sources, encoder: Sources and an Encoder, or what stands in their places. What is there already, of the same texts
    by the same encoder, is kept; an interrupted run goes on. Raises InputError if the texts can't be read or the files
    can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "tokens.json"):
        description = {
            **sources.describe(),
            **encoder.describe(),
            "val_fraction": val_fraction,
            "dtype": "uint16" if encoder.vocab_size <= 1 << 16 else "int32",
        }
        state = read_object(folder / "tokens.json")
        if {name: state.get(name) for name in description} != description:
            state = {**description, "documents": 0, "train": 0, "val": 0, "whole": False}
            write_json(folder / "tokens.json", state, indent=2)  # before the files that it described are cut
        if not state["whole"]:
            with encoder:
                pack_rows(sources, encoder, folder, state)


def pack_rows(sources: Any, encoder: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write what is missing, and note in tokens.json from time to time how far it is."""
    dtype = np.dtype(state["dtype"])
    rows = {name: Row(folder / f"{name}.bin", state[name], dtype) for name in ("train", "val")}
    documents = islice(sources.documents(), state["documents"], None)
    bar = tqdm(desc="packing", unit="text", initial=state["documents"], disable=None)
    try:
        while batch := list(islice(documents, encoder.batch_size)):
            for (name, _), ids in zip(batch, encoder.batch(batch), strict=True):
                row = rows["val" if is_held_out(name, state["val_fraction"]) else "train"]
                row.add(ids)
                bar.update()
            state["documents"] += len(batch)
            note(rows, folder, state)
        state["whole"] = True
        note(rows, folder, state)
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror or error})") from None
    finally:
        bar.close()
        for row in rows.values():
            row.file.close()


def note(rows: dict[str, Row], folder: Path, state: dict[str, Any]) -> None:
    """Make sure that the disk has all ids so far, and then that tokens.json counts them."""
    for name, row in rows.items():
        row.sync()
        state[name] = row.count
    write_json(folder / "tokens.json", state, indent=2)


def tokenizer_digest(folder: Path) -> str:
    """What tells a tokenizer from others: the digest of its files."""
    found = []
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            found.append((folder / name).read_bytes())
    return digest(b"\0".join(found))


def load(folder: Path, val_fraction: float) -> tuple[Tensor, Tensor]:
    """(training ids (N,), validation ids (M,)), uint16 or int32, mapped from what `pack` wrote.

    If the documents' names put all of them on one side, that one row is cut in two.
    """
    state = read_object(folder / "tokens.json")
    train, val = (mapped(folder / f"{name}.bin", state[name], state["dtype"]) for name in ("train", "val"))
    if len(train) and len(val):
        return train, val
    whole = train if len(train) else val
    cut = int(len(whole) * (1 - val_fraction))
    return whole[:cut], whole[cut:]


def mapped(path: Path, count: int, dtype: str) -> Tensor:
    """A file of ids as a tensor (count,)."""
    if count == 0:
        return torch.empty(0, dtype=getattr(torch, dtype))
    return torch.from_file(str(path), shared=False, size=count, dtype=getattr(torch, dtype))


# Training examples.


@lru_cache(maxsize=2)
def epoch_order(per_epoch: int, context: int, seed: int, epoch: int) -> tuple[int, Tensor]:
    """(offset at which the row is cut, order (per_epoch,) of its windows) of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    return offset, torch.randperm(per_epoch, generator=generator)


def window(ids: Tensor, index: int, context: int, seed: int) -> Tensor:
    """Training example number `index` of an endless sequence: (context + 1,) int64, cut from ids (N,).

    Each epoch cuts the row at another random offset, and takes the windows in another random order. Both depend on seed
    and epoch alone. So an example depends on its number alone, and a resumed run goes on exactly.
    """
    per_epoch = (len(ids) - 1) // context - 1
    epoch, place = divmod(index, per_epoch)
    offset, order = epoch_order(per_epoch, context, seed, epoch)
    start = offset + int(order[place]) * context
    return ids[start : start + context + 1].long()
