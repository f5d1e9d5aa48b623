"""Download a checkpoint from the Hugging Face hub to checkpoints/REPO. An interrupted download resumes."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.logging import set_verbosity_error

from command import InputError, first_line, run_command

# The error of whichever HTTP library huggingface_hub uses. It is also raised where a host can't be reached.
HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "LICENSE*", "README.md"]


def download(repo: str, token: str | None = None) -> Path:
    """Fetch the config, the tokenizer and the weights of a hub repository; returns the folder.

    token: None is the one that `hf auth login` stored. Raises InputError if the files can't be had.
    """
    folder = CHECKPOINTS / repo
    set_verbosity_error()  # its retries needn't be heard of: the error that ends them is
    try:
        patterns = [weights_pattern(repo, token), *SMALL_FILES]
        snapshot_download(repo, token=token, local_dir=folder, allow_patterns=patterns, ignore_patterns=["*/*"])
    except GatedRepoError:
        raise InputError(
            f"{repo}: access is gated; accept its licence at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or pass --hf_token TOKEN"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"{repo}: no such repository on the hub, or it is private and no token with access was given "
            "(`hf auth login`, or --hf_token TOKEN)"
        ) from None
    except EntryNotFoundError as error:
        raise InputError(f"{repo}: {first_line(error, 'a file is missing')}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which huggingface_hub downloads with, raises the last
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) == 401:
            raise InputError(f"{repo}: the hub refused the token; log in again with `hf auth login`") from None
        reason = first_line(error, type(error).__name__)
        raise InputError(f"{repo}: download failed ({reason}); run the command again to resume") from None
    return folder


def weights_pattern(repo: str, token: str | None) -> str:
    """The weights' files: safetensors before .bin."""
    for name in HfApi(token=token).list_repo_files(repo):
        if name.endswith(".safetensors") and "/" not in name:
            return "*.safetensors*"
    return "*.bin*"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("repo", help="such as facebook/layerskip-llama2-7B")
    p.add_argument("--hf_token", help="access token for gated repositories (default: the one `hf auth login` stored)")
    args = p.parse_args()
    print(f"downloaded {download(args.repo, args.hf_token)}")


if __name__ == "__main__":
    run_command(main)
