"""The measuring scripts: tasks, sweep and prediction, correctness, evaluation; offline, on the demo checkpoint and
tiny models.
"""

import argparse
import csv
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmark
import correctness
import eval as evaluation
import generate
import sweep
import tasks
import tune
from checkpoint import load_model
from command import InputError
from conftest import ROOT, make_hf_model
from drafters import QuantizedDrafter, SelfDrafter
from generate import Decoder, Sampling
from model import Linear
from test_drafters import widen
from test_generate import tiny_model

DEMO = str(ROOT / "checkpoints" / "demo" / "model.pth")
PNG = b"\x89PNG\r\n\x1a\n"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A task of three prompts in a JSONL file, for the tiny models."""
    rows = [dict(prompt=f"def f{i}(x): return", reference=f" x * {i}") for i in range(3)]
    return str(write_jsonl(tmp_path_factory.mktemp("task") / "prompts.jsonl", rows))


# Tasks

ROWS = {
    "cnn_dm_summarization": (dict(article="It rained.", highlights="Rain."), "Article: It rained.\nSummary:", " Rain."),
    "cnn_dm_lm": (
        dict(article=" ".join(f"w{i}" for i in range(103))),
        " ".join(f"w{i}" for i in range(100)),
        " w100 w101 w102",
    ),
    "xsum_summarization": (dict(document="It snowed.", summary="Snow."), "Article: It snowed.\nSummary:", " Snow."),
    "human_eval": (dict(prompt="def f():\n", canonical_solution="    pass\n"), "def f():\n", "    pass\n"),
    "top_v2": (dict(utterance="call mum", semantic_parse="[IN:CALL mum ]"), "call mum", "\n[IN:CALL mum ]"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tasks_are_read_from_local_files(name, kind, tmp_path):
    row, prompt, reference = ROWS[name]
    for split in ("test", "train"):
        path = tmp_path / f"{split}-00000-of-00001.{kind}"
        if kind == "jsonl":
            write_jsonl(path, [row] * 2)
        else:
            import pandas

            frame = pandas.DataFrame([row] * 2)
            frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    assert tasks.load_task(name, data_dir=tmp_path) == [tasks.Example(prompt, reference)] * 2
    shown = tasks.load_task(name, n_shot=1, data_dir=tmp_path)[0]
    assert shown == tasks.Example(f"{prompt}{reference.rstrip()}\n\n{prompt}", reference)


def test_shots_of_a_task_without_training_data_are_not_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [dict(prompt=f"p{i}", reference=f"r{i}") for i in range(5)])
    examples = tasks.load_task(str(path), n_shot=2, seed=3)
    asked = [e.prompt.rsplit("\n\n", 1)[1] for e in examples]
    assert len(examples) == 3 and all(e.prompt.startswith(examples[0].prompt.rsplit("\n\n", 1)[0]) for e in examples)
    assert not any(f"{p}r" in examples[0].prompt for p in asked)


@pytest.mark.parametrize(
    "how,words",
    [
        (dict(name="humaneval"), "is neither a .jsonl file nor one of cnn_dm_summarization"),
        (dict(name="missing.jsonl"), "can't be read"),
        (dict(name="empty.jsonl"), "is empty"),
        (dict(name="field.jsonl"), "line 2: field prompt is missing"),
        (dict(name="kind.jsonl"), "line 1: prompt is 3; a text was expected"),
        (dict(name="good.jsonl", n_shot=2), "has only 2 examples to draw from"),
        (dict(name="bare.jsonl", n_shot=1), "has no reference to show"),
        (dict(name="human_eval", data_dir="."), "has no test*.parquet"),
        (dict(name="top_v2", data_dir="columns"), "has no column semantic_parse"),
        (dict(name="top_v2", data_dir="broken"), "can't be read"),
    ],
)
def test_bad_tasks_end_in_one_line(how, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("empty", ""),
        ("field", '{"prompt": "a"}\n{"text": "b"}\n'),
        ("kind", '{"prompt": 3}\n'),
        ("good", '{"prompt": "a", "reference": "b"}\n' * 2),
        ("bare", '{"prompt": "a"}\n' * 3),
    ):
        (tmp_path / f"{name}.jsonl").write_text(text)
    for folder, text in (("columns", '{"utterance": "a"}\n'), ("broken", "{")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        tasks.load_task(**how)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_scores_against_values_known_by_hand():
    same = tasks.score(["the cat sat", "on the mat today "], ["the cat sat", "on the mat today"])
    assert same == pytest.approx(dict(rouge1=1, rouge2=1, rougeL=1, bleu=100, exact_match=1, edit_distance=0))
    other = tasks.score(["kitten sat"], ["sitting down sat"])
    # one word of two and of three: F = 2 * (1/2 * 1/3) / (1/2 + 1/3); kitten to sitting 3 edits, " down" 5 more
    assert (
        other
        == pytest.approx(dict(rouge1=0.4, rouge2=0, rougeL=0.4, bleu=other["bleu"], exact_match=0, edit_distance=8))
        and other["bleu"] < 30
    )


def test_a_speedup_is_that_of_all_prompts_by_their_medians():
    speedup, low, high = tasks.compare([[3.0, 3.0, 30.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 7.0]])
    assert speedup == 2 and low < 2 < high  # one hiccup on either side changes nothing
    assert tasks.compare([[2.0]], [[1.0]]) == (2, 2, 2)
    hiccups = [[1.0, 1.0, 30.0]] * 9  # one in three is seldom in the majority
    speedup, low, high = tasks.compare([[2.0, 2.0, 2.0]] * 9, hiccups)
    assert speedup == 2 and low <= 2 <= high


def test_results_go_on_only_with_the_same_settings(tmp_path):
    results = tasks.Results(tmp_path / "r", dict(a=1, b=[2]))
    results.add(dict(x=1))
    del results  # until then no other may write there
    results = tasks.Results(tmp_path / "r", dict(a=1, b=[2]))
    assert results.rows == [dict(x=1)] and results.by("x") == {1: dict(x=1)}
    with pytest.raises(InputError, match="r.jsonl has no column 'y', so another version wrote it; name another file"):
        results.by("x", "y")
    del results
    with pytest.raises(InputError, match="was measured with a 1, not 2"):
        tasks.Results(tmp_path / "r", dict(a=2, b=[2]))
    (tmp_path / "r.jsonl").write_text("nonsense")
    with pytest.raises(InputError, match="not a file of results"):
        tasks.Results(tmp_path / "r", dict(a=1))
    assert (tmp_path / "r.jsonl").read_text() == "nonsense"


def test_measuring_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main in (benchmark.main, sweep.main, correctness.main, evaluation.main):
        with pytest.raises(InputError, match="start them without torchrun"):
            main(["--text", "x"] if main is evaluation.main else [])


# Benchmark


@pytest.mark.slow
def test_benchmark_scores_a_task_and_goes_on_after_an_interrupt(tmp_path, monkeypatch, capsys):
    command = (
        "--early_exit 1 --speculate_k 2 --num_prompts 2 --max_new_tokens 12 --repeats 1 --no-compile --device cpu "
        f"--score --out {tmp_path}/b --json {tmp_path}/b.json"
    ).split()
    generate_one, calls = Decoder.generate, []

    def interrupted(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 5:  # two warm-ups, then the first prompt both ways
            raise KeyboardInterrupt
        return generate_one(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(command)
    first = (tmp_path / "b.jsonl").read_text()
    assert len(first.splitlines()) == 2
    monkeypatch.undo()
    benchmark.main(command)
    assert (tmp_path / "b.jsonl").read_text().startswith(first) and len(
        (tmp_path / "b.jsonl").read_text().splitlines()
    ) == 3
    table = json.loads((tmp_path / "b.json").read_text())["table"]
    assert (
        all(row["same_text"] and 0 <= row["rouge1"] <= 1 for row in table)
        and table[0]["edit_distance"] == table[1]["edit_distance"] > 0
    )
    assert [row["k"] for row in csv.DictReader((tmp_path / "b.csv").read_text().splitlines())] == ["0", "2"]
    counts = table[1]["acceptance_probs"]
    assert table[1]["acceptance_by_position"] == pytest.approx([1 - counts[0], counts[2] / (1 - counts[0])])
    assert "rouge1" in capsys.readouterr().out


# Sweep and prediction


@pytest.mark.parametrize("k", [1, 3, 6])
def test_expected_counts_are_those_of_greedy_decoding(checkpoint, k):
    model = load_model(checkpoint("llama3"))
    prompt, tokens = list(range(3, 12)), 60
    text = list(Decoder(model, rows=100).generate(prompt, tokens + k))
    for e in (1, 2, 3):
        decoder = Decoder(model, exit_layer=e, k=k, rows=100)
        chances = tune.exit_chances(decoder, prompt, text, [e])[e]
        assert set(chances) <= {0, 1}
        list(decoder.generate(prompt, tokens))
        assert tune.expected_counts(chances, k, tokens) == decoder.stats.accept_counts


def test_expected_counts_of_even_chances_follow_the_geometric_law():
    counts = torch.tensor(tune.expected_counts([0.7] * 5000, 3, 4000))
    assert (counts / counts.sum()).tolist() == pytest.approx([0.3, 0.7 * 0.3, 0.49 * 0.3, 0.343], abs=1e-3)


def test_sampled_chances_are_the_overlap_of_the_distributions(checkpoint):
    model, sampling = load_model(checkpoint("llama2")), Sampling(0.9, top_k=20)
    decoder, prompt, text = (
        Decoder(model, exit_layer=2, k=2, sampling=sampling, draft_head="full", rows=60),
        [5, 6, 7],
        list(range(10, 30)),
    )
    chances = tune.exit_chances(decoder, prompt, text, [2])[2]
    with torch.inference_mode():
        for i in (0, 7, 18):
            ids = torch.tensor([prompt + text[: i + 1]])
            p, q = (
                sampling.distribution(model.logits(model(ids, None, 0, stop)[0, -1])).double() for stop in (2, None)
            )
            assert chances[i] == pytest.approx(torch.minimum(p, q).sum().item(), abs=1e-5)


def run_sweep(checkpoint, prompts, out, *more):
    sweep.main(
        [
            "--checkpoint_path",
            str(checkpoint),
            "--task",
            prompts,
            "--max_new_tokens",
            "16",
            "--num_prompts",
            "2",
            "--no-compile",
            "--device",
            "cpu",
            "--out",
            str(out),
            *more,
        ]
    )


def test_sweep_goes_on_after_an_interrupt_and_auto_takes_what_it_stored(
    checkpoint, prompts, tmp_path, monkeypatch, capsys
):
    shutil.copytree(checkpoint("llama2").parent, tmp_path / "c")
    path, out = tmp_path / "c" / "model.pth", tmp_path / "sweep"
    real, done = sweep.measure, []

    def measure(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(*args))
        return done[-1]

    monkeypatch.setattr(sweep, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(path, prompts, out, "--speculate_k", "1", "3")
    done.pop()  # one more may be measured
    run_sweep(
        path, prompts, out, "--speculate_k", "1", "2", "--early_exit", "1"
    )  # of these cells (1, 1) is there already
    rows = list(csv.DictReader(Path(f"{out}.csv").read_text().splitlines()))
    cells = [(r["draft_precision"], r["exit_layer"], r["k"]) for r in rows]
    assert cells == [("same", "1", "1"), ("same", "1", "3"), ("same", "1", "2")]
    assert (tmp_path / "sweep.png").read_bytes().startswith(PNG)

    settings = dict(tune.key(load_model(path), False, 0.0))
    entry = json.loads((tmp_path / "c" / "model.tune.json").read_text())
    chosen = {name: entry[0].pop(name) for name in ("exit_layer", "k", "draft_precision")}
    assert entry == [settings] and chosen["draft_precision"] == "same"
    how = "--self_speculative --early_exit auto --speculate_k auto"
    rest = "--num_samples 1 --max_new_tokens 8 --device cpu --temperature 0"
    command = ["--checkpoint_path", str(path), *how.split(), *rest.split()]
    tune.store(path, settings, 4, 3, "int8")
    capsys.readouterr()
    generate.main(command)
    expected = "auto: --self_speculative --early_exit 4 --speculate_k 3 --draft_precision int8 (stored in"
    assert expected in capsys.readouterr().out
    (tmp_path / "c" / "model.tune.json").write_text(json.dumps([{**settings, "exit_layer": 2, "k": 3}]))
    generate.main(command)  # what was stored before there were draft precisions
    assert "auto: --self_speculative --early_exit 2 --speculate_k 3 (stored in" in capsys.readouterr().out
    tune.store(path, settings, None, 1, "same")
    generate.main(command)
    assert "auto: plain decoding, which no draft beats (stored in" in capsys.readouterr().out
    generate.main(command + ["--temperature", "0.5"])  # nothing is stored for sampling
    assert "(calibrated, " in capsys.readouterr().out
    (tmp_path / "c" / "model.tune.json").write_text("[1]")
    with pytest.raises(InputError, match="entry 1: not a JSON object; scripts/sweep.py writes it"):
        generate.main(command)


def test_sweep_goes_over_draft_precisions_and_stores_the_fastest(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    def measure(plain, decoder, *rest):
        """As if the copy of all layers were the fastest."""
        e, k, speedup = decoder.exit_layer, decoder.K, 0.5
        if decoder.drafter.precision == "int8" and e == 4:
            speedup = 1.5
        rates = dict(tokens_per_second=9.0 * speedup, plain_tokens_per_second=9.0)
        return dict(exit_layer=e, k=k, **rates, speedup=speedup, speedup_low=1.0, speedup_high=2.0, seconds=1.0)

    def round_cost(decoder, *rest):
        return 1 if decoder.drafter.precision == "int8" and decoder.exit_layer == 4 else 9

    shutil.copytree(checkpoint("llama2").parent, tmp_path / "c")
    path, out = tmp_path / "c" / "model.pth", tmp_path / "s"
    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(tune, "round_cost", round_cost)
    grid = ["--draft_precision", "same", "int8", "--early_exit", "2", "4", "--speculate_k", "2"]
    run_sweep(path, prompts, out, *grid)
    run_sweep(path, prompts, out, *grid, "--predict")
    for table in ("s.csv", "s.predicted.csv"):
        rows = list(csv.DictReader((tmp_path / table).read_text().splitlines()))
        cells = [(row["draft_precision"], row["exit_layer"]) for row in rows]
        assert cells == [("same", "2"), ("int8", "2"), ("int8", "4")]  # the last layer itself can't draft
        assert max(rows, key=lambda row: float(row["speedup"])) is rows[2]
    assert (tmp_path / "s.predicted.png").read_bytes().startswith(PNG)
    chosen = "--self_speculative --early_exit 4 --speculate_k 2 --draft_precision int8"
    assert capsys.readouterr().out.count(f"fastest: {chosen}; the best drafts reach 13.5 tokens/s") == 2
    assert tune.stored(path, tune.key(load_model(path), False, 0.0))[:3] == (4, 2, "int8")


def test_exits_that_are_tried_if_none_is_named():
    names = dict(draft_precision=["int4", "same"], early_exit=None)
    assert tasks.exits(argparse.Namespace(**names), 5) == {"int4": [1, 2, 3, 4, 5], "same": [1, 2]}
    assert tasks.exits(argparse.Namespace(**names), 1) == {"int4": [1]}
    names["draft_precision"] = ["same"]
    assert tasks.exits(argparse.Namespace(**names), 1) == {"same": [1]}  # which then is refused


def builder(model):
    """What `tune` builds decoders with."""

    def build(precision, e, k, rows):
        return Decoder(model, exit_layer=e, k=k, draft_precision=precision, rows=rows)

    return build


@pytest.mark.parametrize("room", [1, 2, 3])
def test_auto_where_the_prompt_all_but_fills_the_context(checkpoint, room):
    model = load_model(checkpoint("llama2"))

    prompt = [5] * (model.config.context + 1 - room)
    if room < 3:
        with pytest.raises(InputError, match="leave no room to calibrate in"):
            tune.calibrate(builder(model), ["same"], model, prompt)
    else:
        assert tune.calibrate(builder(model), ["same"], model, prompt)[1] >= 1


@pytest.mark.parametrize(
    "seconds,expected",
    [
        (lambda e, k: 0.5 + 0.1 * k * e, "--self_speculative"),
        (lambda e, k: 50.0, "plain decoding, which no draft beats"),
    ],
)
def test_auto_decodes_plainly_where_drafting_costs_too_much(checkpoint, monkeypatch, capsys, seconds, expected):
    monkeypatch.setattr(tune, "round_cost", lambda decoder, *rest: seconds(decoder.exit_layer, decoder.K))
    generate.main(
        [
            "--checkpoint_path",
            str(checkpoint("llama2")),
            "--self_speculative",
            "--early_exit",
            "auto",
            "--num_samples",
            "1",
            "--max_new_tokens",
            "8",
            "--device",
            "cpu",
        ]
    )
    assert f"auto: {expected}" in capsys.readouterr().out


PRECISIONS = ["same", "int8", "int4"]


@pytest.mark.parametrize("cheap", PRECISIONS)
def test_auto_takes_the_cheap_precision(checkpoint, monkeypatch, capsys, cheap):
    def round_cost(decoder, *rest):
        return 0.5 if decoder.drafter.precision == cheap else 9

    monkeypatch.setattr(tune, "round_cost", round_cost)
    command = "--self_speculative --speculate_k auto --early_exit auto --num_samples 1 --max_new_tokens 8 --device cpu"
    generate.main(["--checkpoint_path", str(checkpoint("llama2")), *command.split()])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("auto: "))
    assert "--early_exit" in line and line.count("--draft_precision") == (cheap != "same")
    assert cheap == "same" or f"--draft_precision {cheap} (" in line


def test_auto_chooses_the_fastest_setting_and_none_slower_than_plain_decoding(monkeypatch):
    """By made-up costs of a round, and the rounds that every setting really takes."""
    model, prompt, chosen = tiny_model(), [5, 6, 7], []
    monkeypatch.setattr(tune, "CALIBRATION_K", 3)
    rounds = {}
    for precision in PRECISIONS:
        for e in range(1, 5 - (precision == "same")):
            for k in (1, 2, 3):
                decoder = builder(model)(precision, e, k, 80)
                list(decoder.generate(prompt, tune.CALIBRATION_TOKENS))
                rounds[precision, e, k] = sum(decoder.stats.accept_counts)
    for seed in range(12):
        g = random.Random(seed)
        numbers = {precision: (g.uniform(0.3, 4), g.uniform(0, 0.1)) for precision in PRECISIONS}

        def cost(precision, e, k, numbers=numbers):
            return numbers[precision][0] + numbers[precision][1] * e * k

        def round_cost(decoder, *rest, cost=cost):
            return cost(decoder.drafter.precision, decoder.exit_layer, decoder.K)

        monkeypatch.setattr(tune, "round_cost", round_cost)
        e, k, precision, _ = tune.calibrate(builder(model), PRECISIONS, model, prompt)
        gains = {cell: (tune.CALIBRATION_TOKENS - 1) / (count * cost(*cell)) for cell, count in rounds.items()}
        gain = gains[precision, e, k] if e else 1.0
        assert gain >= 1 and gain >= 0.9 * max(gains.values())  # a copy's chances are taken a little too low
        chosen.append((precision, e is None))
    assert len(set(chosen)) == 4  # each precision, and plain decoding


def test_predict_finds_the_counts_of_every_cell_and_interpolates_the_cost(checkpoint, monkeypatch):
    model, tokens, prompts = load_model(checkpoint("llama3.2")), 24, [[5, 6, 7], [40, 41]]
    build = builder(model)
    monkeypatch.setattr(
        tune, "round_cost", lambda decoder, *rest: 1 + 0.5 * decoder.K + 0.25 * decoder.exit_layer * decoder.K
    )
    predicted = tune.predict(build, prompts, tokens, {"same": [1, 2, 3]}, [1, 2, 3, 4], [1, 4], repeats=1)
    for (precision, e, k), (gain, counts) in predicted.items():
        decoder, found = build(precision, e, k, 60), [0] * (k + 1)
        for prompt in prompts:
            list(decoder.generate(prompt, tokens))
            found = [a + b for a, b in zip(found, decoder.stats.accept_counts, strict=False)]
        assert counts == found
        assert gain == pytest.approx(2 * (tokens - 1) / (sum(found) * (1 + 0.5 * k + 0.25 * e * k)))


@pytest.mark.slow
def test_sweep_predicts_the_demo_checkpoint(tmp_path, capsys):
    common = [
        "--num_prompts",
        "1",
        "--max_new_tokens",
        "10",
        "--no-compile",
        "--device",
        "cpu",
        "--no-store",
        "--out",
        str(tmp_path / "s"),
        "--early_exit",
        "1",
        "3",
        "--speculate_k",
        "2",
    ]
    sweep.main(common)
    sweep.main([*common, "--predict"])
    out = capsys.readouterr().out
    assert "measured 2 cells" in out and "predicted 2 cells" in out and "against the 2 measured" in out
    assert all((tmp_path / f"s{name}.png").read_bytes().startswith(PNG) for name in ("", ".predicted"))
    assert [json.loads(line)["k"] for line in (tmp_path / "s.predicted.jsonl").read_text().splitlines()] == [2, 2]


@pytest.mark.parametrize(
    "more,words",
    [
        (["--early_exit", "4"], "--early_exit 4: the model has 4 layers, so 1 to 3 can be drafted with"),
        (["--early_exit", "0", "1"], "--early_exit/--exit_layer 0: must be a whole number from 1"),
        (
            ["--early_exit", "5", "--draft_precision", "int8"],
            "--early_exit 5: the model has 4 layers, so 1 to 4 can be drafted with",
        ),
        (["--repeats", "0"], "--repeats 0: must be a whole number from 1"),
        (["--num_prompts", "0"], "--num_prompts 0: must be a whole number from 1"),
        (["--max_new_tokens", "128"], "no prompt leaves room for 128 new tokens in the context of 128"),
        (["--out", "/nowhere/x"], "--out /nowhere/x.jsonl: can't be written"),
        (["--task", "nonsense"], "--task nonsense: is neither"),
    ],
)
def test_sweep_says_what_is_wrong_in_one_line(checkpoint, prompts, tmp_path, more, words):
    with pytest.raises(InputError) as caught:
        run_sweep(checkpoint("llama2"), prompts, tmp_path / "x", *more)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Correctness


def run_correctness(checkpoint, prompts, out, *more):
    correctness.main(
        [
            "--checkpoint_path",
            str(checkpoint),
            "--task",
            prompts,
            "--max_new_tokens",
            "60",
            "--early_exit",
            "1",
            "2",
            "--speculate_k",
            "1",
            "3",
            "--no-compile",
            "--device",
            "cpu",
            "--out",
            str(out),
            *more,
        ]
    )


def accept_everything(drafted, draft_probs, logits, u, sampling):
    """The acceptance rule broken on purpose."""
    last = logits[-1:].argmax(-1)
    return torch.cat((drafted, last)), torch.full((1,), len(drafted))


def test_correctness_passes_on_the_engine_and_fails_on_a_broken_one(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    run_correctness(checkpoint("llama2"), prompts, tmp_path / "good")
    assert "0 differences" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()[1:]]
    assert [(r["exit_layer"], r["k"], r["tokens"], r["different"]) for r in rows] == [
        (e, k, 180, 0) for e in (1, 2) for k in (1, 3)
    ]
    monkeypatch.setattr(generate, "accept", accept_everything)
    with pytest.raises(SystemExit, match="NOT what plain decoding writes"):
        run_correctness(checkpoint("llama2"), prompts, tmp_path / "bad")
    found = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[1])
    assert found["unexplained"] == found["different"] > 0 and all(d["gap"] > 0 for d in found["differences"])


def test_correctness_judges_sampled_text_by_its_distribution(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    sampled = ["--temperature", "0.9", "--top_p", "0.95"]
    run_correctness(checkpoint("llama2"), prompts, tmp_path / "good", *sampled)
    assert "smallest p of 4" in capsys.readouterr().out
    monkeypatch.setattr(generate, "accept", accept_everything)
    with pytest.raises(SystemExit, match="does NOT have the model's distribution"):
        run_correctness(checkpoint("llama2"), prompts, tmp_path / "bad", *sampled)


EVERY = ["--draft_precision", "same", "int4", "--draft", "ngram", "--early_exit", "2", "4", "--speculate_k", "3"]
WAYS = ["self E=2 K=3", "self int4 E=2 K=3", "self int4 E=4 K=3"]


def test_correctness_of_every_drafter(checkpoint, prompts, tmp_path, monkeypatch):
    """Copies broken on purpose are found, and nothing else."""
    short, expected = [*EVERY, "--max_new_tokens", "25"], []
    for way in WAYS:
        expected += [way, f"n-gram K=7, {way}"]
    run_correctness(checkpoint("llama2"), prompts, tmp_path / "good", *short)
    rows = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()[1:]]
    assert [row["decoding"] for row in rows] == [*expected, "n-gram K=7"]
    assert all(row["tokens"] == 75 and row["different"] == 0 for row in rows)
    monkeypatch.setattr(QuantizedDrafter, "verify_from", SelfDrafter.verify_from)
    with pytest.raises(SystemExit, match="NOT what plain decoding writes"):
        run_correctness(checkpoint("llama2"), prompts, tmp_path / "copy", *short, "--early_exit", "2")
    rows = [json.loads(line) for line in (tmp_path / "copy.jsonl").read_text().splitlines()[1:]]
    assert {row["decoding"] for row in rows if row["different"]} == set(expected[2:4])


def test_sampled_text_of_every_drafter(checkpoint, prompts, tmp_path, monkeypatch):
    sampled = [*EVERY, "--temperature", "0.9", "--top_p", "0.95"]
    run_correctness(checkpoint("llama2"), prompts, tmp_path / "good", *sampled)
    monkeypatch.setattr(generate, "accept", accept_everything)
    with pytest.raises(SystemExit, match="does NOT have the model's distribution"):
        run_correctness(checkpoint("llama2"), prompts, tmp_path / "bad", *sampled)
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 7 and all(row["p_value"] < 0.01 for row in rows)


def test_a_difference_is_explained_by_rounding_or_not(checkpoint):
    model = load_model(checkpoint("llama2"))
    prompt = [5, 6, 7]
    plain = list(Decoder(model, rows=40).generate(prompt, 10))
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt + plain[:4]]))[0, -1])
        model.drop_caches()
        other = (plain[4] + 1) % model.config.vocab_size
        d = correctness.difference(model, lambda: model, prompt, plain, plain[:4] + [other] + plain[5:])
    assert (d["position"], d["plain"], d["speculative"], d["rounding"]) == (4, plain[4], other, 0)
    assert d["gap"] == pytest.approx((logits[plain[4]] - logits[other]).item(), abs=1e-5) and not correctness.explained(
        d
    )
    assert correctness.explained({**d, "rounding": d["gap"]}) and not correctness.explained(
        {**d, "rounding": 0.4 * d["gap"]}
    )
    assert correctness.difference(model, None, prompt, plain, plain) is None


def test_correctness_of_the_demo_checkpoint(tmp_path, capsys):
    correctness.main(
        [
            "--num_prompts",
            "2",
            "--max_new_tokens",
            "24",
            "--early_exit",
            "3",
            "--speculate_k",
            "4",
            "--no-compile",
            "--device",
            "cpu",
            "--precision",
            "float32",
            "--out",
            str(tmp_path / "c"),
        ]
    )
    assert "1 settings, 48 tokens" in capsys.readouterr().out


def test_results_of_a_checkpoint_that_changed_are_not_taken_over(checkpoint, prompts, tmp_path):
    shutil.copytree(checkpoint("llama2").parent, tmp_path / "c")
    run_correctness(tmp_path / "c" / "model.pth", prompts, tmp_path / "r")
    (tmp_path / "c" / "model.pth").touch()
    with pytest.raises(InputError, match="was measured with files"):
        run_correctness(tmp_path / "c" / "model.pth", prompts, tmp_path / "r")


# Evaluation

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """A folder with one task of each kind that the harness asks of a causal model, and its data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = write_jsonl(
        folder / "data.jsonl",
        [
            dict(question="def f(x): " * (1 + 3 * i), choices=["return x", " value + 1", " * 2"], answer=i % 3)
            for i in range(7)
        ],
    )
    for name, kind, text, target, more in (
        (
            "local_choice",
            "multiple_choice",
            "{{question}}",
            "answer",
            "doc_to_choice: choices\nmetric_list:\n  - metric: acc",
        ),
        ("local_rolling", "loglikelihood_rolling", "", "{{question}}", "metric_list:\n  - metric: bits_per_byte"),
        (
            "local_text",
            "generate_until",
            "{{question}}",
            "{{choices[answer]}}",
            'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 9\nmetric_list:\n  - metric: exact_match',
        ),
    ):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, text=text, target=target, more=more)
        )
    return folder


