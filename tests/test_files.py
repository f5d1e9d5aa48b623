"""What is written is whole or not there, whoever writes, is killed, or runs out of disk; what is damaged is noticed."""

import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
import export_hf_checkpoint
import files
import generate
import quantize
import tasks
import train
import train_state
from campaign import campaign
from checkpoint import load_model
from command import InputError
from conftest import ROOT, call, edit_json
from processes import command, end, fork, limited

DEMO = ROOT / "checkpoints" / "demo"


def names(folder):
    return {file.name for file in Path(folder).iterdir()}


def copy_of(hf_folder, tmp_path, shape="llama2"):
    """A Hugging Face folder of its own."""
    folder = tmp_path / "model"
    shutil.copytree(hf_folder(shape)[0], folder, ignore=shutil.ignore_patterns("model.pth", "model.json"))
    return folder


# Two writers of one target.


def test_conversions_of_one_folder_at_once(hf_folder, tmp_path):
    folder, model = copy_of(hf_folder, tmp_path), hf_folder("llama2")[1]
    before = names(folder)
    for _ in range(4):
        runs = [fork(lambda: convert_hf_checkpoint.convert(folder)) for _ in range(4)]
        ends = [end(*run) for run in runs]
        for code, text in ends:
            assert (code, text) == (0, "") or (code == 1 and "is writing it; wait" in text and text.count("\n") == 1)
        assert any(code == 0 for code, _ in ends)
        loaded = load_model(folder / "model.pth")
        assert torch.equal(loaded.embed.weight, model.model.embed_tokens.weight)
        assert names(folder) == before | {"model.pth", "model.json"}


def test_the_lock_names_its_holder(tmp_path):
    with files.locked(tmp_path / "out"), pytest.raises(InputError) as caught, files.locked(tmp_path / "out"):
        pass
    assert f"process {os.getpid()} on " in str(caught.value) and " since 20" in str(caught.value)
    with files.locked(tmp_path / "out"):  # and is free again
        pass


def test_one_run_trains_in_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out" / train.STATE_FILE):
        result = call(train.main, "--data", ROOT / "tests", "--out", tmp_path / "out", "--device", "cpu")
    assert result.returncode == 1 and "is writing it" in result.stderr and result.stderr.count("\n") == 1


def test_one_run_measures_into_a_file(tmp_path):
    results = tasks.Results(tmp_path / "r", {"a": 1})
    with pytest.raises(InputError, match="is writing it"):
        tasks.Results(tmp_path / "r", {"a": 1})
    results.add({"b": 2})
    del results
    assert tasks.Results(tmp_path / "r", {"a": 1}).rows == [{"b": 2}]


# What takes a file's place.


