#!/usr/bin/env bash
# prepare.sh REPO [int8|int4]: download a checkpoint from the Hugging Face hub to checkpoints/REPO, convert it and, if
# asked to, quantize it. REPO may also be a local folder in Hugging Face's layout: then it is converted where it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
case $#/${2:-} in
    1/ | 2/int8 | 2/int4) ;;
    *)
        echo "usage: $0 REPO [int8|int4] (REPO: such as facebook/layerskip-llama2-7B, or a local folder)" >&2
        exit 2
        ;;
esac

python=${PYTHON:-python}
own=$here/../.venv/bin/python
if [ -z "${PYTHON:-}" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$own" ]; then
    python=$own
fi

folder=$1
if [ ! -d "$folder" ]; then
    "$python" "$here/download.py" -- "$1"
    folder=$here/../checkpoints/$1
fi
"$python" "$here/convert_hf_checkpoint.py" --checkpoint_dir "$folder"
[ $# -eq 1 ] || "$python" "$here/../quantize.py" --checkpoint_path "$folder/model.pth" --mode "$2"
