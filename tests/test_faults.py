"""Bad input of all kinds. Whatever is wrong, a command ends in one line that says what, and leaves nothing behind.

Tables say what is given and what the line must have in it. What options and fields there are is not listed here: it is
asked of the code, so that a new one is tested too.
"""

import argparse
import base64
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import benchmark
import convert_gguf
import convert_hf_checkpoint
import correctness
import eval as evaluation
import export_hf_checkpoint
import generate
import quantize
import sweep
import tasks
import tokenizer
import train
import tune
from checkpoint import load_config, save_checkpoint
from command import InputError, Parser, blaming
from conftest import ROOT, call, edit_json
from files import parse_json
from model import ModelConfig
from tokenizer import BackendTokenizer, Tokenizer
from values import Number, filled, filled_path

COMMANDS = {
    module.__name__: module.main
    for module in (
        benchmark,
        convert_gguf,
        convert_hf_checkpoint,
        correctness,
        evaluation,
        export_hf_checkpoint,
        generate,
        quantize,
        sweep,
        train,
    )
}
FEW = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def state(folder):
    """All files below a folder, with what tells a new version of one."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        if not path.is_dir():
            found[str(path)] = stat.st_size, stat.st_mtime_ns
    return found


def check_fault(folder, words, main, *args, **how):
    """Run a command, which must end in one line with the words, and leave the folder as it is."""
    before = state(folder)
    result = call(main, *args, **how)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and words in lines[0], lines[0]
    assert state(folder) == before


@pytest.fixture
def folder(hf_folder, checkpoint, tmp_path):
    """A folder in Hugging Face's layout, converted."""
    checkpoint("llama2")
    copy = tmp_path / "folder"
    shutil.copytree(hf_folder("llama2")[0], copy)
    return copy


# Options. Each is asked for its type, which says what it must refuse.


class Parsed(Exception):
    pass


def options(main):
    """The options of a command: argparse's actions."""

    def stop(self, args=None, namespace=None):
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", ["command"])
        with pytest.raises(Parsed) as caught:
            main()
    parser = caught.value.args[0]
    assert isinstance(parser, Parser)
    return [action for action in parser._actions if action.nargs != 0 and not action.choices or action.type]


