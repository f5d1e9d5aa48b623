"""What the measuring scripts share: prompts, options, scores of texts, results on disk, statistics of timings.

Prompts and their references come from a dataset of the hub, or from local files.
"""

import argparse
import csv
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from adapters import adapters_path
from checkpoint import described_by, dtype_name
from command import InputError, Parser, add_threads, check_device, first_line
from drafters import Drafter, SelfDrafter
from files import (
    append_line,
    check_fields,
    check_writable,
    drop_torn_line,
    locked,
    parse_json,
    read_lines,
    read_text,
    replacing,
    write_json,
    write_text,
)
from generate import CHECKPOINTS, DRAFT_LENGTH, MOST_SEED, NGRAM_K, Decoder, Sampling
from model import SIZES, Transformer
from ranks import world_size
from tokenizer import Tokenizer
from values import NOTHING, TEXT, Kind, filled, filled_path, real, whole

if TYPE_CHECKING:
    import datasets
    from matplotlib.figure import Figure

# What `datasets` calls the formats of files.
FILE_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
LM_WORDS = 100  # how many words of an article are the prompt of cnn_dm_lm
ROUGE = ("rouge1", "rouge2", "rougeL")
SCORES = (*ROUGE, "bleu", "exact_match", "edit_distance")
BOOTSTRAP_DRAWS = 2000
MOST_REPEATS = 10**4  # of all prompts: what is left to do is a list in memory

Row = dict[str, Any]  # a row of a table of results, as JSON can hold it


# Tasks: where prompts and references come from.


@dataclass(frozen=True)
class Example:
    """A text to continue and, where there is one, what a good continuation is."""

    prompt: str
    reference: str | None = None


@dataclass(frozen=True)
class Task:
    """A dataset of the hub, and how one of its rows becomes an Example."""

    repo: str
    name: str | None  # of the dataset's configuration, if it has several
    columns: tuple[str, ...]  # the values that `example` takes, in its order
    example: Callable[..., Example]
    shots: str = "train"  # the split from which solved examples are drawn

    def make(self, row: Row) -> Example:
        """The Example in a row of the dataset."""
        return self.example(*[row[column] for column in self.columns])


def summary(article: str, text: str) -> Example:
    """Summarize the article; `text` is a good summary."""
    return Example(f"Article: {article}\nSummary:", f" {text}")


def opening(article: str) -> Example:
    """Go on after the article's first LM_WORDS words."""
    words = article.split()
    return Example(" ".join(words[:LM_WORDS]), " " + " ".join(words[LM_WORDS:]))


def semantic_parse(utterance: str, parse: str) -> Example:
    """Write the meaning of a sentence in the notation of TOPv2."""
    return Example(utterance, f"\n{parse}")


# The names and prompts of the LayerSkip repository.
TASKS = {
    "cnn_dm_summarization": Task("abisee/cnn_dailymail", "3.0.0", ("article", "highlights"), summary),
    "cnn_dm_lm": Task("abisee/cnn_dailymail", "3.0.0", ("article",), opening),
    "xsum_summarization": Task("EdinburghNLP/xsum", None, ("document", "summary"), summary),
    "human_eval": Task("openai/openai_humaneval", None, ("prompt", "canonical_solution"), Example, shots="test"),
    "top_v2": Task("WillHeld/top_v2", None, ("utterance", "semantic_parse"), semantic_parse),
}


def load_task(name: str, n_shot: int = 0, seed: int = 0, data_dir: str | Path | None = None) -> list[Example]:
    """The Examples of one of TASKS, or of a JSONL file.

    n_shot: put this many solved examples before each prompt. They are drawn at random with `seed`, from the training
    split. If there is none, they are drawn from the examples themselves, and are then not asked for. data_dir: read
    local files instead of the hub. Raises InputError if the task can't be read or has too few examples.
    """
    examples = read_examples(name, data_dir)
    before = ""
    if n_shot:
        shots, examples = draw_shots(name, examples, n_shot, seed, data_dir)
        for shot in shots:
            if shot.reference is None:
                raise InputError(f"--n_shot {n_shot}: an example of --task {name} has no reference to show")
            before += f"{shot.prompt}{shot.reference.rstrip()}\n\n"
    if not examples:
        raise InputError(f"--task {name}: is empty")
    return [Example(before + example.prompt, example.reference) for example in examples]