@pytest.fixture
def quick_harness(monkeypatch):
    """Without the harness's thousands of own tasks, and its 100,000 resamplings for an error bar."""
    import harness

    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", partial(harness.lm_eval.simple_evaluate, bootstrap_iters=0))


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """A tiny random model with a byte-level tokenizer.json that adds BOS, loadable by transformers and converted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from convert_hf_checkpoint import convert

    folder = tmp_path_factory.mktemp("bpe")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        ["def f(x): return value + x * 2"] * 5,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model = make_hf_model("llama2", seed=4)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return folder, convert(folder), model, tokenizer


def answers(results):
    """What a model said to every request of the harness, in order: {(task, document, request): answer}."""
    return {
        (task, s["doc_id"], i): answer
        for task, samples in results["samples"].items()
        for s in samples
        for i, answer in enumerate(s["resps"])
    }


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("how", [[], ["--self_speculative", "--early_exit", "2", "--speculate_k", "3"]])
def test_evaluation_says_what_the_harness_own_backend_says(
    bpe_folder, local_tasks, tmp_path, quick_harness, batch_size, how
):
    from lm_eval.models.huggingface import HFLM

    from harness import TaskManager, lm_eval

    _, path, model, tokenizer = bpe_folder
    names = ["local_choice", "local_rolling", "local_text"]
    theirs = answers(
        lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
            tasks=names,
            task_manager=TaskManager(include_path=str(local_tasks)),
        )
    )
    command = [
        "--checkpoint_path",
        str(path),
        "--tasks",
        *names,
        "--include_path",
        str(local_tasks),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "e"),
        "--batch_size",
        str(batch_size),
        "--log_samples",
        *how,
    ]
    evaluation.main(command)
    ours = answers(json.loads((tmp_path / "e.json").read_text()))
    assert ours.keys() == theirs.keys() and len(ours) == 7 * (3 + 1 + 1)
    for key, theirs_said in theirs.items():
        (mine,), (other,) = ours[key], theirs_said
        if key[0] == "local_text":
            assert mine == other
        elif key[0] == "local_rolling":
            assert mine == pytest.approx(other, abs=1e-4 * 30)  # a sum over some 30 to 300 tokens
        else:
            assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]
    assert {row["task"] for row in csv.DictReader((tmp_path / "e.csv").read_text().splitlines())} == set(names)


def test_log_likelihoods_of_an_exit_are_the_models_cut_there(bpe_folder, local_tasks, tmp_path, quick_harness):
    _, path, *_ = bpe_folder
    model = load_model(path)
    evaluation.main(
        [
            "--checkpoint_path",
            str(path),
            "--tasks",
            "local_choice",
            "--include_path",
            str(local_tasks),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "e"),
            "--exit_layer",
            "2",
            "--log_samples",
        ]
    )
    sample = json.loads((tmp_path / "e.json").read_text())["samples"]["local_choice"][2]
    context, continuation = sample["arguments"][0]
    tokenizer = generate.Tokenizer.load(path.parent)
    before, ids = (tokenizer.encode(text, special=False) for text in (context.rstrip(), context + continuation))
    with torch.inference_mode():
        logprobs = model.logits(model(torch.tensor([[1] + ids]), None, 0, 2)[0]).log_softmax(-1)
    expected = sum(logprobs[i, ids[i]].item() for i in range(len(before), len(ids)))
    assert float(sample["resps"][0][0][0]) == pytest.approx(expected, abs=1e-4)


def test_an_interrupted_evaluation_asks_only_what_is_missing(
    bpe_folder, local_tasks, tmp_path, quick_harness, monkeypatch
):
    import harness

    asked, real = [], harness.run_sample

    def run_sample(decoder, tokenizer, ids, how):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(ids)
        return real(decoder, tokenizer, ids, how)

    monkeypatch.setattr(harness, "run_sample", run_sample)
    command = [
        "--checkpoint_path",
        str(bpe_folder[1]),
        "--tasks",
        "local_text",
        "--include_path",
        str(local_tasks),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "e"),
    ]
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    again = []
    monkeypatch.setattr(harness, "run_sample", lambda *a: (again.append(a[2]), real(*a))[1])
    evaluation.main(command)
    assert len(asked) == 3 and len(again) == 4 and not any(ids in asked for ids in again)


def test_evaluation_of_a_text_at_every_exit_of_the_demo_checkpoint(tmp_path, capsys):
    text = (ROOT / "tests" / "conftest.py").read_text()[:2500]
    (tmp_path / "t.py").write_text(text)
    evaluation.main(
        [
            "--text",
            str(tmp_path / "t.py"),
            "--window",
            "200",
            "--device",
            "cpu",
            "--precision",
            "float32",
            "--out",
            str(tmp_path / "e"),
            "--reference",
            DEMO,
        ]
    )
    rows = list(csv.DictReader((tmp_path / "e.text.csv").read_text().splitlines()))
    assert (
        len(rows) == 12 and float(rows[-1]["agreement"]) == 1 and (tmp_path / "e.text.png").read_bytes().startswith(PNG)
    )
    model, tokenizer = generate.load(DEMO, "cpu", "float32")
    ids = torch.tensor(tokenizer.encode(text))
    count = (len(ids) - 1) // 200
    starts = torch.linspace(0, len(ids) - 201, count).long()
    with torch.inference_mode():
        logits = [model.logits(model(ids[None, s : s + 200], None, 0, 3)[0]).double().log_softmax(-1) for s in starts]
    losses = torch.cat([-lp.gather(1, ids[s + 1 : s + 201, None]) for lp, s in zip(logits, starts, strict=False)])
    assert float(rows[2]["loss"]) == pytest.approx(losses.mean().item(), abs=1e-5) and float(
        rows[2]["perplexity"]
    ) == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert float(rows[2]["bits_per_byte"]) == pytest.approx(
        losses.mean().item() * (len(ids) - 1) / len(text.encode()) / math.log(2), rel=1e-5
    )


def test_evaluation_of_a_text_at_every_exit_of_a_copy(bpe_folder, tmp_path):
    """Against a float model with the weights that the copy's stand for."""
    path, text = bpe_folder[1], "def f(x): return value + x * 2\n" * 30
    (tmp_path / "t.txt").write_text(text)
    common = ["--checkpoint_path", str(path), "--text", str(tmp_path / "t.txt"), "--device", "cpu", "--window", "64"]
    evaluation.main([*common, "--draft_precision", "same", "int4", "--out", str(tmp_path / "e")])
    rows = list(csv.DictReader((tmp_path / "e.text.csv").read_text().splitlines()))
    assert [(row["draft_precision"], row["exit_layer"]) for row in rows] == [
        (precision, str(e)) for precision in ("same", "int4") for e in (1, 2, 3, 4)
    ]
    model, other = load_model(path), load_model(path)
    for layer, copied in zip(other.layers, model.rounded_layers(4, "int4"), strict=True):
        for module, rounded in zip(layer.modules(), copied.modules(), strict=True):
            if isinstance(module, Linear):
                module.weight = nn.Parameter(widen(rounded), requires_grad=False)
    ids = torch.tensor(generate.Tokenizer.load(path.parent).encode(text))
    count = (len(ids) - 1) // 64
    windows = torch.stack([ids[s : s + 65] for s in torch.linspace(0, len(ids) - 65, count).long().tolist()])
    with torch.inference_mode():
        wanted = model.logits(model(windows[:, :-1])).argmax(-1)
        for e in (1, 2, 3, 4):
            logits = model.logits(other(windows[:, :-1], None, 0, e))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            agreement = (logits.argmax(-1) == wanted).double().mean()
            assert float(rows[3 + e]["loss"]) == pytest.approx(loss.item(), abs=1e-4)
            assert float(rows[3 + e]["agreement"]) == pytest.approx(agreement.item(), abs=0.01)
    assert float(rows[3]["agreement"]) == 1 > float(rows[7]["agreement"])