TYPED = [(name, action) for name, main in COMMANDS.items() for action in options(main)]
TEXTS = {"prompt", "system", "stop", "device", "exclude", "tasks"}  # which may be anything, also empty
NUMBERS = ["", "x", "nan", "inf", "-inf", "1e400", str(10**30), str(-(10**30)), "9" * 5000, "1e", "0x10", "\0", "٣x"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_type_that_refuses_what_can_not_be(name, tmp_path):
    for _, action in [typed for typed in TYPED if typed[0] == name]:
        if action.type is None:
            assert action.dest in TEXTS
            continue
        option = action.option_strings[0] if action.option_strings else None
        if action.type in (filled, filled_path):
            bad, words = ["", " ", "a\0b"], ""
        else:
            bad, words = NUMBERS, "must be"
            assert isinstance(action.type, Number), option
        for value in bad:
            given = [f"{option}={value}"] if option else [value]
            check_fault(tmp_path, words, COMMANDS[name], *given)
            check_fault(tmp_path, option or action.dest, COMMANDS[name], *given)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_least_and_a_largest_value(name, tmp_path):
    for _, action in [typed for typed in TYPED if typed[0] == name]:
        if not isinstance(action.type, Number):
            continue
        below, above = action.type.least - 1, action.type.most + 1
        assert math.isfinite(below) and math.isfinite(above)
        for value in (below, above, float(below), 2.5 if action.type.read is int else above):
            words = f"{action.option_strings[0]}"
            check_fault(tmp_path, words, COMMANDS[name], f"{action.option_strings[0]}={value}")
        for value in (action.type.least, action.type.most):
            assert action.type(str(value)) == value


PLAIN = [
    (generate.main, ["--temperature", "nan"], "--temperature nan: must be a number"),
    (generate.main, ["--speculate_k", "automatic"], "must be a whole number from 1 to 15"),
    (generate.main, ["--seed", str(2**70)], "--seed 1180591620717411303424: must be"),
    (generate.main, ["--nonsense"], "unrecognized arguments: --nonsense"),
    (generate.main, ["--json"], "--json expected one argument"),
    (generate.main, ["--checkpoint_path", "."], ".: is a folder"),
    (generate.main, ["--checkpoint_path", "x" * 300 + "/model.pth"], "File name too long"),
    (generate.main, ["--checkpoint_path", "two\nlines.pth"], "two lines.pth: not found"),
    (generate.main, ["--prompt_file", "two\nlines"], "two lines: can't be read"),
    (generate.main, ["--prompt_file", "."], "--prompt_file .: is a folder"),
    (generate.main, ["--prompt_file", "/dev/zero"], "--prompt_file /dev/zero: not a regular file"),
    (generate.main, ["--top_p", "0"], "--top_p 0.0: must be above 0"),
    (generate.main, ["--x\ny"], "unrecognized arguments: --x y"),
    (generate.main, ["--prompt_file", "/dev/full"], "--prompt_file /dev/full: not a regular file"),
    (convert_hf_checkpoint.main, ["--checkpoint_dir", "two\nlines"], "two lines: no such folder"),
    (quantize.main, [], "required: --checkpoint_path"),
    (quantize.main, ["--mode", "int5"], "--mode invalid choice"),
    (train.main, ["--data", "", "--out", "x"], "--data is empty"),
    (train.main, ["--data", "x", "", "--out", "x"], "--data is empty"),
    (train.main, ["--data", ".", "--out", ""], "--out is empty"),
    (train.main, ["--data", ".", "--out", "x", "--context", str(10**12)], "--context 1000000000000: must be"),
    (train.main, ["--data", ".", "--out", "x", "--device", "cpu", "--include", "/x"], "--include /x: not a pattern"),
    (train.main, ["--data", ".", "--out", "x", "--device", "cpu", "--include", ""], "--include is empty"),
    (train.main, ["--data", "x" * 300, "--out", "x", "--device", "cpu"], "File name too long"),
    (train.main, ["--data", ".", "--out", "x", "--dim", "10", "--n_head", "3"], "--dim 10: must be an even multiple"),
    (train.main, ["--data", ".", "--out", "x", "--n_head", "1", "--n_kv_head", "2"], "--n_kv_head 2: must divide"),
]


@pytest.mark.parametrize("main,args,words", PLAIN, ids=lambda value: str(value)[:40] if isinstance(value, list) else "")
def test_bad_options_end_in_one_line(main, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_fault(tmp_path, words, main, *args)


DEVICES = ["", "mkldnn", "opengl", "vulkan", "meta", "lazy", "hpu", "cp\nu", "0", "cpu,cuda", "cuda:x", "cuda:99", ":"]


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_none(device, folder):
    args = ["--checkpoint_path", folder / "model.pth", f"--device={device}"]
    check_fault(folder, f"--device {' '.join(device.split())}: ", generate.main, *args)
    if not device.startswith("cuda"):
        check_fault(folder, "must be cpu, cuda, mps, xpu, or one of several, such as cuda:1", generate.main, *args)


def test_the_null_device_is_an_empty_prompt(folder):
    for name in (os.devnull, folder / "null"):
        (folder / "null").unlink(missing_ok=True)
        (folder / "null").symlink_to(os.devnull)
        args = ["--checkpoint_path", folder / "model.pth", *GENERATE, "--prompt_file", name]
        result = call(generate.main, *args)
        assert result.returncode == 0, result.stderr


@FEW
@given(st.sampled_from([typed for typed in TYPED if typed[0] == "generate"]), st.text())
def test_any_text_as_an_option_is_taken_or_refused(typed, text):
    with suppress(InputError, SystemExit):
        generate.parse_args([f"{typed[1].option_strings[0]}={text}"])


def test_a_model_too_large_for_memory_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x): return x\n" * 400)
    size = ["--dim", "65536", "--n_head", "8", "--n_layer", "500", "--intermediate_size", "65536"]
    result = call(
        train.main,
        "--data",
        "text.txt",
        "--out",
        "out",
        "--vocab_size",
        "290",
        "--context",
        "16",
        "--device",
        "cpu",
        *size,
    )
    assert result.returncode == 1 and "a model of this size needs" in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


# Files of JSON. Each is damaged in each way.

CONTENTS = {
    "nothing": b"",
    "half an object": b'{"a": ',
    "nested too deeply": b"[" * 200_000 + b"]" * 200_000,
    "objects nested too deeply": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not a number": b'{"vocab_size": NaN, "prompt": "x"}',
    "infinity": b'{"vocab_size": -Infinity, "prompt": "x"}',
    "a number too large": b'{"vocab_size": 1e400, "prompt": "x"}',
    "a number of too many digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "a field twice": b'{"vocab_size": 1, "vocab_size": 1, "prompt": "x"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "NUL characters": b"\0" * 100,
    "half a surrogate pair": b'{"prompt": "x\\uD83d"}',
    "half a surrogate pair as a name": b'{"\\udc00": 1, "prompt": "x"}',
    "a text": b'"prompt"',
    "null": b"null",
    "a number": b"3",
    "lists in a list": b"[[]]",
}


def no_regular_file(path, kind):
    """Put something there that can't be read as a file is."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        target = {"endless": "/dev/zero", "broken link": "nowhere", "loop": path.name}[kind]
        path.symlink_to(target)


KINDS = ["folder", "pipe", "endless", "broken link", "loop"]
GENERATE = ["--max_new_tokens", "2", "--num_samples", "1", "--device", "cpu"]
AUTO = ["--self_speculative", "--early_exit", "auto", "--speculate_k", "auto", "--temperature", "0"]
GPTQ = ["--mode", "int4-gptq", "--groupsize", "32", "--device", "cpu"]


def use(folder, name):
    """(main, arguments) of a command that reads this file of a checkpoint folder."""
    model = folder / "model.pth"
    if name == "model.tune.json":
        return generate.main, ["--checkpoint_path", model, *GENERATE, *AUTO]
    if name == "model.json":
        return generate.main, ["--checkpoint_path", model, *GENERATE]
    if name == "prompts.jsonl":
        return quantize.main, ["--checkpoint_path", model, *GPTQ, "--calibration", folder / name]
    if name == "task.jsonl":
        return correctness.main, ["--checkpoint_path", model, "--task", folder / name, "--device", "cpu"]
    return convert_hf_checkpoint.main, ["--checkpoint_dir", folder]


FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "model.json",
    "model.tune.json",
    "prompts.jsonl",
    "task.jsonl",
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_the_json_they_should_be(name, content, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / name).write_bytes(CONTENTS[content])
    main, args = use(folder, name)
    check_fault(folder, name, main, *args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FILES, "tokenizer.model", "model.safetensors", "chat_template.jinja", "model.pth"])
def test_files_that_are_no_files(name, kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / name).unlink(missing_ok=True)
    no_regular_file(folder / name, kind)
    main, args = use(folder, name)
    if name == "model.pth":
        main, args = use(folder, "model.json")
    if name in ("prompts.jsonl", "task.jsonl") and kind == "pipe":
        return  # a user may hand over <(command)
    signal.alarm(20)
    try:
        check_fault(folder, "", main, *args)
    finally:
        signal.alarm(0)


# Fields.

WRONG = [True, 1.5, -1, 0, 10**40, 2**70, "4", "", [1], {}, [[]], {"a": 1}]


@pytest.mark.parametrize("field", convert_hf_checkpoint.CONFIG)
def test_fields_of_config_json(field, folder):
    kind = convert_hf_checkpoint.CONFIG[field]
    for value in [wrong for wrong in WRONG if not kind.allows(wrong)]:
        shutil.copy(folder / "config.json", folder / "kept.json")
        edit_json(folder / "config.json", **{field: value})
        check_fault(folder, f"config.json: {field} is", convert_hf_checkpoint.main, "--checkpoint_dir", folder)
        (folder / "kept.json").replace(folder / "config.json")


@pytest.mark.parametrize("field", ModelConfig.__dataclass_fields__)
def test_fields_of_model_json(field, folder):
    path = folder / "model.json"
    values = json.loads(path.read_text())
    refused = 0
    for value in [*WRONG, None]:
        path.write_text(json.dumps({**values, field: value}))
        try:
            load_config(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error) and field.split("_")[-1] in str(error)
            refused += 1
    assert refused >= 4
    path.write_text(json.dumps({name: v for name, v in values.items() if name != field}))
    with pytest.raises(InputError, match=f"field '{field}' is missing"):
        load_config(path)


@pytest.mark.parametrize("field", [*tune.FIELDS])
def test_fields_of_stored_settings(field, folder):
    entry = dict(device="cpu", precision="float32", compile=False, greedy=True, exit_layer=1, k=1)
    for value in [wrong for wrong in WRONG if not tune.FIELDS[field].allows(wrong)]:
        (folder / "model.tune.json").write_text(json.dumps([entry, {**entry, field: value}]))
        main, args = use(folder, "model.tune.json")
        check_fault(folder, f"model.tune.json, entry 2: {field} is", main, *args)


TOKENIZER_FIELDS = [
    ("tokenizer_config.json", {"tokenizer_class": 3}),
    ("tokenizer_config.json", {"add_bos_token": "false"}),
    ("tokenizer_config.json", {"legacy": 0}),
    ("tokenizer_config.json", {"bos_token": 3}),
    ("tokenizer_config.json", {"bos_token": {"content": 3}}),
    ("tokenizer_config.json", {"bos_token": {"content": "<s>", "lstrip": "no"}}),
    ("tokenizer_config.json", {"additional_special_tokens": [3]}),
    ("tokenizer_config.json", {"extra_special_tokens": 3}),
    ("tokenizer_config.json", {"chat_template": 3}),
    ("tokenizer_config.json", {"chat_template": [{"name": ["x"], "template": "y"}]}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 3}]}),
    ("tokenizer_config.json", {"chat_template": [3]}),
    ("tokenizer_config.json", {"tokenizer_class": "a\nb"}),
    ("tokenizer_config.json", {"added_tokens_decoder": 3}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "a", "lstrip": "no"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [3]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": None}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1" * 40: {"content": "a"}}}),
    ("special_tokens_map.json", {"bos_token": {"text": "a"}}),
    ("special_tokens_map.json", {"additional_special_tokens": 3}),
    ("added_tokens.json", {"<pad>": "300"}),
    ("added_tokens.json", {"<pad>": 1.5}),
    ("added_tokens.json", {"<pad>": -1}),
    ("added_tokens.json", {"<pad>": 10**40}),
    ("added_tokens.json", {"<pad>": None}),
    ("generation_config.json", {"eos_token_id": "2"}),
    ("generation_config.json", {"eos_token_id": [2, None]}),
    ("generation_config.json", {"eos_token_id": 10**40}),
    ("model.safetensors.index.json", {"weight_map": []}),
    ("model.safetensors.index.json", {"weight_map": {"a": 3}}),
    ("config.json", {"model_type": "llama", "vocab_size": 10**5}),
    ("tokenizer.json", {"added_tokens": "abc"}),
    ("tokenizer.json", {"added_tokens": [3]}),
    ("tokenizer.json", {"added_tokens": [{"content": "a"}]}),
    ("tokenizer.json", {"added_tokens": [{"id": 3, "content": "a", "special": 1}]}),
    ("tokenizer.json", {"added_tokens": [{"id": [3], "content": "a"}]}),
]


@pytest.mark.parametrize("name,values", TOKENIZER_FIELDS, ids=lambda value: str(value)[:60])
def test_fields_of_the_other_files(name, values, folder):
    (folder / name).write_text(json.dumps(values))
    check_fault(folder, f"{folder / name}: ", convert_hf_checkpoint.main, "--checkpoint_dir", folder)


def test_a_tokenizer_class_is_blamed_on_the_file_that_names_it(folder):
    edit_json(folder / "config.json", tokenizer_class="Foo")
    words = "config.json: tokenizer_class Foo is not supported"
    check_fault(folder, f"{folder}/{words}", convert_hf_checkpoint.main, "--checkpoint_dir", folder)


def test_tokens_by_id_that_are_null_are_those_of_older_files(folder):
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": null, "chat_template": "\\ud83d\\ude00"}')
    (folder / "added_tokens.json").write_text('{"<pad>": 300}')
    loaded = Tokenizer.load(folder)
    assert loaded.added["<pad>"] == 300 and loaded.template == "😀"


def test_what_is_common_in_the_wild_is_taken(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30, "bos_token": "<s>"}))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    result = call(convert_hf_checkpoint.main, "--checkpoint_dir", folder)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("columns", [correctness.GREEDY, correctness.SAMPLED, sweep.COLUMNS])
def test_rows_of_results(columns, tmp_path):
    path = tmp_path / "r.jsonl"
    good = {name: next(value for value in [1, "x", []] if kind.allows(value)) for name, kind in columns.items()}
    path.write_text("{}\n" + json.dumps(good) + "\n")
    assert tasks.Results(tmp_path / "r", {}, columns).rows == [good]
    for name, kind in columns.items():
        for value in [wrong for wrong in [*WRONG, None] if not kind.allows(wrong)]:
            path.write_text("{}\n" + json.dumps({**good, name: value}) + "\n")
            with pytest.raises(InputError, match=f"r.jsonl, line 2: {name} is "):
                tasks.Results(tmp_path / "r", {}, columns)
    for content in [content for content in CONTENTS.values() if content]:
        path.write_bytes(b"{}\n" + content + b"\n")
        with pytest.raises(InputError, match="r.jsonl"):
            tasks.Results(tmp_path / "r", {}, columns)


def test_rows_of_a_benchmark(folder, monkeypatch):
    (folder / "task.jsonl").write_text('{"prompt": "def f1(x)"}\n{"prompt": "def f2(x)"}\n')
    how = "--early_exit 1 --speculate_k 2 --num_prompts 2 --max_new_tokens 3 --repeats 1 --no-compile --device cpu"
    args = ["--checkpoint_path", folder / "model.pth", "--task", folder / "task.jsonl", *how.split()]
    args += ["--out", folder / "r"]
    columns, kinds = benchmark.columns, {}
    monkeypatch.setattr(benchmark, "columns", lambda *known: kinds.update(columns(*known)) or kinds)
    assert call(benchmark.main, *args).returncode == 0
    header, first, second = (folder / "r.jsonl").read_text().splitlines()
    row = json.loads(second)
    assert row.keys() == kinds.keys() and all(kind.allows(row[name]) for name, kind in kinds.items())
    plain, drafted = row["decoded"]
    spoiled = [{**drafted, name: value} for name in drafted for value in (None, "x", [-1], [[]], {})]
    spoiled.append({**drafted, "decode_seconds": 0})
    spoiled.append({**drafted, "rounds": {name: [1] for name in drafted["rounds"]}})
    wrong = {
        "repeat": [*WRONG, None, 1],
        "prompt": [*WRONG, None, 2, 99],
        "decoded": [*WRONG, None, [], {}, [plain], [plain, 3], [plain] * 3, *([plain, run] for run in spoiled)],
    }
    for name, values in wrong.items():
        assert [value for value in values if kinds[name].allows(value)] == ([] if name == "decoded" else [0])
    for words, last in ("line 3: decoded is ", json.dumps({**row, "decoded": []})), ("two rows of the same", first):
        (folder / "r.jsonl").write_text("\n".join([header, first, last, ""]))
        result = call(benchmark.main, *args)
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


ROWS = [b'{"prompt": 3}', b'{"text": "x"}', b'{"prompt": "x", "reference": 3}', b'{"prompt": "x"}\n{"prompt": null}']


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_prompts(rows, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("prompts.jsonl", "task.jsonl"):
        (folder / name).write_bytes(rows)
        main, args = use(folder, name)
        check_fault(folder, f"{name}, line {rows.count(10) + 1}: ", main, *args)


@FEW
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_value_as_json_is_read_or_refused(value):
    text = json.dumps(value)
    with suppress(ValueError):
        assert parse_json(text) == value
    assert not isinstance(value, float) or math.isfinite(value) or pytest.raises(ValueError, parse_json, text)


@FEW
@given(
    st.sampled_from(["config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]),
    st.dictionaries(
        st.sampled_from([*convert_hf_checkpoint.CONFIG, "tokenizer_class", "added_tokens_decoder", "pad_token"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    ),
)
def test_any_fields_are_read_or_refused(shared, name, values):
    before = json.loads((shared / name).read_text()) if (shared / name).exists() else {}
    (shared / "other").mkdir(exist_ok=True)
    for file in shared.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy(file, shared / "other")
    (shared / "other" / name).write_text(json.dumps({**before, **values}))
    with suppress(InputError):
        convert_hf_checkpoint.read_config(shared / "other")
    shutil.rmtree(shared / "other")


@pytest.fixture(scope="module")
def shared(hf_folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("shared") / "folder"
    shutil.copytree(hf_folder("llama2")[0], copy)
    return copy


# Weights.


def shifted(tensors, above, below):
    """The same, with the last row of one tensor as the first of the one stacked below it."""
    prefix = "model.layers.1."
    above, below = prefix + above, prefix + below
    whole = torch.cat([tensors[above], tensors[below]])
    cut = len(tensors[above]) - 1
    return {**tensors, above: whole[:cut].clone(), below: whole[cut:].clone()}


def other_shape(tensors, name, *shape):
    return {**tensors, name: torch.ones(shape)}


Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"
HEAD, NORM, EMBEDDING = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
SHAPES = {  # what is wrong: (how the tensors are made so, words)
    "rows of q in k": (
        lambda t: shifted(t, "self_attn.q_proj.weight", "self_attn.k_proj.weight"),
        f"{Q} has the shape (63, 64); config.json wants (64, 64)",
    ),
    "rows of k in v": (lambda t: shifted(t, "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "k_proj.weight has"),
    "rows of gate in up": (lambda t: shifted(t, "mlp.gate_proj.weight", "mlp.up_proj.weight"), f"{GATE} has the shape"),
    "a scalar": (lambda t: other_shape(t, Q), f"{Q} has the shape ()"),
    "no rows": (lambda t: other_shape(t, Q, 0, 64), f"{Q} has the shape (0, 64)"),
    "no columns": (lambda t: other_shape(t, Q, 64, 0), f"{Q} has the shape (64, 0)"),
    "three dimensions": (lambda t: other_shape(t, Q, 64, 8, 8), f"{Q} has the shape (64, 8, 8)"),
    "turned": (lambda t: {**t, GATE: t[GATE].T.contiguous()}, f"{GATE} has the shape"),
    "a norm as a matrix": (lambda t: other_shape(t, NORM, 64, 1), f"{NORM} has the shape (64, 1)"),
    "a head too short": (lambda t: {**t, HEAD: t[HEAD][1:].clone()}, f"{HEAD} has the shape"),
    "an embedding too wide": (lambda t: other_shape(t, EMBEDDING, 300, 65), f"{EMBEDDING} has the shape (300, 65)"),
    "lines in a name": (lambda t: {**t, "a\nb": t[NORM].clone()}, "tensor a b is not part of"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_tensors_of_another_shape(what, folder):
    change, words = SHAPES[what]
    save_file(change(tensors_of(folder)), folder / "model.safetensors")
    check_fault(folder, words, convert_hf_checkpoint.main, "--checkpoint_dir", folder)


def test_lines_in_the_name_of_a_shard(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b\\nc"}}')
    check_fault(folder, f"{folder}/b c: not found", convert_hf_checkpoint.main, "--checkpoint_dir", folder)


def test_a_tensor_in_two_files(folder):
    tensors = tensors_of(folder)
    save_file(tensors, folder / "model-1.safetensors")
    save_file({NORM: tensors[NORM] + 1}, folder / "model-2.safetensors")
    names = {name: "model-1.safetensors" for name in tensors} | {"x": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    words = f"model-2.safetensors: tensor {NORM} is in another file too"
    check_fault(folder, words, convert_hf_checkpoint.main, "--checkpoint_dir", folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "norm.weight", "layers.1.attention.wqkv.weight"])
def test_weights_that_are_not_finite_are_not_passed_on(name, value, folder):
    state, config = torch.load(folder / "model.pth", weights_only=True), load_config(folder / "model.json")
    state[name].flatten()[5] = value
    save_checkpoint(folder / "model.pth", state, config)
    text = folder / "text.txt"
    text.write_text("def f1(x): return x\n" * 500)
    words = f"model.pth: tensor {name} holds values that are not finite"
    model = ["--checkpoint_path", folder / "model.pth"]
    for mode in (["--mode", "int8"], ["--mode", "int4", "--groupsize", "32"], [*GPTQ, "--calibration", text]):
        check_fault(folder, words, quantize.main, *model, *mode)
    check_fault(folder, words, export_hf_checkpoint.main, *model, "--out", folder / "out")


class Stranger:
    pass


def bins(tensors):
    """{what: what torch.save is given}: files that must be refused."""
    name = "model.norm.weight"
    rest = {key: t for key, t in tensors.items() if key != name}
    return {
        "nested in state_dict": {"state_dict": tensors},
        "nested in model": {"model": tensors, "step": 3},
        "a list": list(tensors.values()),
        "one tensor": torch.zeros(3),
        "nothing": {},
        "a number among them": {**tensors, "step": 3},
        "names that are numbers": {**tensors, 3: torch.zeros(3)},
        "code": {**tensors, "code": Stranger()},
        "a function": {**tensors, "code": os.system},
        "sparse": {**rest, name: torch.ones(64).to_sparse()},
        "quantized": {**rest, name: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)},
        "nested": {**rest, name: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "nested, jagged": {**rest, name: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)},
        "float8": {**rest, name: torch.ones(64).to(torch.float8_e4m3fn)},
        "meta": {**rest, name: torch.ones(64, device="meta")},
        "complex": {**rest, name: torch.ones(64, dtype=torch.complex64)},
        "boolean": {**rest, name: torch.ones(64, dtype=torch.bool)},
        "a scalar": {**rest, name: torch.ones(())},
        "empty": {**rest, name: torch.ones(0)},
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    BINS = list(bins({}))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("what", BINS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_files_with_something_else_are_refused(what, zipped, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = bins(tensors_of(folder))[what]
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would be a line too
        check_fault(folder, "", convert_hf_checkpoint.main, "--checkpoint_dir", folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_files_of_older_savers_convert_to_the_same(zipped, folder):
    expected = torch.load(folder / "model.pth", weights_only=True)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    whole = torch.cat([tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"]])
    odd = {name: nn.Parameter(t) for name, t in tensors.items()}
    odd["model.norm.weight"] = whole[:64]  # two views of one storage
    odd["model.layers.0.input_layernorm.weight"] = whole[64:]
    odd["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    torch.save(odd, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.pth").unlink()
    result = call(convert_hf_checkpoint.main, "--checkpoint_dir", folder)
    assert result.returncode == 0, result.stderr
    found = torch.load(folder / "model.pth", weights_only=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@FEW
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 300), st.booleans())
def test_any_header_of_safetensors_is_read_or_refused(shared, header, length, own_length):
    path = shared / "any.safetensors"
    path.write_bytes((len(header) if own_length else length).to_bytes(8, "little") + header)
    with suppress(InputError):
        convert_hf_checkpoint.read_weights([path])


# Texts that are too long, and chat templates that never end.


def test_texts_that_can_not_fit_are_not_encoded(folder, monkeypatch):
    context = json.loads((folder / "model.json").read_text())["context"]
    text = "x" * (context * 256 + 1)
    (folder / "text.txt").write_text(text)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    monkeypatch.setattr(BackendTokenizer, "_encode", lambda self, text, special: [3] * min(len(text), 10))
    words = f"the text has {len(text)} characters, which can't fit into the context of {context} tokens"
    model = ["--checkpoint_path", folder / "model.pth", *GENERATE]
    for how in (["--prompt_file", folder / "text.txt"], ["--prompt", text], ["--prompt", text, "--chat"]):
        check_fault(folder, words, generate.main, *model, *how)
    for how in ([], ["--chat"]):
        result = call(generate.main, *model, "--interactive", *how, input=f"{text}\nx\n")
        assert result.returncode == 0 and result.stdout.count(words) == 1, result.stderr
    assert call(generate.main, *model, "--prompt", text[1:]).returncode == 0


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ raise }}{% endfor %}{% endfor %}",
    "{% set x = 7 ** (9 ** 9) %}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_chat_templates_that_never_end(template, folder, monkeypatch):
    monkeypatch.setattr(tokenizer, "RENDER_SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGALRM)
    (folder / "chat_template.jinja").write_text(template)
    args = ["--checkpoint_path", folder / "model.pth", *GENERATE, "--chat", "--prompt", "x"]
    check_fault(folder, "can't render this conversation (it takes more than 0.2 seconds)", generate.main, *args)
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_chat_template_that_makes_a_huge_text(folder):
    (folder / "chat_template.jinja").write_text("{{ '%9999999d' % 1 }}")
    args = ["--checkpoint_path", folder / "model.pth", *GENERATE, "--chat", "--prompt", "x"]
    check_fault(folder, "the text has 9999999 characters", generate.main, *args)


def test_chat_templates_outside_the_main_thread(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(Tokenizer.load(folder).render, [dict(role="user", content="x")]).result()
    assert text == "x"


# Tokenizers that fail when they are used.


def panicking(folder, **change):
    """A tokenizer.json of which every part can be read."""
    values = json.loads(Tokenizer.load(folder).backend.to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**values, **change}))


PANICS = {
    "a pattern that takes for ever": dict(
        normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": ""}
    ),
    "a special token that isn't there": dict(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "pieces of no length": dict(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "an unknown word": dict(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "u"}),
}


@pytest.mark.parametrize("what", PANICS)
def test_a_tokenizer_that_panics_when_it_is_used_is_one_line(what, folder, capfd):
    panicking(folder, **PANICS[what])
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    prompt = ["--prompt", "a" * 60 + "b"]
    args = ["--checkpoint_path", folder / "model.pth", *GENERATE, *prompt]
    check_fault(folder, str(folder), generate.main, *args)
    assert capfd.readouterr().err == ""  # what Rust says of it itself


def ranks(*tokens):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokens)


EVERY_BYTE = [(bytes([byte]), byte) for byte in range(256)]
TIKTOKEN = {
    "a byte is missing": (ranks(*EVERY_BYTE[:200]), "no token for the byte 200"),
    "a rank twice": (ranks(*EVERY_BYTE, (b"ab", 255)), "ranks are not"),
    "a gap": (ranks(*EVERY_BYTE, (b"ab", 300)), "ranks are not"),
    "a rank beyond 64 bits": (ranks(*EVERY_BYTE, (b"ab", 2**70)), "ranks are not"),
    "a negative rank": (ranks(*EVERY_BYTE, (b"ab", -1)), "ranks are not"),
    "no rank": (ranks(*EVERY_BYTE) + b"YWI=\n", "not enough values"),
}


@pytest.mark.parametrize("what", TIKTOKEN)
def test_damaged_tiktoken_files(what, folder):
    content, words = TIKTOKEN[what]
    (folder / "tokenizer.model").write_bytes(content)
    check_fault(folder, words, generate.main, "--checkpoint_path", folder / "model.pth", *GENERATE)


def test_ids_beyond_a_tokenizers_table(folder):
    loaded = Tokenizer.load(folder)
    assert loaded.decode([10**6]) == ""
    for ids in ([-1], [2**40]):
        with pytest.raises(InputError, match="can't turn tokens into text"):
            loaded.decode(ids)


def test_calibration_with_the_tokenizer_of_a_larger_model(folder):
    from conftest import write_tokenizer

    (folder / "text.txt").write_text("def f1(x): return x\n" * 500)
    config = json.loads((folder / "model.json").read_text())
    write_tokenizer(folder, vocab_size=config["vocab_size"] + 20)
    args = ["--checkpoint_path", folder / "model.pth", *GPTQ, "--calibration", folder / "text.txt"]
    check_fault(folder, "they don't belong together", quantize.main, *args)


# Training.


@pytest.mark.parametrize("what", ["the loss", "the norm of the gradient"])
def test_a_step_that_is_not_finite_ends_training_and_is_not_saved(what, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("def f(x): return x\n" * 400)
    compute = train.compute_gradients

    def spoil(parallel, data, schedule, step, autocast):
        loss, losses = compute(parallel, data, schedule, step, autocast)
        if step == 2 and what == "the loss":
            loss = loss * math.nan
        if step == 2 and what != "the loss":
            next(parallel.parameters()).grad.fill_(math.inf)
        return loss, losses

    monkeypatch.setattr(train, "compute_gradients", spoil)
    size = "--dim 32 --n_head 2 --n_layer 2 --intermediate_size 48 --context 16 --vocab_size 290 --batch_size 2"
    how = "--device cpu --precision float32 --save_every 1 --steps 5 --eval_every 0"
    out = tmp_path / "out"
    result = call(train.main, "--data", tmp_path / "text.txt", "--out", out, *size.split(), *how.split())
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and line.startswith(f"error: step 3: {what} is "), result.stderr
    saved = load_file(out / "train_state" / "step-2" / "part-1-of-1.safetensors")
    assert json.loads((out / train.STATE_FILE).read_text())["step"] == 2
    assert len(saved) > 20 and all(t.isfinite().all() for t in saved.values())
    assert not (out / "model.pth").exists()


# Standard streams. One process has all imported; it forks for each case, and the fork ends as a process does.

WARM = """
import json, os, sys
sys.path[:0] = [ROOT, ROOT + "/scripts"]
import early, generate, quantize
from command import run_command
cases, folder = json.loads(sys.argv[1]), sys.argv[2]
for number, (module, args, streams) in enumerate(cases):
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for descriptor, name in enumerate(streams):
    if name is None:
        os.close(descriptor)
    if name == "gone":  # a pipe whose reader has left
        read, write = os.pipe()
        os.dup2(write, descriptor)
        os.close(read)
        os.close(write)
    elif name:
        opened = os.open(name.format(folder, number), os.O_RDWR | os.O_CREAT)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
sys.stdin = sys.stdout = sys.stderr = None
for descriptor, name in enumerate(streams):
    if name:
        mode, errors = ("w", "backslashreplace") if descriptor else ("r", None)
        stream = open(descriptor, mode, 1, "ascii", errors, closefd=False)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], stream)
