"""Training texts from files, tables and the hub, packed as ids: against encoding them one by one."""

import json
import os
import signal

import numpy as np
import pytest
import torch

import data
from command import InputError
from conftest import write_tokenizer
from data import Sources
from processes import end, fork
from tokenizer import Tokenizer


def sources(*paths, include="*", exclude=(), column="text", template=None, split="train"):
    return Sources([str(path) for path in paths], include, list(exclude), column, template, split)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def texts(tmp_path):
    """A folder of files, and {name: text} of those that are texts."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    made = {f"sub/f{n:02d}.py": f"def f{n}(x): return x * {n} + value\n" * (1 + n % 3) for n in range(40)}
    for name, text in made.items():
        (folder / name).write_text(text)
    (folder / "empty.py").write_text(" \n")
    (folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    return folder, made


ROWS = [{"question": f"what is {n}", "answer": f"value {n}", "text": f"text {n}"} for n in range(20)]


@pytest.fixture(params=["jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_files_and_folders(texts):
    folder, made = texts
    assert dict(sources(folder).documents()) == made
    assert set(dict(sources(folder, include="f1*.py", exclude=["sub/f11.py"]).documents())) == {
        f"sub/f1{n}.py" for n in (0, 2, 3, 4, 5, 6, 7, 8, 9)
    }
    assert list(sources(folder / "sub" / "f05.py").documents()) == [("f05.py", made["sub/f05.py"])]


def test_tables(table):
    assert [text for _, text in sources(table).documents()] == [row["text"] for row in ROWS]
    found = list(sources(table, template="{question}? {answer}").documents())
    assert found[3] == (f"{table.name}#3", "what is 3? value 3")
    with pytest.raises(InputError, match=r"--column body: rows\.\w+ has the columns question, answer, text"):
        list(sources(table, column="body").documents())
    with pytest.raises(InputError, match="--template {body}"):
        list(sources(table, template="{body}").documents())


def test_a_dataset_of_the_hub(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: asked.append((args, how)) or iter(ROWS))
    found = list(sources("hub:owner/name:part", split="test").documents())
    assert asked == [(("owner/name", "part"), dict(split="test", streaming=True))]
    assert found[1] == ("hub:owner/name:part#1", "text 1")


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": \n', '{"text": 5}\n', "nonsense\n"])
def test_damaged_tables_are_one_line(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        list(sources(path).documents())
    assert "rows.jsonl" in str(error.value) and "\n" not in str(error.value)


def expected(made, tokenizer, fraction):
    """The two rows of ids, encoded one text after the other."""
    rows = {"train": [], "val": []}
    for name in sorted(made):
        held_out = data.is_held_out(name, fraction)
        rows["val" if held_out else "train"] += [*tokenizer.encode(made[name]), tokenizer.eos_id]
    return rows


def check(folder, made, tokenizer, fraction=0.3):
    wanted = expected(made, tokenizer, fraction)
    train, val = data.load(folder, fraction)
    assert train.tolist() == wanted["train"] and val.tolist() == wanted["val"] and wanted["val"]


@pytest.mark.parametrize("processes", [1, 2])
def test_packing(processes, texts, tokenizer, tmp_path):
    folder, made = texts
    data.pack(sources(folder), data.Encoder(tokenizer, processes), tmp_path / "packed", 0.3)
    check(tmp_path / "packed", made, tokenizer)
    assert data.load(tmp_path / "packed", 0.3)[0].dtype == torch.uint16


def test_what_is_packed_is_kept_and_what_changed_is_packed_anew(texts, tokenizer, tmp_path, monkeypatch):
    folder, made = texts
    packed = tmp_path / "packed"
    data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(data, "pack_rows", lambda *_: pytest.fail("was packed again"))
        data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)
    made["sub/f07.py"] = "def other(x): return value\n"
    (folder / "sub" / "f07.py").write_text(made["sub/f07.py"])
    data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)
    check(packed, made, tokenizer)
    data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.5)
    check(packed, made, tokenizer, 0.5)


def test_a_description_goes_before_the_files_that_it_describes(texts, tokenizer, tmp_path, monkeypatch):
    """A run that packs anew and fails at once leaves nothing that looks whole."""
    folder, made = texts
    packed = tmp_path / "packed"
    data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)

    def fail(*_):
        raise InputError("fails")

    with monkeypatch.context() as patch:
        patch.setattr(data.Encoder, "batch", fail)
        with pytest.raises(InputError, match="fails"):
            data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.5)
    data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)
    check(packed, made, tokenizer)


def test_killed_while_packing(texts, tokenizer, tmp_path, monkeypatch):
    """At every note of progress: before, after, and between the two."""
    folder, made = texts
    monkeypatch.setattr(data, "BATCH", 7)
    original = data.write_json
    for moment in range(12):
        packed = tmp_path / f"packed{moment}"
        calls = []

        def dying(path, *args, calls=calls, moment=moment, **how):
            calls.append(path)
            if len(calls) * 2 == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, *args, **how)
            if len(calls) * 2 + 1 == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def run(packed=packed, dying=dying):
            data.write_json = dying
            data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)

        end(*fork(run))
        data.pack(sources(folder), data.Encoder(tokenizer, 1), packed, 0.3)
        check(packed, made, tokenizer)


def test_a_single_text_is_cut_in_two(tokenizer, tmp_path):
    text = "def f(x): return x + value\n" * 200
    (tmp_path / "one.py").write_text(text)
    data.pack(sources(tmp_path / "one.py"), data.Encoder(tokenizer, 1), tmp_path / "packed", 0.25)
    train, val = data.load(tmp_path / "packed", 0.25)
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    assert [*train.tolist(), *val.tolist()] == ids and len(train) == int(len(ids) * 0.75)


def test_windows_cover_an_epoch_once():
    ids = torch.from_numpy(np.arange(1000, dtype=np.uint16))
    context = 9
    per_epoch = (len(ids) - 1) // context - 1
    for epoch in range(3):
        starts = []
        for index in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            example = data.window(ids, index, context, seed=5)
            assert example.dtype == torch.int64 and torch.equal(example.diff(), torch.ones(context, dtype=torch.int64))
            starts.append(int(example[0]))
        assert starts != sorted(starts)
        assert np.all(np.diff(sorted(starts)) == context)
