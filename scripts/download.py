"""Download a checkpoint from the Hugging Face hub to checkpoints/REPO. An interrupted download resumes."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError,
                                    RepositoryNotFoundError)
from huggingface_hub.utils.logging import set_verbosity_error

from command import InputError, run_command

HTTPError = HfHubHTTPError.__bases__[0]  # of whichever HTTP library huggingface_hub uses: unreachable hosts raise it too
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def download(repo, token=None):
    """Fetch the config, the tokenizer and the weights (safetensors before .bin) of a hub repository; returns the folder."""
    folder = CHECKPOINTS / repo
    set_verbosity_error()  # its retries needn't be heard of: the error that ends them is
    try:
        files = HfApi(token=token).list_repo_files(repo)
        weights = "*.safetensors*" if any(f.endswith(".safetensors") and "/" not in f for f in files) else "*.bin*"
        snapshot_download(repo, token=token, local_dir=folder, allow_patterns=[weights, "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "README.md"],
                          ignore_patterns=["*/*"])
    except GatedRepoError:
        raise InputError(f"{repo}: access is gated; accept its licence at https://huggingface.co/{repo}, then log in with "
                         "`hf auth login` or pass --hf_token TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{repo}: no such repository on the hub, or it is private and no token with access was given "
                         "(`hf auth login`, or --hf_token TOKEN)") from None
    except EntryNotFoundError as error:
        raise InputError(f"{repo}: {str(error).splitlines()[0]}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which huggingface_hub downloads with, raises the last
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise InputError(f"{repo}: the hub refused the token; log in again with `hf auth login`") from None
        raise InputError(f"{repo}: download failed ({(str(error).splitlines() or [type(error).__name__])[0]}); run the command again to resume") from None
    return folder


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("repo", help="such as facebook/layerskip-llama2-7B")
    p.add_argument("--hf_token", help="access token for gated repositories (default: the one `hf auth login` stored)")
    args = p.parse_args()
    print(f"downloaded {download(args.repo, args.hf_token)}")


if __name__ == "__main__":
    run_command(main)