sys.argv = [module, *args]
early.begin()
run_command(dict(generate=generate, quantize=quantize)[module].main)
"""
NULL, OUT, ERR = "/dev/null", "{}/out{}", "{}/err{}"
STREAMS = [  # what, command, options, its streams (None: closed), exit code, what stderr must be
    ("no input to read", generate, [*GENERATE, "--prompt_file", "-"], [None, OUT, ERR], 0, ""),
    ("no output, no input to converse", generate, [*GENERATE, "--interactive"], [None, None, ERR], 0, ""),
    ("nothing at all", generate, [*GENERATE, "--prompt", "é一"], [None, None, None], 0, ""),
    ("nothing at all, and wrong", quantize, ["--checkpoint_path", "x"], [None, None, None], 1, ""),
    ("what ASCII hasn't", generate, [*GENERATE, "--prompt", "é一"], [NULL, OUT, ERR], 0, ""),
    ("nor errors", generate, ["--prompt_file", "é一"], [NULL, OUT, ERR], 1, "error: --prompt_file \\xe9\\u4e00: can't"),
    ("full", generate, [*GENERATE], [NULL, "/dev/full", ERR], 1, "error: input or output: No space left on device"),
    ("full, and wrong", generate, ["--top_p", "7"], [NULL, "/dev/full", ERR], 1, "error: --top_p 7"),
    ("reader gone", generate, [*GENERATE], [NULL, "gone", ERR], 141, ""),
    ("reader of help gone", quantize, ["--help"], [NULL, "gone", ERR], 141, ""),
    ("PyTorch's warnings", quantize, ["--checkpoint_path", "{}/model.pth"], [NULL, OUT, ERR], 1, "error: "),
    ("nowhere to say what is wrong", generate, ["--top_p", "7"], [NULL, OUT, None], 1, ""),
    ("errors full", generate, ["--top_p", "7"], [NULL, OUT, "/dev/full"], 120, ""),  # Python's own code
    ("reader of errors gone", generate, ["--top_p", "7"], [NULL, OUT, "gone"], 120, ""),
]


@pytest.mark.slow
def test_standard_streams_that_are_closed_full_or_broken(checkpoint, tmp_path):
    path = checkpoint("llama2")
    model = ["--checkpoint_path", str(path)]
    shutil.copy(path.with_suffix(".json"), tmp_path)
    odd = torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)
    torch.save({**torch.load(path, weights_only=True), "norm.weight": odd}, tmp_path / "model.pth")
    cases = []
    for _, module, args, streams, *_ in STREAMS:
        args = [arg.format(tmp_path) for arg in args]
        cases.append((module.__name__, args if module is quantize else [*model, *args], streams))
    program = f"ROOT = {str(ROOT)!r}\n{WARM}"
    command = [sys.executable, "-c", program, json.dumps(cases), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # OpenMP's threads would not be there in a fork
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    codes = list(map(int, result.stdout.split()))
    for number, (what, _, _, streams, code, words) in enumerate(STREAMS):
        said = (tmp_path / f"err{number}").read_text() if streams[2] == ERR else ""
        assert codes[number] == code and said.startswith(words) and said.count("\n") == bool(words), (what, said)


# Before a command has begun: while it imports PyTorch, which here is one that does something else.


def scripts():
    paths = [ROOT / f"{name}.py" for name in ("generate", "quantize")]
    paths += [ROOT / "scripts" / f"{name.replace('scripts.', '')}.py" for name in COMMANDS]
    return [path for path in paths if path.exists()]


def fake_torch(folder, program):
    """The folder, in which importing torch is to run a program."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(program)
    return folder


