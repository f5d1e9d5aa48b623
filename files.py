"""Files as all commands read and write them: JSON that is checked, and results that appear whole or not at all.

What is being written lies beside its target, in a file or folder of its own name that the writer keeps locked. So two
writers never share one, and what a killed writer left is known by its lock being free: the next run deletes it.
"""

import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: what killed writers left stays there
    fcntl = None  # type: ignore[assignment]

from command import InputError
from values import Kind, shown

LONGEST_NAME = 200  # bytes, of 255 that file systems take
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}  # the file system has no such operation


# Reading.


def check_regular(path: str | Path, pipes: bool = False) -> None:
    """Raise InputError if `path` is there and is no regular file: reading it could take for ever.

    pipes: allow those too, for what a user hands over as <(command), and /dev/null.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # opening it says more
        return
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder; a file was expected")
    ends = stat.S_ISREG(found.st_mode)
    if pipes:
        ends = ends or stat.S_ISFIFO(found.st_mode) or os.path.samestat(found, os.stat(os.devnull))
    if not ends:
        raise InputError(f"{path}: not a regular file; a file was expected")


def read_bytes(path: str | Path, pipes: bool = False) -> bytes:
    """What a file holds. Raises InputError if it can't be read. pipes: as for `check_regular`."""
    check_regular(path, pipes=pipes)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter: a path that can't be one
        raise InputError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path: str | Path, pipes: bool = False) -> str:
    """The text of a UTF-8 file, without a byte-order mark and with \n at the ends of its lines.

    Raises InputError if it can't be read. pipes: as for `check_regular`.
    """
    try:
        text = read_bytes(path, pipes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what Python takes beyond JSON, and for anything ambiguous."""
    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no character") from None


def refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is too large a number")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice")
    return values


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises InputError if it can't be read or isn't JSON."""
    try:
        return parse_json(read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file. Raises InputError if it holds something else."""
    if not os.path.lexists(path):
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each line of a JSONL file that isn't empty: its name for error messages, and its object.

    Raises InputError if the file can't be read, or a line is something else.
    """
    # Not splitlines: it also cuts at other characters, which a JSON string may hold.
    for number, line in enumerate(read_text(path, pipes=True).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: not a JSON object ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}: not a JSON object")
        yield where, value


def check_fields(values: Any, kinds: Mapping[str, Kind], where: str | Path) -> None:
    """Raise InputError unless the values are an object, each of whose fields is what its kind allows.

    A field that is missing counts as null. where: the file, or the part of it, that holds the values.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: not a JSON object")
    for name, kind in kinds.items():
        if name not in values and not kind.allows(None):
            raise InputError(f"{where}: field {name} is missing; {kind} was expected")
        if not kind.allows(values.get(name)):
            raise InputError(f"{where}: {name} is {shown(values[name])}; {kind} was expected")


# Writing.


def check_writable(option: str, path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError unless `replacing` can write `path`, which is left as it was. For results that come late.

    inputs: files that are read, or written by other options, which `path` must not be.
    """
    path = Path(path)
    advice = "name a file in an existing, writable folder"
    if path.is_dir() or (is_stream(path) and not os.access(path, os.W_OK)):
        raise InputError(f"{option} {path}: can't be written; {advice}")
    if is_stream(path):
        return
    target = destination(path)
    if target in [Path(os.path.realpath(other)) for other in inputs]:
        raise InputError(f"{option} {path}: is read or written by this run already; name another file")
    partial = partial_path(target.parent, target.name)
    try:
        os.close(create(partial))
    except OSError as error:
        raise InputError(f"{option} {path}: can't be written ({error.strerror}); {advice}") from None
    partial.unlink()


def destination(path: Path) -> Path:
    """The file that a path means, through all links. Raises InputError if these lead nowhere."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise InputError(f"{path}: can't be written (the link leads back to itself)")
    return target


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the path of an empty file, which takes the place of `path` if all goes well, and is deleted if not.

    A link is followed to what it names. A pipe or a device gets the file's content. Raises InputError if `path` is a
    folder or can't be written; an OSError that names another file passes.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: can't be written (is a folder)")
    through = is_stream(path)
    target = path.absolute() if through else destination(path)
    folder = Path(tempfile.gettempdir()) if through else target.parent
    partial = partial_path(folder, target.name)
    held = -1
    try:
        clear(folder, target.name)
        held = create(partial)
        yield partial
        if through:
            copy_into(path, partial)
            return
        sync(partial)
        partial.replace(target)
        sync_folder(folder)
    except OSError as error:
        if str(partial) not in (error.filename or str(partial), error.filename2):
            raise
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()
        if held >= 0:
            os.close(held)


@contextmanager
def scratch_folder(beside: Path, name: str) -> Iterator[Path]:
    """Give an empty folder in `beside`, which is deleted at the end; or, if this process is killed, by the next run
    that takes the same name. Raises OSError if it can't be made.
    """
    partial = partial_path(beside, name)
    held = -1
    try:
        clear(beside, name)
        held = create(partial, folder=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held >= 0:
            os.close(held)


@contextmanager
def new_folder(path: str | Path, option: str) -> Iterator[Path]:
    """Give an empty folder that becomes `path` if all goes well, and is deleted if not.

    option: which names it. Raises InputError if `path` exists or can't be written; an OSError that names a file
    elsewhere passes.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{option} {path}: exists already; name a new folder")
    beside = next(folder for folder in path.absolute().parents if folder.exists())
    partial = beside  # until there is one
    try:
        with scratch_folder(beside, path.name) as partial:
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(path)
            sync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # the latter comes when the disk is full
        elsewhere = getattr(error, "filename", None)
        if elsewhere and not str(elsewhere).startswith((str(partial), str(path.parent))):
            raise
        why = getattr(error, "strerror", None) or error
        advice = "name a new folder where there is room"
        raise InputError(f"{option} {path}: can't be written ({why}); {advice}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file by `replacing`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def drop_torn_line(path: str | Path) -> bool:
    """Cut off the end of a file of lines that has no line's end: its writer was killed. Returns whether there was one.

    Raises InputError if the file can't be read or written.
    """
    try:
        with open(path, "rb+") as file:
            text = file.read()
            whole = text.rfind(b"\n") + 1
            file.truncate(whole)
    except OSError as error:
        raise unwritable(Path(path), error) from None
    return whole < len(text)


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a UTF-8 file, so that a crash of the machine doesn't lose it. Raises InputError if it can't."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(Path(path), error) from None


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: can't be written ({error.strerror or error})")


def own_descriptor(path: Path) -> int | None:
    """The descriptor of this process's standard output or error if `path` leads to the same file, however it is spelt;
    of /dev/fd/3 and the like the number. None for other files.
    """
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path))
    if found:
        return int(found[1])
    with suppress(OSError):
        there = path.stat()
        for descriptor in (1, 2):
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
    return None


def is_stream(path: Path) -> bool:
    """Whether there is something at `path` that is written into and not replaced."""
    if own_descriptor(path) is not None:
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def copy_into(stream: Path, file: Path) -> None:
    """Write a file's content into a stream, behind what this process has printed."""
    sys.stdout.flush()
    own = own_descriptor(stream)
    with open(file, "rb") as source, open(stream if own is None else own, "ab", closefd=own is None) as target:
        shutil.copyfileobj(source, target)


def partial_path(folder: Path, name: str) -> Path:
    """Where something is written that will be `name`: a path that nobody else has."""
    return folder / f".partial-{secrets.token_hex(4)}-{ending(name)}"


def ending(name: str) -> str:
    """As much of a file's name as leaves room for more in a longer one."""
    return os.fsdecode(os.fsencode(name)[-LONGEST_NAME:])


def create(partial: Path, folder: bool = False) -> int:
    """Make an empty file or folder. Returns a descriptor that holds its lock."""
    while True:
        if folder:
            partial.mkdir(exist_ok=True)
            held = os.open(partial, os.O_RDONLY)
        else:
            held = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        if take(held) and partial.exists():  # else another run deleted it before it was locked
            return held
        os.close(held)


def take(descriptor: int) -> bool:
    """Lock an open file or folder for this process. Returns whether nobody else holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def clear(folder: Path, name: str) -> None:
    """Delete what killed writers of `name` left in the folder."""
    if fcntl is None:
        return
    for left in folder.glob(f".partial-????????-{glob.escape(ending(name))}"):
        with suppress(OSError):  # gone by now, or another user's
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held, or can't be known
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Make sure that the disk has a file or folder. Raises OSError if it doesn't take it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """So that a crash doesn't undo a rename. Nothing is lost where that can't be done: the file itself is whole."""
    with suppress(OSError):
        sync(folder)


# One at a time.


@contextmanager
def locked(target: str | Path, wait: float = 0) -> Iterator[None]:
    """Keep other runs from doing the same work. Raises InputError, with the holder's name, if another run is at it.

    target: the file or folder that will be written. wait: how many seconds another run may take to end. The lock, a
    hidden file beside the target, ends with its process.
    """
    target = Path(os.path.realpath(target))
    path = target.with_name(f".{ending(target.name)}.lock")
    lock = FileLock(str(path))
    try:
        acquire(lock, path, target, wait)
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # while it is held: who has opened it sees that it is gone, and makes another
        lock.release()


def acquire(lock: BaseFileLock, path: Path, target: Path, wait: float) -> None:
    """Take the lock of `locked`, and write this process's name into its file."""
    try:
        lock.acquire(timeout=wait)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    except Timeout:
        raise InputError(f"{target}: {holder(path)} is writing it; wait until it has ended") from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise unwritable(target, error) from None


def holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip() or "another process"
    return "another process"