def read_examples(name: str, data_dir: str | Path | None) -> list[Example]:
    """All examples of a task, in the order of its test split or file. Raises InputError for an unknown task."""
    if name in TASKS:
        return [TASKS[name].make(row) for row in read_split(name, "test", data_dir)]
    if Path(name).suffix == ".jsonl" or Path(name).is_file():
        return read_jsonl(name)
    raise InputError(f"--task {name}: is neither a .jsonl file nor one of {', '.join(TASKS)}")


def draw_shots(
    name: str, examples: list[Example], n_shot: int, seed: int, data_dir: str | Path | None
) -> tuple[list[Example], list[Example]]:
    """(n_shot solved examples, the examples that are still to be asked for)."""
    task = TASKS.get(name)
    if task is None or task.shots == "test":
        chosen = draw_indices(name, len(examples), len(examples) - 1, n_shot, seed)
        left = [example for i, example in enumerate(examples) if i not in chosen]
        return [examples[i] for i in chosen], left
    pool = read_split(name, task.shots, data_dir)
    chosen = draw_indices(name, len(pool), len(pool), n_shot, seed)
    return [task.make(pool[i]) for i in chosen], examples


def draw_indices(name: str, size: int, most: int, n_shot: int, seed: int) -> list[int]:
    """n_shot different indices below `size`. Raises InputError if that is more than `most`."""
    if n_shot > most:
        raise InputError(f"--n_shot {n_shot}: --task {name} has only {size} examples to draw from")
    return random.Random(seed).sample(range(size), n_shot)


def read_split(name: str, split: str, data_dir: str | Path | None) -> "datasets.Dataset":
    """The rows of a split of one of TASKS, from local files if data_dir is given, else from the hub.

    Raises InputError if they can't be read or lack a column.
    """
    import datasets

    datasets.disable_progress_bars()
    task = TASKS[name]
    rows = read_local(name, split, Path(data_dir)) if data_dir else read_hub(name, split)
    for column in task.columns:
        if column not in rows.column_names:
            raise InputError(
                f"{data_dir or task.repo}: {split} has no column {column}, which --task {name} needs; "
                f"it has {', '.join(rows.column_names)}"
            )
    return rows


def read_local(name: str, split: str, folder: Path) -> "datasets.Dataset":
    """A split from the files whose names begin with its name: test.jsonl, or test-00000-of-00002.parquet and so on."""
    import datasets

    files = [file for file in sorted(folder.glob(f"{split}*")) if file.suffix in FILE_KINDS]
    if not files:
        raise InputError(
            f"--data_dir {folder}: has no {split}*.parquet, .jsonl, .json or .csv, which --task {name} needs"
        )
    suffix = files[0].suffix
    parts = [str(file) for file in files if file.suffix == suffix]
    try:
        return datasets.load_dataset(FILE_KINDS[suffix], data_files=parts, split="train")
    except Exception as error:  # each format has its own errors
        raise InputError(f"--data_dir {folder}: {files[0].name} can't be read ({reason(error)})") from None


def read_hub(name: str, split: str) -> "datasets.Dataset":
    """A split from the hub, or from the cache of earlier downloads. Raises InputError if neither has it."""
    import datasets

    task = TASKS[name]
    try:
        return datasets.load_dataset(task.repo, task.name, split=split)
    except Exception as error:  # the network fails in many ways
        raise InputError(
            f"--task {name}: {task.repo} can't be had from the hub ({reason(error)}); "
            "--data_dir takes local files of it"
        ) from None