def start(script, folder, **how):
    """A script's process, which imports from this folder first."""
    return subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )


LACKS = [
    (
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "the package torch is missing: pip install",
    ),
    ("raise MemoryError", "out of memory: "),
    ("raise OSError(12, 'Cannot allocate memory')", "out of memory: "),
    ("raise ImportError('libtorch_cpu.so: failed to map segment from shared object')", "out of memory: "),
    ('raise RuntimeError("can\'t start new thread")', "no more threads can be started here: raise the limit"),
]


@pytest.mark.parametrize("torch,words", LACKS, ids=lambda value: value.split("(")[0] if "raise " in value else "")
def test_what_an_import_lacks_is_one_line(torch, words, tmp_path):
    folder = fake_torch(tmp_path, torch)
    running = [start(script, folder) for script in scripts()]
    for process in running:
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 1 and errors.startswith(f"error: {words}") and errors.count("\n") == 1, errors


@pytest.mark.parametrize("error,words", LACKS)
def test_what_a_command_lacks_is_one_line(error, words, tmp_path):
    check_fault(tmp_path, words, partial(exec, error))


def test_other_errors_keep_their_traceback(tmp_path):
    folder = fake_torch(tmp_path, "raise ImportError('x: Operation not permitted')")
    errors = start(ROOT / "quantize.py", folder).communicate()[1]
    assert errors.startswith(b"Traceback") and b"ImportError: x: Operation not permitted" in errors
    with pytest.raises(RuntimeError, match="^wrong$"):
        call(partial(exec, "raise RuntimeError('wrong')"))


