"""What to decode: prompts and their references, from the hub or from local files, and how close a text comes to a reference.

Also the options that all measuring scripts share, and how they keep their results.
"""
import argparse
import csv
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from generate import CHECKPOINTS, Sampling
from command import InputError, check_device

FILE_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}  # what `datasets` calls the formats
LM_WORDS = 100  # of an article, that cnn_dm_lm continues


@dataclass(frozen=True)
class Example:
    """A text to continue and, where there is one, what a good continuation is."""
    prompt: str
    reference: str | None = None


@dataclass(frozen=True)
class Task:
    """A dataset of the hub: repository, configuration, the columns it needs, and how a row's columns make an Example."""
    repo: str
    name: str | None
    columns: tuple[str, ...]
    example: Callable
    shots: str = "train"  # the split that shots are drawn from


def summary(article, text):
    return Example(f"Article: {article}\nSummary:", f" {text}")


def opening(article):
    words = article.split()
    return Example(" ".join(words[:LM_WORDS]), " " + " ".join(words[LM_WORDS:]))


# The names and prompts of the LayerSkip repository.
TASKS = {
    "cnn_dm_summarization": Task("abisee/cnn_dailymail", "3.0.0", ("article", "highlights"), summary),
    "cnn_dm_lm": Task("abisee/cnn_dailymail", "3.0.0", ("article",), opening),
    "xsum_summarization": Task("EdinburghNLP/xsum", None, ("document", "summary"), summary),
    "human_eval": Task("openai/openai_humaneval", None, ("prompt", "canonical_solution"), Example, shots="test"),
    "top_v2": Task("WillHeld/top_v2", None, ("utterance", "semantic_parse"), lambda utterance, parse: Example(utterance, f"\n{parse}")),
}


def read_split(task, name, split, data_dir):
    """The rows of a split as a `datasets` table, from local files named after it (test.jsonl, test-00000-of-00002.parquet) or the hub."""
    import datasets
    datasets.disable_progress_bars()
    files = sorted(f for f in Path(data_dir).glob(f"{split}*") if f.suffix in FILE_KINDS) if data_dir else []
    if data_dir and not files:
        raise InputError(f"--data_dir {data_dir}: has no {split}*.parquet, .jsonl, .json or .csv, which --task {name} needs")
    try:
        if data_dir:
            rows = datasets.load_dataset(FILE_KINDS[files[0].suffix], data_files=[str(f) for f in files if f.suffix == files[0].suffix], split="train")
        else:
            rows = datasets.load_dataset(task.repo, task.name, split=split)
    except Exception as error:  # each format, and each way that the network fails, has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--data_dir {data_dir}: {files[0].name} can't be read ({reason})" if data_dir else
                         f"--task {name}: {task.repo} can't be had from the hub ({reason}); --data_dir takes local files of it") from None
    missing = [c for c in task.columns if c not in rows.column_names]
    if missing:
        raise InputError(f"{data_dir or task.repo}: {split} has no column {missing[0]}, which --task {name} needs; it has {', '.join(rows.column_names)}")
    return rows


