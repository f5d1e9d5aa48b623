#!/usr/bin/env bash
# Makes the environment and checks what needs no model: formatting, style, types, shell scripts. All checks run; if any
# of them fails, this says which and fails.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "$0")/environment.sh" requirements.txt scripts/requirements.txt tests/requirements.txt
failed=()

check() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "ruff format" ruff format --check
check "ruff check" ruff check
check "mypy" mypy ./*.py kernels scripts
check "clang-format" clang-format --dry-run --Werror kernels/cpu.cpp
check "shellcheck" shellcheck .ci/run benchmarks/*.sh scripts/*.sh

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
