"""Kills commands at random moments, and gives them random amounts of disk: nothing may be damaged or lost.

python tests/campaign.py --kills 200 --disks 100
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import conftest
import convert_hf_checkpoint
import export_hf_checkpoint
import quantize
import train
from checkpoint import save_checkpoint
from convert_hf_checkpoint import read_config, tensor_shapes
from processes import command, end, fork, limited

SIGNALS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, 1), signal.SIGINT: (130, 1)}  # and the codes that they end in
CHANGING = {
    "train_state.json",
    "part-1-of-1.safetensors",
    "part-1-of-2.safetensors",
    "part-2-of-2.safetensors",
    "train_log.jsonl",
    "tokens.json",
    "train.bin",
    "val.bin",
}  # differ, or are there for a time
MODEL = ["--n_layer", 2, "--dim", 16, "--n_head", 2, "--intermediate_size", 24, "--vocab_size", 300, "--context", 16]
TRAIN = ["--device", "cpu", "--steps", 6, "--batch_size", 2, "--save_every", 1, "--save_precision", "float32", *MODEL]


class Conversion:
    """Of a Hugging Face folder, where an older checkpoint lies."""

    def prepare(self, folder):
        model = conftest.make_hf_model("llama2")
        model.save_pretrained(folder)
        conftest.write_tokenizer(folder)
        config = read_config(folder)
        theirs = model.state_dict()
        stacked = {ours: torch.cat([theirs[name] for name in names]) for ours, names in tensor_shapes(config).items()}
        save_checkpoint(folder / "model.pth", {name: t + 1 for name, t in stacked.items()}, config)

    def run(self, folder):
        command(convert_hf_checkpoint.main, "--checkpoint_dir", folder)()


class Quantization(Conversion):
    """Of a checkpoint, where an older quantized one lies."""

    def prepare(self, folder):
        super().prepare(folder)
        command(quantize.main, "--checkpoint_path", folder / "model.pth")()
        convert_hf_checkpoint.convert(folder)

    def run(self, folder):
        command(quantize.main, "--checkpoint_path", folder / "model.pth")()


class Export(Conversion):
    """Of a checkpoint, as a new folder."""

    def run(self, folder):
        if not (folder / "out").exists():
            options = ["--checkpoint_path", folder / "model.pth", "--out", folder / "out"]
            command(export_hf_checkpoint.main, *options)()


class Training:
    """Of a tiny model, resumed where it stopped."""

    def prepare(self, folder):
        text = "".join(f"def f{n}(x): return x * {n} + value\n" for n in range(100))
        (folder / "text.py").write_text(text)

    def run(self, folder):
        out = folder / "out"
        if not (out / "model.pth").exists():
            resume = ["--resume"] if (out / train.STATE_FILE).exists() else []
            command(train.main, "--data", folder / "text.py", "--out", out, *TRAIN, *resume)()


class Ranks(Training):
    """The same by two processes that each have a part of the model."""

    def run(self, folder):
        out = folder / "out"
        if not (out / "model.pth").exists():
            resume = ["--resume"] if (out / train.STATE_FILE).exists() else []
            options = ["--fsdp", "--data", folder / "text.py", "--out", out, *TRAIN, *resume]
            process = conftest.torchrun(2, conftest.ROOT / "scripts" / "train.py", *options)
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(errors or 1)


class Adapting(Conversion):
    """Of a checkpoint that writes its own texts, resumed where it stopped."""

    def run(self, folder):
        if not (folder / "adapters.json").exists():  # which appears last
            how = ["--freeze", "--checkpoint_path", folder / "model.pth", "--generate", 40, "--val_fraction", 0.2]
            resume = ["--resume"] if (folder / "adapters" / train.STATE_FILE).exists() else []
            command(train.main, *how, *TRAIN, *resume)()


KINDS = {
    "convert": Conversion,
    "quantize": Quantization,
    "export": Export,
    "train": Training,
    "ranks": Ranks,
    "adapters": Adapting,
}


def contents(folder):
    """{name: digest} of the files below a folder that are the same after every run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in CHANGING:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def is_hidden(name):
    return any(part.startswith(".") for part in Path(name).parts)


