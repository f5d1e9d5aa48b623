#!/usr/bin/env bash
# prepare.sh REPO: download a checkpoint from the Hugging Face hub to checkpoints/REPO and convert it.
# REPO may also be a local folder in Hugging Face's layout: then it is converted where it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -eq 1 ] || { echo "usage: $0 REPO (such as facebook/layerskip-llama2-7B, or a local folder)" >&2; exit 2; }
python=${PYTHON:-python}
[ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python=$here/../.venv/bin/python
folder=$1
if [ ! -d "$folder" ]; then
    "$python" "$here/download.py" "$1"
    folder=$here/../checkpoints/$1
fi
"$python" "$here/convert_hf_checkpoint.py" --checkpoint_dir "$folder"