def reason(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return first_line(error, type(error).__name__)


def read_jsonl(path: str | Path) -> list[Example]:
    """The Examples of a file whose lines are JSON objects with a `prompt` and perhaps a `reference`.

    Raises InputError if it can't be read, is empty, or has another line.
    """
    examples = []
    for where, row in read_lines(path):
        check_fields(row, {"prompt": TEXT, "reference": TEXT | NOTHING}, where)
        examples.append(Example(row["prompt"], row.get("reference")))
    if not examples:
        raise InputError(f"--task {path}: is empty")
    return examples


def score(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How close texts come to their references: {name in SCORES: mean over the texts}.

    White space at both ends doesn't count. ROUGE is the F-measure (0 to 1). BLEU is that of all texts together (0 to
    100). exact_match is the share of texts that equal their reference. edit_distance is the number of characters that
    must be inserted, deleted or replaced.
    """
    import sacrebleu
    from rapidfuzz.distance import Levenshtein
    from rouge_score.rouge_scorer import RougeScorer

    written = [text.strip() for text in texts]
    wanted = [reference.strip() for reference in references]
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    for text, reference in zip(written, wanted, strict=True):
        rouge = scorer.score(reference, text)
        for kind in ROUGE:
            values[kind].append(rouge[kind].fmeasure)
        values["exact_match"].append(text == reference)
        values["edit_distance"].append(Levenshtein.distance(text, reference))
    values["bleu"].append(sacrebleu.corpus_bleu(written, [wanted]).score)
    return {name: sum(found) / len(found) for name, found in values.items()}


# Options of every measuring script.


def parser(
    description: str | None,
    ks: list[int],
    exits: str = "all in the lower half, with int8 and int4 all",
    num_prompts: int = 4,
) -> argparse.ArgumentParser:
    """A parser with the shared options.

    ks: default draft lengths. exits: the default exit layers, in words for --help. num_prompts: the default.
    """
    p = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_task_options(p.add_argument_group("what to decode"), num_prompts)
    add_decoding_options(p.add_argument_group("how to decode"), ks, exits)
    return p


def add_task_options(g: argparse._ArgumentGroup, num_prompts: int) -> None:
    """The checkpoint, the prompts, and how many tokens to decode."""
    g.add_argument(
        "--checkpoint_path",
        type=filled_path,
        default=CHECKPOINTS / "demo" / "model.pth",
        help="model.pth of a prepared checkpoint",
    )
    g.add_argument(
        "--task",
        type=filled,
        default=str(CHECKPOINTS / "demo" / "prompts.jsonl"),
        help=f"{', '.join(TASKS)}, or a JSONL file with a `prompt` and perhaps a `reference` in each line",
    )
    g.add_argument(
        "--data_dir",
        type=filled_path,
        help="read the task's splits from parquet, JSONL or CSV files in this folder, not from the hub",
    )
    g.add_argument("--n_shot", type=whole(), default=0, help="put this many solved examples before each prompt")
    g.add_argument(
        "--num_prompts", type=whole(1), default=num_prompts, help="use the first N prompts that fit into the context"
    )
    g.add_argument(
        "--max_new_tokens",
        type=whole(2),
        default=256,
        help="decode this many tokens per prompt, even beyond an EOS token",
    )


def add_decoding_options(g: argparse._ArgumentGroup, ks: list[int], exits: str) -> None:
    """Speculation, sampling, and how to compute."""
    layer = SIZES["n_layer"]
    g.add_argument(
        "--early_exit", "--exit_layer", type=layer, nargs="+", help=f"exit layers to try; None means {exits}"
    )
    g.add_argument(
        "--speculate_k",
        "--num_speculations",
        type=DRAFT_LENGTH,
        nargs="+",
        default=ks,
        help="draft lengths to try",
    )
    g.add_argument(
        "--draft_precision",
        nargs="+",
        choices=["same", "int8", "int4"],
        default=["same"],
        help="draft with the layers themselves, or with copies of them in int8 or int4, which may have all layers",
    )
    g.add_argument("--temperature", type=real(), default=0.0, help="0: always take the most likely token")
    g.add_argument("--top_k", type=whole(1), help="draw only from the k most likely tokens")
    g.add_argument(
        "--top_p",
        type=real(0, 1),
        default=1.0,
        help="draw from the most likely tokens that together have this probability",
    )
    g.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="the same seed gives the same texts")
    g.add_argument(
        "--draft_head",
        choices=["int8", "full"],
        default="int8",
        help="draft with an int8 copy of the output head, or with the head itself",
    )
    g.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1")
    g.add_argument(
        "--precision",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; None means bfloat16 on CUDA and float32 on the CPU",
    )
    add_threads(g.add_argument)
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile decoding on a GPU")


def add_ngram_options(p: argparse.ArgumentParser) -> None:
    """For scripts that take n-gram drafts too."""
    p.add_argument(
        "--draft", choices=["ngram"], help="take n-gram drafts too: alone, and in front of every other setting"
    )
    p.add_argument("--ngram_k", type=DRAFT_LENGTH, default=NGRAM_K, help="length of n-gram drafts")


def default_device() -> str:
    """What --device is if nobody says."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(args: argparse.Namespace) -> None:
    """Raise InputError if a shared option has a value that doesn't work."""
    check_machine(args.device)
    torch.set_num_threads(args.threads)
    sampling(args)


def check_machine(device: str) -> None:
    """Raise InputError unless this is the only process and can compute on the device."""
    if (size := world_size()) > 1:
        raise InputError(
            f"WORLD_SIZE is {size}, but the measuring scripts are for one process: start them without torchrun"
        )
    check_device(device)


def sampling(args: argparse.Namespace) -> Sampling:
    """The Sampling that the options describe. Raises InputError if they are out of range."""
    return Sampling(args.temperature, args.top_k, args.top_p)


def exits(args: argparse.Namespace, n_layer: int) -> dict[str, list[int]]:
    """{draft precision: exit layers to try, sorted} on a model of n_layer layers."""
    copies = set(args.draft_precision) - {"same"}
    chosen = {}
    for precision in args.draft_precision:
        most = n_layer if precision in copies else max(1, n_layer // 2)
        own = set(args.early_exit or range(1, most + 1))
        if copies and precision == "same":
            own.discard(n_layer)  # is for the copies
        if own:
            chosen[precision] = sorted(own)
    return chosen


def ways(args: argparse.Namespace, n_layer: int) -> list[Row]:
    """What `make_drafter` takes for every way to draft that the options name, on a model of n_layer layers: precisions,
    exits and lengths, each also behind n-grams if these are asked for, and n-grams alone.
    """
    lengths = [0, args.ngram_k] if args.draft else [0]
    found: list[Row] = []
    for precision, own in exits(args, n_layer).items():
        for e, k, ngram_k in itertools.product(own, args.speculate_k, lengths):
            found.append(dict(draft_precision=precision, exit_layer=e, k=k, ngram_k=ngram_k))
    if args.draft:
        found.append(dict(ngram_k=args.ngram_k))
    return found


def describe(decoder: Decoder) -> str:
    """How a decoder drafts, such as "n-gram K=8, self int8 E=3 K=4"."""
    parts = []
    for drafter in decoder.drafter.members():
        if isinstance(drafter, SelfDrafter):
            parts.append(f"{drafter.name} E={drafter.exit_layer} K={drafter.k}")
        elif drafter.k:
            parts.append(f"{drafter.name} K={drafter.k}")
    return ", ".join(parts) or "plain"


# Prompts and decoders, as the options describe them.


def load_prompts(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, spare: int = 0
) -> tuple[list[Example], list[list[int]]]:
    """(examples, the ids of their prompts): the first num_prompts that leave enough room in the context.

    Enough is max_new_tokens and `spare` more. Raises InputError if there is no such prompt.
    """
    room = model.config.context - args.max_new_tokens - spare
    examples, prompts = [], []
    for example in load_task(args.task, args.n_shot, args.seed, args.data_dir):
        ids = tokenizer.encode(example.prompt)
        if 0 < len(ids) <= room:
            examples.append(example)
            prompts.append(ids)
        if len(prompts) == args.num_prompts:
            break
    if not prompts:
        raise InputError(
            f"--task {args.task}: no prompt leaves room for {args.max_new_tokens} new tokens "
            f"in the context of {model.config.context}"
        )
    return examples, prompts


def make_decoder(
    args: argparse.Namespace,
    model: Transformer,
    rows: int,
    exit_layer: int | None = None,
    k: int = 0,
    drafter: Drafter | None = None,
    **options: Any,
) -> Decoder:
    """A Decoder as the options describe it.

    rows: number of positions in its caches. exit_layer: the layer that drafts k tokens per round; None decodes plainly.
    drafter: drafts instead of that layer. options: more of `make_drafter`.
    """
    return Decoder(
        model,
        drafter=drafter,
        exit_layer=exit_layer,
        k=k,
        draft_head=args.draft_head,
        **options,
        sampling=sampling(args),
        rows=rows,
        compile=args.compile,
        seed=args.seed,
    )


def weights_kind(model: Transformer) -> str:
    """How the weights are stored: int8 or int4 if they are quantized, else the name of their dtype."""
    return model.config.quantization or dtype_name(model.embed.weight.dtype)


def warm_up(decoder: Decoder, prompt: list[int]) -> None:
    """Decode a little after the prompt, so that everything is compiled and tuned."""
    for _ in decoder.generate(prompt, 3 * (decoder.K + 1)):
        pass


# Results on disk.


def inputs(args: argparse.Namespace) -> list[str | Path]:
    """The files that the options name to be read."""
    found = [args.checkpoint_path, described_by(args.checkpoint_path)]
    for name in ("task", "text", "reference"):
        if getattr(args, name, None):
            found.append(getattr(args, name))
    return found


def check_outputs(args: argparse.Namespace, *suffixes: str) -> None:
    """Raise InputError if a file that --out names with one of the suffixes can't be written, or is an input."""
    for suffix in suffixes:
        check_writable("--out", f"{args.out}{suffix}", inputs(args))


def settings(args: argparse.Namespace, *without: str) -> Row:
    """The options as JSON can hold them. without: leave these out. Paths in the repository are relative to it."""
    values = {}
    for name, value in vars(args).items():
        if name in without:
            continue
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, str):
            value = value.removeprefix(f"{CHECKPOINTS.parent}/")
        values[name] = value
    return values


def note_file(files: Row, name: str, path: Path) -> None:
    """Add to `files` what tells a file, if there is one, from what it was before it changed."""
    if path.is_file():
        stat = path.stat()
        files[name] = [stat.st_size, stat.st_mtime_ns]


def measured_with(args: argparse.Namespace, *without: str) -> Row:
    """What results depend on: the options, the input files as they are now, and the machine. without: not these."""
    files: Row = {}
    for name in ("checkpoint_path", "task"):
        path = getattr(args, name, None)
        if path:
            note_file(files, name, Path(path))
    checkpoint = getattr(args, "checkpoint_path", None)
    if checkpoint:
        note_file(files, "adapters", adapters_path(checkpoint))
    if torch.device(args.device).type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    else:
        device = f"{torch.get_num_threads()} threads"
    return {**settings(args, *without), "files": files, "computed_by": f"{device}, torch {torch.__version__}"}


class Results:
    """Rows that survive an interrupt. FILE.jsonl keeps them; its first line says what they were measured with."""

    def __init__(self, out: str | Path | None, conditions: Row, columns: Mapping[str, Kind] | None = None) -> None:
        """out: FILE, or None to keep the rows in memory only. conditions: what `measured_with` returns.

        If there is such a file with the same conditions, its rows are taken over. Raises InputError if it has others,
        or if its rows don't have these columns.
        """
        self.out = out
        self.path: Path | None = None
        self.rows: list[Row] = []
        if out:
            self.path = Path(f"{out}.jsonl")
            with ExitStack() as held:
                held.enter_context(locked(self.path))
                self.resume(self.path, json.loads(json.dumps(conditions)))
                for number, row in enumerate(self.rows, 2):
                    check_fields(row, columns or {}, f"--out {out}: {self.path}, line {number}")
                self.held = held.pop_all()  # gives the lock back when it is dropped

    def resume(self, path: Path, header: Row) -> None:
        """Take over the rows of a file, or begin a new one."""
        if not path.exists():
            write_json(path, header)
            return
        there, *self.rows = self.read(path)
        for name in {**header, **there}:
            if there.get(name) != header.get(name):
                raise InputError(
                    f"--out {self.out}: {path} was measured with {name} {there.get(name)}, not {header.get(name)}; "
                    "name another file, or delete this one"
                )
        if drop_torn_line(path):
            print(f"note: the last line of {path} was not whole, and is measured again")
        print(f"note: {path} has {len(self.rows)} results already; delete it to measure them anew")

    def read(self, path: Path) -> list[Row]:
        """The lines of a file that are whole, at least one. Raises InputError if there are none, or one isn't JSON."""
        complete = read_text(path).rpartition("\n")[0]
        try:
            lines = [parse_json(line) for line in complete.split("\n")]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no JSON object")
            return lines
        except ValueError as error:
            raise InputError(
                f"--out {self.out}: {path} is not a file of results ({error}); delete it or name another"
            ) from None

    def by(self, *columns: str) -> dict[Any, Row]:
        """{values in these columns: row}. Raises InputError if a row lacks one of them, or two have the same."""
        try:
            found = {itemgetter(*columns)(row): row for row in self.rows}
        except KeyError as error:
            raise InputError(
                f"--out {self.out}: {self.path} has no column {error}, so another version wrote it; "
                "name another file, or delete this one"
            ) from None
        if len(found) < len(self.rows):
            raise InputError(f"--out {self.out}: {self.path} has two rows of the same {' and '.join(columns)}")
        return found

    def add(self, row: Row) -> None:
        """Keep one more row, in the file too."""
        self.rows.append(row)
        if self.path:
            append_line(self.path, json.dumps(row))


def write_rows(out: str | Path, rows: list[Row]) -> None:
    """Write rows, which all have the same keys, as FILE.jsonl and FILE.csv."""
    write_text(f"{out}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_csv(f"{out}.csv", rows)


def write_csv(path: str | Path, rows: list[Row]) -> None:
    """Write rows, which all have the same keys, as a table."""
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({name: csv_cell(value) for name, value in row.items()})


def csv_cell(value: Any) -> Any:
    """A value as it stands in a table: the items of a list are joined by spaces."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG, and forget it. Raises InputError if it can't be written."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot().close(figure)


def pyplot() -> ModuleType:
    """matplotlib's pyplot, set to draw to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# Timings.


def compare(plain: Any, other: Any) -> tuple[float, float, float]:
    """(speedup, low, high): how many times faster `other` is than `plain`.

    plain, other: arrays of seconds (prompts, repeats). The speedup compares the times for all prompts together, where
    the time of a prompt is the median of its repeats. low and high are the ends of a 95% bootstrap interval, over
    prompts and repeats.
    """
    plain, other = np.asarray(plain), np.asarray(other)
    generator = np.random.default_rng(0)
    prompts, repeats = plain.shape
    drawn_prompts = generator.integers(prompts, size=(BOOTSTRAP_DRAWS, prompts, 1))
    drawn_repeats = generator.integers(repeats, size=(BOOTSTRAP_DRAWS, prompts, repeats))
    chosen = drawn_prompts, drawn_repeats
    ratios = typical(plain[chosen]) / typical(other[chosen])  # (BOOTSTRAP_DRAWS,)
    low, high = np.percentile(ratios, (2.5, 97.5)).tolist()
    return float(typical(plain) / typical(other)), low, high


def interval(row: Row, form: str) -> str:
    """A row's speedup with its interval: 1.50x (1.40 to 1.60). form: the format of the first number, such as .2f."""
    return f"{row['speedup']:{form}}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"


def typical(seconds: Any) -> Any:
    """From seconds (..., prompts, repeats): the sum over the prompts of the median of their repeats (...)."""
    return np.median(seconds, axis=-1).sum(-1)