def read_jsonl(path):
    """The Examples of a file whose lines are JSON objects with a `prompt` and perhaps a `reference`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # and not at what else ends a line within a JSON string
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--task {path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            examples.append(Example(row["prompt"], row.get("reference")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"--task {path}, line {number}: not a JSON object with a 'prompt'") from None
        if not isinstance(examples[-1].prompt, str) or not isinstance(examples[-1].reference, str | None):
            raise InputError(f"--task {path}, line {number}: 'prompt' and 'reference' must be texts")
    if not examples:
        raise InputError(f"--task {path}: is empty")
    return examples


def load_task(name, n_shot=0, seed=0, data_dir=None):
    """The Examples of one of TASKS, or of a JSONL file.

    n_shot: that many others, with their references, come before each prompt. The seed draws them from the training split; where
    there is none, from the examples themselves, which are then left out. Raises InputError.
    """
    if name in TASKS:
        task = TASKS[name]
        rows = read_split(task, name, "test", data_dir)
        drawn = read_split(task, name, task.shots, data_dir) if n_shot and task.shots != "test" else None
        make = lambda row: task.example(*(row[c] for c in task.columns))
    elif Path(name).suffix == ".jsonl" or Path(name).is_file():
        rows, drawn, make = read_jsonl(name), None, lambda example: example
    else:
        raise InputError(f"--task {name}: is neither a .jsonl file nor one of {', '.join(TASKS)}")
    order, shots = list(range(len(rows))), []
    if n_shot:
        pool = rows if drawn is None else drawn
        if n_shot > len(pool) - (drawn is None):
            raise InputError(f"--n_shot {n_shot}: --task {name} has only {len(pool)} examples to draw from")
        chosen = random.Random(seed).sample(range(len(pool)), n_shot)
        shots = [make(pool[i]) for i in chosen]
        if drawn is None:
            order = [i for i in order if i not in chosen]
    if any(shot.reference is None for shot in shots):
        raise InputError(f"--n_shot {n_shot}: an example of --task {name} has no reference to show")
    before = "".join(f"{shot.prompt}{shot.reference.rstrip()}\n\n" for shot in shots)
    examples = [make(rows[i]) for i in order]
    if not examples:
        raise InputError(f"--task {name}: is empty")
    return [Example(before + e.prompt, e.reference) for e in examples]


SCORES = ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "edit_distance")


def score(texts, references):
    """How close texts come to their references, both stripped, by SCORES: ROUGE's F-measures (0 to 1), BLEU of the corpus (0 to 100),
    the share of exact matches, and characters inserted, deleted or replaced; means over the texts."""
    import sacrebleu
    from rapidfuzz.distance import Levenshtein
    from rouge_score.rouge_scorer import RougeScorer
    pairs = [(text.strip(), reference.strip()) for text, reference in zip(texts, references, strict=True)]
    kinds, mean = SCORES[:3], lambda values: sum(values) / len(pairs)
    scorer = RougeScorer(kinds, use_stemmer=True)
    rouge = [scorer.score(reference, text) for text, reference in pairs]
    return {**{kind: mean([r[kind].fmeasure for r in rouge]) for kind in kinds},
            "bleu": sacrebleu.corpus_bleu([text for text, _ in pairs], [[reference for _, reference in pairs]]).score,
            "exact_match": mean([text == reference for text, reference in pairs]),
            "edit_distance": mean([Levenshtein.distance(text, reference) for text, reference in pairs])}


# What the measuring scripts share.

def parser(description, ks, exits="all in the lower half", num_prompts=4):
    """An ArgumentParser with the options that every measuring script takes. ks: the draft lengths, exits: the exit layers in words, by default."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("what to decode")
    g.add_argument("--checkpoint_path", type=Path, default=CHECKPOINTS / "demo" / "model.pth")
    g.add_argument("--task", default=str(CHECKPOINTS / "demo" / "prompts.jsonl"), help=f"{', '.join(TASKS)}, or a JSONL file with a `prompt` and perhaps a `reference` in each line")
    g.add_argument("--data_dir", type=Path, help="folder with the task's splits as parquet, JSON lines or CSV, instead of the hub")
    g.add_argument("--n_shot", type=int, default=0, help="put this many solved examples before each prompt")
    g.add_argument("--num_prompts", type=int, default=num_prompts, help="use the first of them")
    g.add_argument("--max_new_tokens", type=int, default=256, help="per prompt; EOS doesn't end a text here, so that all are equally long")
    g = p.add_argument_group("how to decode")
    g.add_argument("--early_exit", "--exit_layer", type=int, nargs="+", help=f"exit layers to try (default: {exits})")
    g.add_argument("--speculate_k", "--num_speculations", type=int, nargs="+", default=ks, help="draft lengths to try")
    g.add_argument("--temperature", type=float, default=0.0)
    g.add_argument("--top_k", type=int)
    g.add_argument("--top_p", type=float, default=1.0)
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--draft_head", choices=["int8", "full"], default="int8", help="what drafts are chosen with: a copy of the output head in int8, or the head itself")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--precision", choices=["bfloat16", "float16", "float32"])
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p