@pytest.mark.parametrize(
    "more,words",
    [
        ([], "nothing to do"),
        (["--tasks", "nonsense"], "--tasks nonsense: not a task of the harness"),
        (["--tasks", "local_choice", "--exit_layer", "5"], "--exit_layer 5: the model has layers 1 to 4"),
        (["--tasks", "local_text", "--early_exit", "2"], "--early_exit is for --self_speculative"),
        (
            ["--tasks", "local_text", "--self_speculative", "--early_exit", "4"],
            "--early_exit 4: the model has 4 layers",
        ),
        (["--tasks", "local_text", "--max_gen_toks", "128"], "generates 128 tokens, but the context is 128"),
        (["--text", "missing.txt"], "missing.txt: can't be read"),
        (["--text", "short.txt"], "more than the window of 128 are needed"),
        (["--text", "long.txt", "--reference", DEMO], "has another tokenizer"),
        (["--tasks", "local_text", "--limit", "0"], "--limit 0: must be a whole number from 1"),
        (["--tasks", "local_text", "--draft_precision", "int8"], "--draft_precision is for --text"),
    ],
)
def test_bad_evaluations_end_in_one_line(bpe_folder, local_tasks, tmp_path, quick_harness, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("def f")
    (tmp_path / "long.txt").write_text("def f(x): return value\n" * 100)
    with pytest.raises(InputError) as caught:
        evaluation.main(
            [
                "--checkpoint_path",
                str(bpe_folder[1]),
                "--include_path",
                str(local_tasks),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "e"),
                *more,
            ]
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)