class Trial:
    """A command that is disturbed, and run again undisturbed."""

    def __init__(self, kind, scratch):
        """scratch: an empty folder."""
        self.kind = KINDS[kind]()
        self.scratch = scratch
        self.before, self.after = scratch / "before" / "x", scratch / "after" / "x"  # the name goes into some files
        self.before.mkdir(parents=True)
        self.kind.prepare(self.before)
        shutil.copytree(self.before, self.after)
        began = time.perf_counter()
        code, text = end(*fork(lambda: self.kind.run(self.after)))
        assert code == 0, text
        self.seconds = time.perf_counter() - began
        self.old, self.new = contents(self.before), contents(self.after)

    def disturb(self, disturbance):
        """disturbance: function (work) -> (exit code, whether leftovers are allowed). Raises AssertionError."""
        folder = self.scratch / "disturbed" / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder)
        code, leaves = disturbance(lambda: self.kind.run(folder))
        for name, digest in contents(folder).items():
            if is_hidden(name):
                assert leaves or name.endswith(".lock"), f"{name} was left"
            else:
                assert digest in (self.old.get(name), self.new.get(name)), f"{name} is neither old nor new"
        again, text = end(*fork(lambda: self.kind.run(folder)))
        assert again == 0, f"the next run ended in {again}: {text}"
        assert contents(folder) == self.new, "the next run left something else"
        return code

    def kill(self, generator):
        """Send a signal at a random moment. Returns the exit code."""
        number = generator.choice(list(SIGNALS))
        delay = generator.uniform(0, self.seconds)

        def kill_ranks(work):
            child, stderr = fork(work)
            time.sleep(delay)
            folder = self.scratch / "disturbed" / "x"
            subprocess.run(["pkill", "-KILL", "-f", str(folder)])  # all have it in their command lines
            code, _ = end(child, stderr)
            return -signal.SIGKILL if code else 0, True

        if isinstance(self.kind, Ranks):
            return self.disturb(kill_ranks)

        def disturbance(work):
            child, stderr = fork(work)
            time.sleep(delay)
            os.kill(child, number)
            code, text = end(child, stderr)
            assert code == 0 or code in SIGNALS[number], f"ended in {code}: {text}"
            assert "Traceback" not in text, text
            return code, number == signal.SIGKILL

        return self.disturb(disturbance)

    def fill(self, generator):
        """Let no file become larger than a random size. Returns the exit code."""
        largest = max(path.stat().st_size for path in self.after.rglob("*") if path.is_file())
        room = generator.randrange(largest + 1)

        def disturbance(work):
            code, text = limited(work, room)
            assert code == 0 or (code == 1 and "can't be written" in text), f"ended in {code}: {text}"
            assert "Traceback" not in text, text
            return code, False

        return self.disturb(disturbance)


def campaign(kills, disks, seed=0, kinds=tuple(KINDS)):
    """Disturb the kinds of commands in turn. Returns {exit code: how often}. Raises AssertionError."""
    generator = random.Random(seed)
    codes = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        trials = []
        for kind in kinds:
            (Path(scratch) / kind).mkdir()
            trials.append(Trial(kind, Path(scratch) / kind))
        for number in tqdm(range(kills), desc="kills", disable=None):
            codes[trials[number % len(trials)].kill(generator)] += 1
        trials = [trial for trial in trials if not isinstance(trial.kind, Ranks)]  # torchrun itself wants a disk
        for number in tqdm(range(disks if trials else 0), desc="disks", disable=None):
            codes[trials[number % len(trials)].fill(generator)] += 1
    return dict(codes)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--kills", type=int, default=200, help="how many commands to kill")
    p.add_argument("--disks", type=int, default=100, help="how many to give too little disk")
    p.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="which commands")
    p.add_argument("--seed", type=int, default=0, help="of the random moments and sizes")
    args = p.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    print("exit codes:", campaign(args.kills, args.disks, args.seed, args.kind))
    print("nothing was damaged, nothing was lost")


if __name__ == "__main__":
    sys.exit(main())