def grid(args, n_layer):
    """The exit layers and the draft lengths to try, both sorted, of a model of n_layer layers."""
    return sorted(set(args.early_exit or range(1, max(2, n_layer // 2 + 1)))), sorted(set(args.speculate_k))


def check_machine(device):
    """Raise InputError unless this is the only process and can compute on the device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the measuring scripts are for one process: start them without torchrun")
    check_device(device)


def check(args):
    """Raise InputError for a value of `parser`'s options that nothing can be measured with; returns the Sampling that they describe."""
    check_machine(args.device)
    for name, least in (("num_prompts", 1), ("max_new_tokens", 2), ("n_shot", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: must be {least} or more")
    return Sampling(args.temperature, args.top_k, args.top_p)


def load_prompts(args, model, tokenizer, spare=0):
    """([Example], [ids]) that the options name: the first num_prompts that leave room in the context for max_new_tokens and `spare` more."""
    examples, prompts, room = [], [], model.config.context - args.max_new_tokens - spare
    found = load_task(args.task, args.n_shot, args.seed, args.data_dir)
    for example in found:
        ids = tokenizer.encode(example.prompt)
        if 0 < len(ids) <= room:
            examples.append(example), prompts.append(ids)
        if len(prompts) == args.num_prompts:
            break
    if not prompts:
        raise InputError(f"--task {args.task}: no prompt leaves room for {args.max_new_tokens} new tokens in the context of {model.config.context}")
    return examples, prompts


def settings(args, *without):
    """The options as JSON can hold them, but for some; paths inside the repository relative to it."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in without}
    return {k: v.removeprefix(f"{CHECKPOINTS.parent}/") if isinstance(v, str) else v for k, v in values.items()}


def measured_with(args, *without):
    """What results hold for: the options, but for some, the files as they are now, and what computes."""
    files = {name: Path(path).stat() for name in ("checkpoint_path", "task") if (path := getattr(args, name, None)) and Path(path).is_file()}
    device = torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else f"{torch.get_num_threads()} threads"
    return {**settings(args, *without), "files": {name: [s.st_size, s.st_mtime_ns] for name, s in files.items()}, "computed_by": f"{device}, torch {torch.__version__}"}


def compare(plain, other, draws=2000):
    """How much sooner `other` is done than `plain`, given the seconds (prompts, repeats) that each took for the same texts: (speedup, low, high).

    The speedup is that of all prompts one after the other, each by the median of its repeats; low and high a 95% bootstrap interval,
    over prompts and repeats.
    """
    plain, other, generator = np.asarray(plain), np.asarray(other), np.random.default_rng(0)
    prompts, repeats = plain.shape
    chosen = generator.integers(prompts, size=(draws, prompts, 1)), generator.integers(repeats, size=(draws, prompts, repeats))
    ratios = typical(plain[chosen]) / typical(other[chosen])
    return float(typical(plain) / typical(other)), *np.percentile(ratios, (2.5, 97.5)).tolist()


def typical(seconds):
    """Seconds (...) that all prompts take, by the medians of their repeats, given seconds (..., prompts, repeats)."""
    return np.median(seconds, axis=-1).sum(-1)


def pyplot():
    """matplotlib's pyplot, drawing to files."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


class Results:
    """Rows that survive an interrupt, in FILE.jsonl, the first line of which is what they were measured with."""

    def __init__(self, out, measured_with):
        """out: FILE, or None to keep the rows in memory only. Continues a file that was measured with the same; InputError if with something else."""
        self.path, self.rows = out and Path(f"{out}.jsonl"), []
        if not out:
            return
        header = json.loads(json.dumps(measured_with))
        try:
            lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise InputError(f"--out {out}: {self.path} is not a file of results ({error}); delete it or name another") from None
        if not lines:
            self.path.write_text(json.dumps(header) + "\n")
            return
        changed = [k for k in {**header, **lines[0]} if lines[0].get(k) != header.get(k)]
        if changed:
            raise InputError(f"--out {out}: {self.path} was measured with {changed[0]} {lines[0].get(changed[0])}, not {header.get(changed[0])}; "
                             "name another file, or delete this one")
        self.rows = lines[1:]
        print(f"note: {self.path} has {len(self.rows)} results already; delete it to measure them anew")

    def add(self, row):
        self.rows.append(row)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def write_rows(out, rows):
    """Rows, dicts of the same keys, as FILE.jsonl and FILE.csv."""
    Path(f"{out}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv(f"{out}.csv", rows)


def write_csv(path, rows):
    """Rows, dicts of the same keys, as a table; lists in a cell are joined by spaces."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