def test_a_new_file_has_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_links_are_followed_and_folders_kept(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/target")
    for text in ("first", "second"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "target").read_text() == text
    assert names(tmp_path / "there") == {"target"}
    with pytest.raises(InputError, match="is a folder"):
        files.write_text(tmp_path / "there", "text")


def test_a_pipe_gets_the_content(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    child, stderr = fork(lambda: files.write_text(tmp_path / "pipe", "text"))
    assert (tmp_path / "pipe").read_text() == "text"
    assert end(child, stderr) == (0, "") and (tmp_path / "pipe").is_fifo()


def test_a_profile_goes_where_it_is_told(tmp_path):
    """Its library writes another file and renames that: as root, /dev/null became a file."""
    (tmp_path / "link.json").symlink_to("trace.json")
    for path in ("/dev/null", tmp_path / "link.json"):
        options = ["--num_samples", 1, "--max_new_tokens", 2, "--device", "cpu", "--profile", path]
        result = call(generate.main, *options, "--json", "/dev/null")
        assert result.returncode == 0, result.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert names(tmp_path) == {"link.json", "trace.json"}


def test_an_error_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == {"file"}


@pytest.mark.parametrize("folder", [False, True])
def test_what_killed_writers_left_is_cleared_and_only_that(folder, tmp_path):
    def hang(way):
        with way as partial:
            (partial / "part" if folder else partial).write_text("half")
            signal.pause()

    def way():
        return files.new_folder(tmp_path / "out", "--out") if folder else files.replacing(tmp_path / "out")

    children = [fork(lambda: hang(way())) for _ in range(2)]
    while len(names(tmp_path)) < 2:
        pass
    left = names(tmp_path)
    os.kill(children[0][0], signal.SIGKILL)
    end(*children[0])
    with way():
        assert len(left & names(tmp_path)) == 1
    os.kill(children[1][0], signal.SIGKILL)
    end(*children[1])
    if folder:
        (tmp_path / "out").rmdir()
    with way():
        assert not left & names(tmp_path)
    assert names(tmp_path) == {"out"}


# Damage.


def flipped(data, position):
    data = bytearray(data)
    data[position] ^= 1 << position % 8
    return bytes(data)


def test_every_flipped_bit_is_noticed_or_harmless(checkpoint, tmp_path):
    """Harmless are those in the gaps between records."""
    source, path = checkpoint("llama2"), tmp_path / "model.pth"
    for name in ("model.json", "tokenizer.model"):
        shutil.copy(source.with_name(name), tmp_path)
    data = source.read_bytes()
    wanted = load_model(source).state_dict()
    generator = random.Random(0)
    noticed = 0
    for _ in range(100):
        path.write_bytes(flipped(data, generator.randrange(len(data))))
        try:
            found = load_model(path).state_dict()
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            noticed += 1
        else:
            assert all(torch.equal(found[name], t) for name, t in wanted.items())
    assert noticed >= 80  # nearly all of the file is weights
    path.write_bytes(flipped(data, len(data) // 2))
    load_model(path, verify=False)
    result = call(generate.main, "--checkpoint_path", path, "--prompt", "def", "--no_verify", "--max_new_tokens", 2)
    assert result.returncode == 0, result.stderr


def test_quantizing_and_exporting_a_damaged_checkpoint_leaves_nothing(checkpoint, tmp_path):
    source = checkpoint("llama2")
    for name in ("model.json", "tokenizer.model"):
        shutil.copy(source.with_name(name), tmp_path)
    (tmp_path / "model.pth").write_bytes(flipped(source.read_bytes(), source.stat().st_size // 2))
    before = names(tmp_path)
    for main, *options in ((quantize.main,), (export_hf_checkpoint.main, "--out", tmp_path / "out")):
        result = call(main, "--checkpoint_path", tmp_path / "model.pth", *options)
        assert result.returncode == 1 and "model.pth: damaged" in result.stderr
        assert names(tmp_path) == before


def test_every_archive_passes_its_own_check(checkpoint, tmp_path):
    quantize.quantize_checkpoint(checkpoint("llama2"), tmp_path / "q.pth", "int8", 128)
    for path in (checkpoint("llama2"), tmp_path / "q.pth", DEMO / "model.pth"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert "weights" in json.loads(path.with_suffix(".json").read_text())


def test_a_compressed_archive_is_refused(checkpoint, tmp_path):
    source, path = checkpoint("llama2"), tmp_path / "model.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    shutil.copy(source.with_suffix(".json"), tmp_path / "model.json")
    for verify in (True, False):
        with pytest.raises(InputError, match="is compressed"):
            load_model(path, verify=verify)


def test_a_crash_between_the_two_files_is_noticed(checkpoint, hf_folder, tmp_path):
    """Whichever of the two is the new one."""
    folder = copy_of(hf_folder, tmp_path)
    path = convert_hf_checkpoint.convert(folder)
    old = path.with_suffix(".json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        model = hf_folder("llama2")[1]
        state = {name: t + 1 for name, t in model.state_dict().items()}
        patch.setattr(convert_hf_checkpoint, "load_file", lambda file: state)
        convert_hf_checkpoint.convert(folder)
    new = path.with_suffix(".json").read_text()
    assert old != new
    path.with_suffix(".json").write_text(old)
    with pytest.raises(InputError, match="not the file that model.json describes"):
        load_model(path)
    path.with_suffix(".json").write_text(new)
    load_model(path)


def test_a_folder_called_model_pth_is_one_line(hf_folder, tmp_path):
    folder = copy_of(hf_folder, tmp_path)
    (folder / "model.pth").mkdir()
    before = names(folder)
    result = call(convert_hf_checkpoint.main, "--checkpoint_dir", folder)
    assert (
        result.returncode == 1
        and "model.pth: can't be written (is a folder)" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert names(folder) == before


def test_a_torn_line_costs_one_row(tmp_path, capsys):
    results = tasks.Results(tmp_path / "r", {"a": 1})
    for n in range(3):
        results.add({"n": n})
    del results
    path = tmp_path / "r.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    results = tasks.Results(tmp_path / "r", {"a": 1})
    assert results.rows == [{"n": 0}, {"n": 1}] and "was not whole" in capsys.readouterr().out
    results.add({"n": 2})
    del results
    assert tasks.Results(tmp_path / "r", {"a": 1}).rows == [{"n": 0}, {"n": 1}, {"n": 2}]


# A full disk. A limit on the size of files has the same effect, and needs no rights.


TRAIN = ["--device", "cpu", "--steps", 2, "--batch_size", 2, "--context", 16, "--vocab_size", 300]
TRAIN += ["--dim", 32, "--n_layer", 2, "--n_head", 2]


def writers(path, tmp_path):
    """{what writes: (its work, the file that it can't write, how many bytes fit)}"""
    out = tmp_path / "out"
    rows = [{"a": "x" * 3000, "b": n} for n in range(10)]
    measured = tasks.Results(out, {"a": 1})
    plt = tasks.pyplot()
    sample = [
        "--checkpoint_path",
        path,
        "--prompt",
        "def",
        "--num_samples",
        1,
        "--max_new_tokens",
        9,
        "--device",
        "cpu",
    ]
    return {
        "convert": (command(convert_hf_checkpoint.main, "--checkpoint_dir", path.parent), path, 4096),
        "quantize": (command(quantize.main, "--checkpoint_path", path), path.with_name("model_int8.pth"), 4096),
        "export": (
            command(export_hf_checkpoint.main, "--checkpoint_path", path, "--out", out / "new"),
            out / "new",
            4096,
        ),
        "rows": (lambda: tasks.write_rows(out, rows), tmp_path / "out.jsonl", 4096),
        "csv": (lambda: tasks.write_csv(tmp_path / "out.csv", rows), tmp_path / "out.csv", 4096),
        "results": (lambda: measured.add(rows[0]), tmp_path / "out.jsonl", 1024),
        "figure": (lambda: tasks.save_figure(plt.figure(), tmp_path / "out.png"), tmp_path / "out.png", 1024),
        "json": (command(generate.main, *sample, "--json", tmp_path / "o.json"), tmp_path / "o.json", 64),
        "profile": (command(generate.main, *sample, "--profile", tmp_path / "o.json"), tmp_path / "o.json", 1024),
    }


@pytest.mark.parametrize(
    "what", ["convert", "quantize", "export", "rows", "csv", "results", "figure", "json", "profile"]
)
def test_a_full_disk_is_one_line_and_keeps_the_old_file(what, hf_folder, tmp_path):
    path = convert_hf_checkpoint.convert(copy_of(hf_folder, tmp_path))
    work, target, room = writers(path, tmp_path)[what]
    old = b""
    if what != "export":
        old = target.read_bytes() if target.exists() else b"old\n"
        target.write_bytes(old)
    before = names(tmp_path) | names(path.parent)
    code, text = limited(work, room)
    lines = [line for line in text.splitlines() if "Profiler" not in line and "output_json" not in line]  # PyTorch's
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), text
    assert f"{target}: can't be written" in lines[0]
    assert names(tmp_path) | names(path.parent) == before
    if what == "results":
        assert target.read_bytes().startswith(old)
    elif what != "export":
        assert target.read_bytes() == old


def test_a_full_disk_keeps_the_last_state_of_a_training_run(tmp_path):
    (tmp_path / "text.py").write_text("".join(f"def f{n}(x): return x * {n}\n" for n in range(300)))
    options = ["--data", tmp_path / "text.py", "--out", tmp_path / "out", *TRAIN]
    code, text = limited(command(train.main, *options, "--save_every", "1"), 100_000)
    assert code == 1 and text.splitlines()[-1].startswith("error: ") and "can't be written" in text
    assert "part-1-of-1.safetensors: " in text and not names(tmp_path / "out" / "train_state")
    assert not [name for name in names(tmp_path / "out") if "partial" in name]


@pytest.mark.slow
def test_kills_and_full_disks_at_random_moments():
    """A short one of what `python tests/campaign.py` does at length."""
    codes = campaign(kills=16, disks=8)
    assert sum(codes.values()) == 24 and set(codes) - {0}


@pytest.mark.parametrize("name", ["/dev/stdout", "//dev/stdout", "/dev/../dev/fd/1", "link", "log"])
def test_standard_output_is_written_into_even_if_it_is_a_file(name, tmp_path):
    """Replaced, the file would lose what is printed after."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    line = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from files import write_text; print('before', flush=True); "
    line += f"write_text({name!r}, 'json\\n'); print('after')"
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", line], stdout=log, check=True, cwd=tmp_path)
    assert (tmp_path / "log").read_text() == "before\njson\nafter\n"


def test_a_lock_is_on_the_file_that_a_link_means(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with (
        files.locked(tmp_path / "target"),
        pytest.raises(InputError, match="is writing it"),
        files.locked(tmp_path / "link"),
    ):
        pass


REFUSED = {
    "dangling": "can't be written (No such file",
    "loop": "leads back to itself",
    "x" * 300: "File name too long",
    "model.pth": "is read or written by this run already",
    "again": "is read or written by this run already",
    "model.json": "is read or written by this run already",
    "prompt.txt": "is read or written by this run already",
    "twice": "is read or written by this run already",
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_outputs_that_can_not_be_written_are_refused_before_the_run(checkpoint, tmp_path):
    for name in ("model.pth", "model.json", "tokenizer.model"):
        shutil.copy(checkpoint("llama2").with_name(name), tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "again").symlink_to("model.pth")
    (tmp_path / "prompt.txt").write_text("def")
    before = contents(tmp_path)
    run = ["--checkpoint_path", tmp_path / "model.pth", "--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 2]
    for name, words in REFUSED.items():
        outputs = ["--json", tmp_path / name]
        if name == "twice":
            outputs += ["--profile", tmp_path / name]
        result = call(generate.main, *run, *outputs)
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not result.stdout
    longest = tmp_path / ("y" * 255)
    assert call(generate.main, *run, "--json", longest).returncode == 0
    assert contents(tmp_path) == before | {longest.name: longest.read_bytes()} and json.loads(longest.read_text())


FOREIGN = {
    "no names": [torch.ones(1)],
    "numbers as names": {1: torch.ones(1)},
    "values": {"a": 1},
    "sparse": {"a": torch.ones(2, 2).to_sparse()},
    "meta": {"a": torch.ones(2, device="meta")},
    "nested": {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("main", [generate.main, quantize.main, export_hf_checkpoint.main])
def test_foreign_checkpoints_are_one_line(main, what, checkpoint, tmp_path):
    source, path = checkpoint("llama2"), tmp_path / "model.pth"
    description = json.loads(source.with_suffix(".json").read_text())
    del description["weights"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    value = FOREIGN[what]
    if isinstance(value, dict) and "a" in value:
        value = {**torch.load(source, weights_only=True), "norm.weight": value["a"]}
    torch.save(value, path)
    out = ["--out", tmp_path / "out"] if main is export_hf_checkpoint.main else []
    result = call(main, "--checkpoint_path", path, *out)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {path}: ") and result.stderr.count("\n") == 1
    assert names(tmp_path) == {"model.pth", "model.json"}


def test_parameters_are_tensors(checkpoint, tmp_path):
    source = checkpoint("llama2")
    shutil.copy(source.with_suffix(".json"), tmp_path)
    state = torch.load(source, weights_only=True)
    torch.save({name: torch.nn.Parameter(t) for name, t in state.items()}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="not the file that model.json describes"):
        load_model(tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", verify=False)
    assert torch.equal(model.embed.weight, state["embed.weight"]) and not model.embed.weight.requires_grad


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """(options of a training run, the file of its state after all steps, before the model was written)"""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.py").write_text("".join(f"def f{n}(x): return x * {n}\n" for n in range(300)))
    options = ["--data", folder / "text.py", "--out", folder / "out", *TRAIN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_model", lambda *_: sys.exit(3))
        assert call(train.main, *options).returncode == 3
    return options, folder / "out" / train.STATE_FILE


@pytest.mark.parametrize("field", ["files", "step", "settings", None])
@pytest.mark.parametrize("value", [None, [], "x", 5, {}, -1])
def test_foreign_training_states_are_one_line(field, value, unfinished):
    options, path = unfinished
    right = path.read_text()
    path.write_text(json.dumps({**json.loads(right), field: value} if field else value))
    result = call(train.main, *options, "--resume")
    path.write_text(right)
    assert result.returncode == 1 and result.stderr.startswith("error: --resume: "), result.stderr
    assert result.stderr.count("\n") == 1


def rewritten(path, change):
    """Let the part of a state hold other tensors, with the right checksum. change: of {name: tensor}."""
    part = next(path.with_name("train_state").glob("step-*/*"))
    with safe_open(part, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(part)
    places = json.loads(metadata["DCP_SHARDING_INFO"])
    change(tensors, places)
    save_file(tensors, part, {**metadata, "DCP_SHARDING_INFO": json.dumps(places)})
    edit_json(path, files={part.name: zlib.crc32(part.read_bytes())})


SPOILT = {  # what is done to a part, and what is said of it
    "flipped": (lambda path, part: part.write_bytes(part.read_bytes()[:-1] + b"x"), "damaged"),
    "short": (lambda path, part: part.write_bytes(part.read_bytes()[:-8]), "damaged"),
    "gone": (lambda path, part: part.unlink(), "is missing"),
    "another": (lambda path, part: shutil.copy(part, part.with_name("part-2-of-2.safetensors")), "is not part of it"),
    "a folder": (lambda path, part: (part.unlink(), part.mkdir()), "can't be read"),
    "no tensors": (
        lambda path, part: (part.write_bytes(b"x"), edit_json(path, files={part.name: zlib.crc32(b"x")})),
        "is not the state of this training run",
    ),
    "fewer": (lambda path, part: rewritten(path, lambda t, _: t.pop("model.norm.weight")), "norm.weight is missing"),
    "more": (
        lambda path, part: rewritten(
            path, lambda t, places: (t.update(x=torch.ones(1)), places.update(x=places[NORM]))
        ),
        "x is too much",
    ),
    "other shapes": (lambda path, part: rewritten(path, lambda t, _: t.update({NORM: torch.ones(3)})), "Size mismatch"),
    "places": (lambda path, part: rewritten(path, lambda _, places: places.clear()), "is not the state"),
}
NORM = "model.norm.weight"


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_part_of_a_training_state_is_one_line(what, unfinished):
    options, path = unfinished
    folder, kept = path.with_name("train_state"), path.with_name("kept")
    shutil.copytree(folder, kept)
    right = path.read_text()
    spoil, words = SPOILT[what]
    spoil(path, next(folder.glob("step-*/*")))
    result = call(train.main, *options, "--resume")
    shutil.rmtree(folder)
    kept.rename(folder)
    path.write_text(right)
    assert result.returncode == 1 and result.stderr.startswith("error: --resume: "), result.stderr
    assert words in result.stderr and result.stderr.count("\n") == 1, result.stderr


MOMENTS = ["write_part", "sync_folder", "write_json", "delete_others"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_state_is_saved_leaves_a_whole_one(moment, late, tmp_path):
    """Before and after each of the things that saving does, in the second save; the run then ends as undisturbed."""
    (tmp_path / "text.py").write_text("".join(f"def f{n}(x): return x * {n}\n" for n in range(300)))

    def work(out, *how):
        return command(train.main, "--data", tmp_path / "text.py", "--out", out, *TRAIN, "--save_every", 1, *how)

    def killed():
        owner = train_state.TrainState if moment == "delete_others" else train_state
        original = getattr(owner, moment)

        def last(*args, **kwargs):
            second = (tmp_path / "out" / "train_state" / "step-2").exists()
            if second and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if second:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, moment, last)
        work(tmp_path / "out")()

    assert end(*fork(killed))[0] == -signal.SIGKILL
    step = json.loads((tmp_path / "out" / train.STATE_FILE).read_text())["step"]
    assert step == (2 if (moment, late) in COMMITTED else 1)
    for name, how in (("out", ["--resume"]), ("whole", [])):
        code, text = end(*fork(work(tmp_path / name, *how)))
        assert code == 0, text
    assert not list((tmp_path / "out").glob("train_state*"))
    a, b = (load_model(tmp_path / name / "model.pth").state_dict() for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


COMMITTED = {("write_json", True), ("delete_others", False), ("delete_others", True)}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", range(1, 8))
def test_a_signal_while_a_file_is_made_is_no_full_disk(number, code, moment, checkpoint, tmp_path):
    """At each write: torch.save takes what a signal's handler raises for an error of the file."""

    def work():
        writes = []

        class Interrupted(io.FileIO):
            def write(self, data):
                writes.append(data)
                if len(writes) == moment:
                    os.kill(os.getpid(), number)
                return super().write(data)

        original = torch.save
        torch.save = lambda value, file: original(value, Interrupted(file.name, "w"))
        quantize.quantize_checkpoint(path, tmp_path / "q.pth", "int8", 128)

    path = checkpoint("llama2")
    assert end(*fork(work)) == (code, "") and not names(tmp_path)


def test_a_path_that_is_not_utf8_is_one_line(hf_folder, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    shutil.copytree(hf_folder("llama2")[0], folder, ignore=shutil.ignore_patterns("model.pth", "model.json"))
    before = names(folder)
    for main, *options in (
        (convert_hf_checkpoint.main, "--checkpoint_dir", folder),
        (generate.main, "--checkpoint_path", folder / "model.pth"),
    ):
        result = call(main, *options)
        assert result.returncode == 1 and "UTF-8" in result.stderr and result.stderr.count("\n") == 1
        assert names(folder) == before
