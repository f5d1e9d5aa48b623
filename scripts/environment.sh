# shellcheck shell=bash
# Sourced by the other scripts: makes .venv from the given requirements files, unless it is up to date, and puts it on
# PATH.
# usage: source environment.sh FILE...
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
stamp=.venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
    echo "making the environment in .venv (PyTorch is large: this can take minutes)" >&2
    [ -x .venv/bin/python ] || python3 -m venv .venv || { rm -rf .venv; exit 1; }
    requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}"
    echo "building the CPU's kernels (half a minute)" >&2  # else the first command would wait for them
    .venv/bin/python -c 'import command; from kernels import cpu; command.run_command(cpu.prepare)' || true
    touch "$stamp"
fi
export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
