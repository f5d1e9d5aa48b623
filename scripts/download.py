"""Download a checkpoint from the Hugging Face hub to checkpoints/REPO. The next run keeps the files that are whole."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import errno
import json
import os
import shutil
from fnmatch import fnmatchcase

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.logging import set_verbosity_error
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from command import InputError, Parser, first_line, run_command
from files import locked
from values import filled

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
WEIGHTS = ("*.safetensors*", "*.bin*")  # the first of which a repository has any is taken
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "README.md")
EXAMPLE = "facebook/layerskip-llama2-7B"
SETTINGS = ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE")
TIMEOUT = 30.0  # seconds that the hub may take to list a repository


def download(repo: str, token: str | None = None) -> Path:
    """Fetch the config, the tokenizer and the weights of a hub repository; returns the folder.

    token: None is the one that `hf auth login` stored. Raises InputError if the files can't be had.
    """
    folder = CHECKPOINTS / repo
    set_verbosity_error()  # its retries needn't be heard of: the error that ends them is
    try:
        commit, files = wanted(repo, token)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            fetch(repo, commit, files, folder, token)
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"{repo!r}: neither a folder nor a repository's name, such as {EXAMPLE}") from None
    except Exception as error:  # of huggingface_hub, its HTTP library, hf_xet, or the disk
        raise InputError(f"{repo}: {problem(repo, error)}") from None
    return folder


def wanted(repo: str, token: str | None) -> tuple[str, list[RepoSibling]]:
    """(a repository's commit, the files of it that a conversion reads). Raises InputError if it has no weights."""
    info = HfApi(token=token).model_info(repo, files_metadata=True, timeout=TIMEOUT)
    if info.sha is None or info.siblings is None:
        raise FileMetadataError("no list of files")
    files = [file for file in info.siblings if "/" not in file.rfilename]
    for pattern in WEIGHTS:
        if any(fnmatchcase(file.rfilename, pattern) for file in files):
            return info.sha, [file for file in files if matches(file, (pattern, *SMALL_FILES))]
    raise InputError(f"{repo}: has no *.safetensors or *.bin; name a repository with weights in Hugging Face's layout")


def matches(file: RepoSibling, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(file.rfilename, pattern) for pattern in patterns)


def fetch(repo: str, commit: str, files: list[RepoSibling], folder: Path, token: str | None) -> None:
    """Download those of the files that aren't there yet as the hub has them.

    Raises InputError if the disk has no room for them, or if what came is something else; then that is deleted.
    """
    for left in folder.glob(".cache/huggingface/download/*.????????.incomplete"):
        left.unlink()  # by a run that was killed; huggingface_hub never goes on with a file of such a name
    missing = [file for file in files if not is_whole(folder / file.rfilename, file)]
    needed = sum(file.size or 0 for file in missing)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise InputError(
            f"{repo}: needs {needed / 1e9:.2f} GB in {folder.parent}, which has {free / 1e9:.2f} GB; make room"
        )
    for file in missing:
        path = folder / file.rfilename
        path.unlink(missing_ok=True)  # else huggingface_hub may take it for what it downloaded before
        hf_hub_download(repo, file.rfilename, revision=commit, token=token, local_dir=folder)
        if not is_whole(path, file):
            path.unlink()
            raise InputError(f"{repo}: {file.rfilename} came damaged, and was deleted; run the command again")


def is_whole(path: Path, file: RepoSibling) -> bool:
    """Whether a file is there, with the content that the hub lists."""
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    if file.lfs:
        with open(path, "rb") as stream:
            return sha_fileobj(stream).hex() == file.lfs.sha256
    return file.blob_id in (None, git_hash(path.read_bytes()))


def problem(repo: str, error: Exception) -> str:
    """What is wrong, and what to do about it."""
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{repo}"
        return (
            f"access is gated; accept its licence at {page}, then log in with `hf auth login` or pass --hf_token TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (403, 404):
        access = "no token with access was given (`hf auth login`, or --hf_token TOKEN)"
        return f"no such repository on the hub, or it is private and {access}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to download, or name the folder if the files are there already"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | FileMetadataError | KeyError):
        todo = f"log in to the network if it wants that{suspects()}; then run the command again"
        return f"the answer is not the hub's; {todo}"
    if status == 401:
        return "the hub refused the token; log in again with `hf auth login`"
    if status is not None:
        return f"the hub is busy or out of order (status {status}); run the command again later to resume"
    reason = first_line(error, type(error).__name__)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"download failed ({reason}); make room, then run the command again to resume"
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename} can't be used ({error.strerror}){suspects()}; put that right and run the command again"
        )
    return f"download failed ({reason}){suspects()}; run the command again to resume"


def suspects() -> str:
    """Which variables of the environment an error may come from, as a part of its message."""
    names = [name for name in os.environ if name.upper() in SETTINGS and os.environ[name]]
    return f"; see whether {', '.join(names)} is right" if names else ""


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("repo", help=f"such as {EXAMPLE}")
    p.add_argument(
        "--hf_token",
        type=filled,
        help="access token for gated repositories (default: the one `hf auth login` stored)",
    )
    args = p.parse_args()
    print(f"downloaded {download(args.repo, args.hf_token)}")


if __name__ == "__main__":
    run_command(main)
