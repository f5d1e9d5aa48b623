"""benchmarks/gpu_smoke.sh: what it runs is told by a stand-in for Python, which hangs or crashes where it should."""

import os
import subprocess

import pytest

from conftest import ROOT

STEPS = ["machine", "kernels", "graph", "demo", "speed"]


def smoke(tmp_path, python):
    """(exit code, {step: its line of the summary}) with this Bash script in Python's place."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/usr/bin/env bash\n{python}\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in), "LIMIT": "5", "DEVICE": "cpu"}
    command = ["bash", ROOT / "benchmarks" / "gpu_smoke.sh", tmp_path / "out"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert result.stdout.endswith("\n".join(lines) + "\n"), "the summary comes last"
    return result.returncode, {line.split()[0]: line for line in lines if not line.startswith("driver")}


@pytest.mark.slow
def test_a_step_that_hangs_or_crashes_stops_no_other(tmp_path):
    code, summary = smoke(
        tmp_path,
        """
        case "$*" in
            *decoding_shapes*) echo before; kill -SEGV $$ ;;
            *correctness*) echo begun; sleep 100 ;;
            *) echo "ran $*" ;;
        esac
        """,
    )
    assert code == 1 and list(summary) == STEPS
    assert "failed with 139" in summary["kernels"] and "stopped after 5 s" in summary["demo"]
    assert all(" ok " in summary[step] for step in ("machine", "graph", "speed"))
    out = tmp_path / "out"
    assert (out / "demo.txt").read_text() == "begun\n" and "before" in (out / "kernels.txt").read_text()
    assert "--device cpu" in (out / "speed.txt").read_text()


def test_without_a_failure_the_exit_code_is_0(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.jsonl").write_text("a result of before")
    code, summary = smoke(tmp_path, "true")
    assert code == 0 and all(" ok " in line for line in summary.values())
    assert not (tmp_path / "out" / "demo.jsonl").exists(), "a check would go on where it was, and check nothing"


@pytest.mark.parametrize("script", ["gpu_smoke.sh", "gpu.sh"])
def test_the_scripts_name_what_there_is(script):
    words = (ROOT / "benchmarks" / script).read_text().split()
    files = [word for word in words if word.startswith(("tests/", "scripts/"))]
    assert files and all((ROOT / file).is_file() for file in files)
