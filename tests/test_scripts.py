"""Preparing and benchmarking, and the command lines of the documents that the project started from."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import benchmark
from conftest import ROOT, call


def shell(command, cwd=ROOT, **env):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "VIRTUAL_ENV": "x", "PATH": path, **env},
    )


@pytest.mark.slow
def test_the_documented_commands_run_word_for_word(hf_folder, tmp_path):
    """In a copy of the repository, where checkpoints/facebook/layerskip-llama2-7B is there already (here: tiny)."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (
        "adapters.py",
        "model.py",
        "checkpoint.py",
        "drafters.py",
        "command.py",
        "early.py",
        "files.py",
        "quantize.py",
        "ranks.py",
        "tp.py",
        "generate.py",
        "tokenizer.py",
        "tune.py",
        "values.py",
    ):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copytree(ROOT / "kernels", copy / "kernels")
    source, _ = hf_folder("llama2")
    repo = copy / "checkpoints" / "facebook" / "layerskip-llama2-7B"
    shutil.copytree(source, repo, ignore=shutil.ignore_patterns("model.pth", "model.json"))
    # The hub is out of reach in tests: what `download` leaves behind is there already.
    (copy / "scripts" / "download.py").write_text("")
    script = """set -e
MODEL_REPO=facebook/layerskip-llama2-7B
./scripts/prepare.sh $MODEL_REPO
python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --top_k 100 --temperature 0.6
python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --top_k 100 --temperature 0.6 \\
    --self_speculative --early_exit 3 --speculate_k 3
rm checkpoints/$MODEL_REPO/model.pth
torchrun generate.py --model facebook/layerskip-llama2-7B \\
    --generation_strategy self_speculative --exit_layer 3 --num_speculations 4
"""
    result = shell(script, copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Average tokens/sec") == 3 and result.stdout.count("Mean Accepted") == 2


@pytest.mark.slow
def test_prepare_takes_a_local_folder_and_ends_in_one_line_otherwise(hf_folder, tmp_path):
    shutil.copytree(
        hf_folder("llama3")[0], tmp_path / "local", ignore=shutil.ignore_patterns("model.pth", "model.json")
    )
    result = shell(f"scripts/prepare.sh {tmp_path / 'local'}")
    assert result.returncode == 0 and (tmp_path / "local" / "model.pth").is_file()
    (tmp_path / "local" / "config.json").unlink()
    for command in (f"scripts/prepare.sh {tmp_path / 'local'}", "scripts/prepare.sh 'not a/repo name'"):
        result = shell(command)
        assert result.returncode and "Traceback" not in result.stderr and result.stderr.count("error: ") == 1, (
            result.stderr
        )


@pytest.mark.slow
def test_several_processes_without_torchrun_are_one_line(checkpoint):
    result = shell(f"WORLD_SIZE=2 python generate.py --checkpoint_path {checkpoint('llama2')}")
    assert (
        result.returncode == 1
        and result.stderr.count("\n") == 1
        and "is not one of 2 processes that torchrun started" in result.stderr
    )


@pytest.mark.slow
def test_benchmark(checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f1(x)"}\n{"prompt": "return"}\n')
    args = (
        f"--checkpoint_path {checkpoint('llama2')} --task {tmp_path}/prompts.jsonl --max_new_tokens 20 "
        f"--early_exit 1 2 --speculate_k 2 --repeats 2 --no-compile --json {tmp_path}/out.json"
    )
    result = call(benchmark.main, *args.split())
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert "self E=2 K=2" in result.stdout and "the same, token for token" in result.stdout
    assert [(row["exit_layer"], row["k"]) for row in report["table"]] == [(None, 0), (1, 2), (2, 2)]
    assert report["table"][0]["speedup"] == 1 and all(row["same_text"] for row in report["table"])
    for line, words in (("", "is empty"), ('{"text": 1}', "line 1"), ("{", "line 1")):
        (tmp_path / "prompts.jsonl").write_text(line)
        result = call(benchmark.main, *args.split())
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1


def test_benchmark_of_a_shape_reaches_the_acceptance_that_was_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", (64, 32, 4, 2, 1, 16, 48, 2048, False))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "benchmark.py",
            "--shape",
            "tiny",
            "--acceptance",
            "0.6",
            "--early_exit",
            "1",
            "--speculate_k",
            "3",
            "--num_prompts",
            "2",
            "--max_new_tokens",
            "600",
            "--repeats",
            "1",
            "--no-compile",
            "--device",
            "cpu",
            "--pass_rows",
            "3",
            "--json",
            "-",
        ],
    )
    benchmark.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = report["table"][1]
    expected = [0.4, 0.6 * 0.4, 0.36 * 0.4, 0.216]  # a chain of independent successes
    assert (
        row["acceptance_probs"] == pytest.approx(expected, abs=0.08)
        and row["same_text"]
        and len(report["pass_seconds"]) == 3
    )


def test_readme_links_lead_somewhere_and_cards_are_filled_in():
    import re

    for page in (
        ROOT / "README.md",
        ROOT / "BENCHMARKS.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "checkpoints" / "demo" / "README.md",
    ):
        text = page.read_text()
        assert not re.search(r"@[A-Z]+@", text)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page}: {link}"