def test_memory_that_a_library_lacks_is_not_the_inputs_fault():
    for error in (OSError(12, "Cannot allocate memory"), MemoryError()):
        with pytest.raises(type(error)), blaming("a file"):
            raise error


def test_the_current_folder_is_gone(tmp_path):
    folder, gone = fake_torch(tmp_path, ""), tmp_path / "gone"
    for script in scripts():
        gone.mkdir()
        process = start(script, folder, cwd=gone, preexec_fn=gone.rmdir)
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 1 and errors.startswith("error: the current folder: No such file"), errors
        assert errors.count("\n") == 1


@pytest.mark.slow
def test_without_pythons_unsafe_path():
    """-I is -P, which Python 3.10 hasn't, and more. No fake PyTorch: that would take PYTHONPATH."""
    isolated = [path for path in scripts() if path.stem in ("quantize", "export_hf_checkpoint")]
    for script in [*isolated, ROOT / "generate.py"]:
        result = subprocess.run([sys.executable, "-I", script, "--help"], capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr


def test_what_comes_first_imports_nothing_slow():
    program = "import sys; before = set(sys.modules); import early; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert set(result.stdout.split()) <= {"early", "errno", "types"}, result.stdout


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_during_the_imports_are_silent(number, code, tmp_path):
    folder = fake_torch(tmp_path, "print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = [(script, start(script, folder, preexec_fn=heard)) for script in scripts()]
    for script, process in running:
        assert process.stdout.readline() == b"here\n", (script, process.stderr.read())
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
        assert process.returncode == code and errors == b"", (script, errors)


def test_importing_the_engine_changes_no_signal_handler():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
