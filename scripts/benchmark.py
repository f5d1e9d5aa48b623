"""Plain against self-speculative decoding in one run: tokens/s, speedup, acceptance, memory bandwidth, memory.

Every setting decodes every prompt in turn, plain and speculative interleaved, after a warm-up that is reported apart.
Both share every kernel. Greedy text is compared token for token.

With --shape no checkpoint is needed: the model has random weights and a known model's shape. Its layers from the
smallest exit on contribute nothing, so that a draft is right (but for the rounding of an int8 draft head), unless it is
spoilt, with probability 1 - --acceptance. The bytes and kernels are those of the real model; the acceptance and the
text are synthetic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
import tasks
from checkpoint import empty_model
from command import InputError, run_command
from drafters import Drafter, SelfDrafter
from files import check_writable, write_text
from generate import Decoder, acceptance, load, peak_memory_gb, total_counts, total_rounds
from kernels.compiler import compiled
from model import Linear, ModelConfig, RMSNorm, Transformer
from tokenizer import Tokenizer
from values import Kind, filled, list_of, real, whole

# vocab_size, dim, n_layer, n_head, n_kv_head, head_dim, intermediate_size, context, tied
SHAPES = {
    "100M": (8192, 768, 12, 12, 12, 64, 2048, 2048, False),
    "llama3.2-1B": (128256, 2048, 16, 32, 8, 64, 8192, 131072, True),
    "llama2-7B": (32000, 4096, 32, 32, 32, 128, 11008, 4096, False),
    "codellama-7B": (32016, 4096, 32, 32, 32, 128, 11008, 16384, False),
    "llama3-8B": (128256, 4096, 32, 32, 8, 128, 14336, 8192, False),
    "llama2-13B": (32000, 5120, 40, 40, 40, 128, 13824, 4096, False),
    "codellama-34B": (32000, 8192, 48, 64, 8, 128, 22016, 16384, False),
    "llama2-70B": (32000, 8192, 80, 64, 8, 128, 28672, 4096, False),
}
DECODED = {  # what `decode` gives, beside its rounds
    "tokens": list_of(whole()),
    "prefill_seconds": real(),
    "decode_seconds": real(1e-9),  # what is measured is divided by it
}
PASS_POSITION = 128  # where --pass_rows times a pass
BAR_WIDTH = 40  # characters of a bar that stands for 100%
WARM_UPS = 3  # passes before those that are timed


@dataclass
class Work:
    """What the decoders are to do."""

    name: str  # of the model, for the report
    model: Transformer
    prompts: list[list[int]]
    acceptance: float | None = None  # with --shape: the chance that a drafted token is right
    tokenizer: Tokenizer | None = None  # None with --shape
    examples: list[tasks.Example] = field(default_factory=list)  # of the prompts; none with --shape


# The command line.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = tasks.parser(__doc__, [2, 4], "an eighth and a quarter of the layers")
    tasks.add_ngram_options(p)
    p.add_argument("--repeats", type=whole(1, tasks.MOST_REPEATS), default=3, help="timed passes over the prompts")
    p.add_argument("--pass_rows", type=whole(0, 1024), default=8, help="time one full pass over 1 to this many rows")
    p.add_argument(
        "--score",
        action="store_true",
        help="compare the texts with the task's references (needs scripts/requirements.txt)",
    )
    p.add_argument(
        "--plain_kernels", action="store_true", help="use PyTorch's kernels instead of this engine's, for all decoding"
    )
    p.add_argument("--fuse", action="store_true", help="on a GPU, use the kernels that do more at once (unmeasured)")
    p.add_argument(
        "--json",
        type=filled,
        metavar="FILE",
        default="-",
        help="write everything measured as one line of JSON; - means the last line of the output",
    )
    p.add_argument(
        "--out",
        type=filled,
        metavar="FILE",
        help="keep all decoded texts in FILE.jsonl, to continue after an interrupt, and the table in FILE.csv",
    )
    add_shape_options(p.add_argument_group("random weights of a known shape"))
    args = p.parse_args(argv)
    check_options(args)
    return args


def add_shape_options(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--shape", choices=SHAPES, help="use random weights of this shape, and no checkpoint and task")
    g.add_argument("--quantization", choices=["int8", "int4"], help="quantize the random weights")
    g.add_argument("--acceptance", type=real(0, 1), default=0.8, help="chance that a drafted token is right")
    g.add_argument("--prompt_tokens", type=whole(1, 10**6), default=128, help="length of the random prompts")


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for values that nothing can be measured with, or that contradict each other."""
    if args.json and args.json != "-":
        check_writable("--json", args.json, tasks.inputs(args))
    if args.out:
        tasks.check_outputs(args, ".jsonl")
    if args.quantization and not args.shape:
        raise InputError("--quantization: is for --shape; quantize.py makes a quantized checkpoint")
    if args.shape and args.temperature:
        raise InputError(
            "--temperature: --shape is greedy, since drafts can be spoilt to a wanted acceptance only there"
        )
    if args.shape and (args.draft or args.draft_precision != ["same"]):
        raise InputError("--draft and --draft_precision: random weights say nothing of how often these are right")
    if args.score and args.shape:
        raise InputError("--score: random weights write nothing worth comparing; name a checkpoint")
    if args.score:
        tasks.score(["a"], ["a"])  # if a package is missing, that shows now


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tasks.check(args)
    torch.manual_seed(args.seed)
    kernels.enabled, kernels.fuse = not args.plain_kernels, args.fuse
    work = load_shape(args) if args.shape else load_checkpoint(args)
    bandwidth = read_bandwidth(args.device)
    pass_seconds = pass_times(work.model, args.pass_rows, args.compile) if args.pass_rows else []
    decoders = make_decoders(args, work)
    conditions = tasks.measured_with(args, "json", "out", "pass_rows", "score")
    results = tasks.Results(args.out, conditions, columns(args.repeats, len(work.prompts), decoders))
    compile_seconds = compile_all(decoders, work.prompts[0])
    measure(args, decoders, work.prompts, results)
    table = summarize(args, work, decoders, results.rows, compile_seconds, bandwidth)
    if args.out:
        tasks.write_csv(f"{args.out}.csv", table)
    print_heading(args, work, decoders[0].full_bytes(), bandwidth, pass_seconds)
    print_table(table)
    print_acceptance(fastest(table))
    if args.score:
        print_scores(table)
    memory = peak_memory_gb(args.device)
    print_conclusion(args, work, table, memory)
    write_json(args, table, memory, pass_seconds, bandwidth)


# What is measured: a checkpoint on a task, or random weights on random prompts.


def load_checkpoint(args: argparse.Namespace) -> Work:
    """The checkpoint and the prompts of the task. Puts the default into args.early_exit."""
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    args.early_exit = args.early_exit or few_exits(model.config.n_layer)
    examples, prompts = tasks.load_prompts(args, model, tokenizer)
    if args.score:
        for example in examples:
            if example.reference is None:
                raise InputError(f"--score: --task {args.task} has prompts without a reference")
    return Work(str(args.checkpoint_path), model, prompts, tokenizer=tokenizer, examples=examples)


def load_shape(args: argparse.Namespace) -> Work:
    """A random model and random prompts. Puts the default into args.early_exit."""
    vocab, _, layers, *_ = SHAPES[args.shape]
    args.early_exit = args.early_exit or few_exits(layers)
    precision = args.precision
    if precision is None:
        precision = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype = getattr(torch, precision)
    rows = args.prompt_tokens + args.max_new_tokens
    model = random_model(args.shape, args.quantization, min(args.early_exit), rows, args.device, dtype)
    prompts = torch.randint(vocab, (args.num_prompts, args.prompt_tokens)).tolist()
    name = f"{args.shape} shape with random weights and synthetic acceptance {args.acceptance}"
    return Work(name, model, prompts, args.acceptance)


def few_exits(layers: int) -> list[int]:
    return sorted({max(1, layers // 8), max(1, layers // 4)})


def random_model(
    shape: str, quantization: str | None, first_idle: int, rows: int, device: str, dtype: torch.dtype
) -> Transformer:
    """A model of one of SHAPES with random weights, whose layers from first_idle on add nothing to the hidden states.

    rows: positions that its context must have.
    """
    vocab, dim, layers, heads, kv_heads, head_dim, ffn, context, tied = SHAPES[shape]
    config = ModelConfig(
        vocab,
        dim,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        max(context, rows),
        tied=tied,
        quantization=quantization,
        groupsize=128 if quantization == "int4" else None,
    )
    model = empty_model(config, device, dtype, f"--shape {shape}")
    torch.nn.init.normal_(model.embed.weight, std=dim**-0.5)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1)
        elif isinstance(module, Linear):
            idle = name.startswith("layers.") and int(name.split(".")[1]) >= first_idle and name.endswith(("wo", "w2"))
            randomize(module, 0 if idle else dim**-0.5)
    return model


def randomize(linear: Linear, std: float) -> None:
    """Fill a matrix with random weights of this standard deviation, in its own format."""
    if linear.scale is None:
        torch.nn.init.normal_(linear.weight, std=std)
    elif linear.zero is None:
        linear.weight.random_(-128, 128)  # int8, every value as likely: their standard deviation is 74
        linear.scale.fill_(std / 74)
    else:
        linear.weight.random_(0, 256)  # two int4 each, every value as likely: their standard deviation is 4.6
        linear.scale.fill_(std / 4.6)
        linear.zero.copy_(linear.scale / 2)  # their mean is -1/2


class SpoiltDrafter(SelfDrafter):
    """Drafts a wrong token in place of its own with probability 1 - acceptance. For greedy decoding."""

    acceptance = 1.0
    draft = Drafter.draft  # by `step`

    def step(self, token: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, logits = super().step(token, pos)
        right = torch.rand((), device=token.device) < self.acceptance
        return hidden, torch.where(right, logits, logits.roll(1, -1))  # the token behind the most likely one


# The machine: how fast it reads memory, and how long a pass takes.


def read_bandwidth(device: str) -> float:
    """Bytes per second that this machine reads from memory.

    This is the median of sums over 512 MB (8 GB on a GPU), far beyond any cache.
    """
    x = torch.ones(2**27 if torch.device(device).type == "cpu" else 2**31, device=device)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times)


def pass_times(model: Transformer, rows: int, compile: bool, repeats: int = 9) -> list[float]:
    """Median seconds of one full pass over M = 1..rows rows at PASS_POSITION, with the head on each."""

    def full_pass(x: Tensor, pos: Tensor) -> Tensor:  # (1, M) ids, (M,) -> (1, M, V)
        return model.logits(model(x, pos))

    model.setup_caches(PASS_POSITION + rows)
    device = model.embed.weight.device
    step = full_pass
    if compile and kernels.can_compile(model.embed.weight):
        step = compiled(full_pass)  # for each number of rows by itself
    times = []
    for m in range(1, rows + 1):
        x = torch.zeros(1, m, dtype=torch.long, device=device)
        pos = torch.arange(PASS_POSITION, PASS_POSITION + m, device=device)
        times.append(time_pass(step, x, pos, compile and device.type == "cuda", repeats))
    return times


def time_pass(step: Callable[[Tensor, Tensor], Tensor], x: Tensor, pos: Tensor, graphed: bool, repeats: int) -> float:
    """Median seconds of step(x, pos), after WARM_UPS.

    graphed: as one CUDA graph, as decoding does it, without the time that launching kernel by kernel takes.
    """
    run: Callable = functools.partial(step, x, pos)
    out = run()
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        run = graph.replay
    samples = []
    for _ in range(WARM_UPS + repeats):
        began = time.perf_counter()
        run()
        out[0, 0, 0].item()  # waits for the device
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[WARM_UPS:])


# Decoding.


def make_decoders(args: argparse.Namespace, work: Work) -> list[Decoder]:
    """A plain decoder, then one for each way to draft."""
    rows = max(map(len, work.prompts)) + args.max_new_tokens
    decoders = [tasks.make_decoder(args, work.model, rows)]
    for way in tasks.ways(args, work.model.config.n_layer):
        spoilt = None
        if work.acceptance is not None:
            spoilt = SpoiltDrafter(work.model, way["exit_layer"], way["k"], args.draft_head)
            spoilt.acceptance = work.acceptance
        decoders.append(tasks.make_decoder(args, work.model, rows, drafter=spoilt, **way))
    return decoders


def compile_all(decoders: list[Decoder], prompt: list[int]) -> list[float]:
    """Warm every decoder up; returns the seconds that each took."""
    seconds = []
    for decoder in tqdm(decoders, desc="compiling", disable=None):
        began = time.perf_counter()
        tasks.warm_up(decoder, prompt)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(
    args: argparse.Namespace, decoders: list[Decoder], prompts: list[list[int]], results: tasks.Results
) -> None:
    """Decode every prompt with every decoder in turn, `repeats` times, but for what the results have already."""
    done = results.by("repeat", "prompt")
    everything = itertools.product(range(args.repeats), range(len(prompts)))
    todo = [turn for turn in everything if turn not in done]
    for repeat, i in tqdm(todo, desc="decoding", unit="prompt", disable=None):
        decoded = [decode(decoder, prompts[i], args.max_new_tokens) for decoder in decoders]
        results.add(dict(repeat=repeat, prompt=i, decoded=decoded))


def decode(decoder: Decoder, prompt: list[int], max_new_tokens: int) -> tasks.Row:
    tokens = list(decoder.generate(prompt, max_new_tokens))
    stats = decoder.stats
    return dict(
        tokens=tokens,
        rounds=stats.rounds,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=stats.decode_seconds,
    )


def columns(repeats: int, prompts: int, decoders: list[Decoder]) -> dict[str, Kind]:
    """What a row of FILE.jsonl has."""

    def are_decoded(value: object) -> bool:
        return isinstance(value, list) and len(value) == len(decoders) and all(map(is_decoded, decoders, value))

    return {
        "repeat": whole(0, repeats - 1),
        "prompt": whole(0, prompts - 1),
        "decoded": Kind(f"a list of what each of {len(decoders)} ways to decode gave", are_decoded),
    }


def is_decoded(decoder: Decoder, value: object) -> bool:
    """Whether it can be what `decode` gave for this decoder."""
    if not isinstance(value, dict) or not all(kind.allows(value.get(name)) for name, kind in DECODED.items()):
        return False
    rounds = value.get("rounds")
    if not isinstance(rounds, dict) or rounds.keys() != {member.name for member in decoder.pieces}:
        return False
    return all(list_of(whole()).allows(counts) and len(counts) == decoder.K + 1 for counts in rounds.values())


# The table, from rows of results: {repeat, prompt, decoded: what `decode` gives, for each decoder}.


def summarize(
    args: argparse.Namespace,
    work: Work,
    decoders: list[Decoder],
    results: list[tasks.Row],
    compile_seconds: list[float],
    bandwidth: float,
) -> list[tasks.Row]:
    """A row for each decoder, the plain one first."""
    table = []
    for i, decoder in enumerate(decoders):
        row = summarize_decoder(args, decoder, i, len(work.prompts), results, bandwidth)
        row["compile_seconds"] = compile_seconds[i]
        row["same_text"] = tokens_of(results, i) == tokens_of(results, 0)
        if args.score:
            row |= score(work, results, i)
        table.append(row)
    return table


def summarize_decoder(
    args: argparse.Namespace, decoder: Decoder, i: int, prompts: int, results: list[tasks.Row], bandwidth: float
) -> tasks.Row:
    """Speed, acceptance and bandwidth of decoder number i. prompts: how many there are."""
    runs = [result["decoded"][i] for result in results]
    rounds = total_rounds([run["rounds"] for run in runs])
    counts = total_counts(rounds.values())
    probs, mean = acceptance(counts)
    own_seconds = seconds_of(results, i, prompts)
    speedup, low, high = tasks.compare(seconds_of(results, 0, prompts), own_seconds)
    seconds = tasks.typical(own_seconds)
    rate = prompts * (args.max_new_tokens - 1) / seconds  # the prompt's pass gives each text's first token
    used = decoder.bytes_read(rounds) / args.repeats / seconds  # bytes per second
    return dict(
        decoding=tasks.describe(decoder),
        exit_layer=decoder.exit_layer,
        k=decoder.K,
        rounds=rounds,
        draft_copy_bytes=decoder.drafter.extra_bytes(),
        tokens_per_second=rate,
        ms_per_token=1e3 / rate,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        ideal_speedup=decoder.ideal_speedup(rounds),
        mean_accepted=mean,
        acceptance_probs=probs,
        acceptance_by_position=by_position(counts),
        bandwidth_gb_per_s=used / 1e9,
        bandwidth_share=used / bandwidth,
        prefill_seconds=statistics.median(map(itemgetter("prefill_seconds"), runs)),
    )


def seconds_of(results: list[tasks.Row], i: int, prompts: int) -> list[list[float]]:
    """Decoding times (prompts, repeats) of decoder number i."""
    seconds: list[list[float]] = [[] for _ in range(prompts)]
    for result in results:
        seconds[result["prompt"]].append(result["decoded"][i]["decode_seconds"])
    return seconds


def tokens_of(results: list[tasks.Row], i: int) -> list[list[int]]:
    """All that decoder number i has written, in the order of the results."""
    return [result["decoded"][i]["tokens"] for result in results]


def by_position(counts: Sequence[float]) -> list[float]:
    """Share of rounds that accepted draft i, of those that accepted all before it, from accept counts: (K,)."""
    shares = []
    for i in range(len(counts) - 1):
        reached = sum(counts[i:])
        shares.append(sum(counts[i + 1 :]) / reached if reached else 0.0)
    return shares


def score(work: Work, results: list[tasks.Row], i: int) -> dict[str, float]:
    """How close the texts of decoder number i come to their references, by tasks.SCORES."""
    assert work.tokenizer is not None
    texts, references = [], []
    for result, tokens in zip(results, tokens_of(results, i), strict=True):
        prompt = work.prompts[result["prompt"]]
        texts.append(text_of(work.tokenizer, prompt, tokens, work.model.config.eos_ids))
        reference = work.examples[result["prompt"]].reference
        assert reference is not None  # checked when they were loaded
        references.append(reference)
    return tasks.score(texts, references)


def text_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int], eos_ids: Collection[int]) -> str:
    """The text of new ids as it stands after the prompt, up to the first of eos_ids, which decoding went beyond."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return tokenizer.decode(prompt + ids[:end])[len(tokenizer.decode(prompt)) :]


# The report.


def print_heading(
    args: argparse.Namespace, work: Work, pass_bytes: int, bandwidth: float, pass_seconds: list[float]
) -> None:
    mode = "compiled" if args.compile and kernels.can_compile(work.model.embed.weight) else "eager"
    if args.plain_kernels:
        mode += ", plain kernels"
    if args.fuse:
        mode += ", fused kernels"
    print(
        f"\n{work.name}, {tasks.weights_kind(work.model)} on {args.device}, {mode}, temperature {args.temperature}, "
        f"{len(work.prompts)} prompts x {args.max_new_tokens} new tokens, medians of {args.repeats}"
    )
    print(
        f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s; "
        f"one full pass reads {pass_bytes / 1e6:.1f} MB of weights"
    )
    if pass_seconds:
        times = []
        for m, seconds in enumerate(pass_seconds, 1):
            times.append(f"{m}: {1e3 * seconds:.2f} ms ({seconds / pass_seconds[0]:.2f}x)")
        print(f"one full pass over M rows: {', '.join(times)}")
    print()


def print_table(table: list[tasks.Row]) -> None:
    print(f"{'decoding':32s}  tokens/s  ms/token  speedup (95% interval)  ideal (reached)  accepted  GB/s (share)")
    for row in table:
        reached = row["speedup"] / row["ideal_speedup"]
        print(
            f"{row['decoding']:32s} {row['tokens_per_second']:9.1f} {row['ms_per_token']:9.2f}  "
            f"{tasks.interval(row, '6.2f')} {row['ideal_speedup']:5.2f}x {reached:7.0%} {row['mean_accepted']:11.2f}  "
            f"{row['bandwidth_gb_per_s']:5.1f} ({row['bandwidth_share']:.0%})"
        )


def fastest(table: list[tasks.Row]) -> tasks.Row:
    """The row of the fastest setting that drafts."""
    return max(table[1:], key=itemgetter("speedup"))


def print_acceptance(best: tasks.Row) -> None:
    print(f"\ndrafted tokens accepted per round by {best['decoding']}:")
    for i, share in enumerate(best["acceptance_probs"]):
        print(f"  {i} {'█' * round(share * BAR_WIDTH)} {share:.1%}")
    shares = ", ".join([f"{share:.0%}" for share in best["acceptance_by_position"]])
    print(f"accepted, of those whose predecessors were, by position: {shares}\n")


def print_scores(table: list[tasks.Row]) -> None:
    for row in table:
        scores = ", ".join([f"{name} {row[name]:.3f}" for name in tasks.SCORES])
        print(f"{row['decoding']:32s} {scores}")
    print()


def print_conclusion(args: argparse.Namespace, work: Work, table: list[tasks.Row], memory_gb: float) -> None:
    if args.temperature == 0:
        same = all(map(itemgetter("same_text"), table))
        verdict = "the same, token for token" if same else "DIFFERS between plain and speculative decoding"
        print(f"text: {verdict}")
    plain, best = table[0], fastest(table)
    if best["speedup"] <= 1:
        print(
            f"speculation loses here: its best setting reaches {best['speedup']:.2f}x "
            f"of plain decoding's {plain['tokens_per_second']:.1f} tokens/s"
        )
    length = statistics.median(map(len, work.prompts))
    compile_seconds = sum(map(itemgetter("compile_seconds"), table))
    print(
        f"prefill {plain['prefill_seconds']:.3f} s for a prompt of {length:.0f} tokens, "
        f"compilation {compile_seconds:.1f} s in all, peak memory {memory_gb:.2f} GB"
    )


def write_json(
    args: argparse.Namespace, table: list[tasks.Row], memory_gb: float, pass_seconds: list[float], bandwidth: float
) -> None:
    """Everything measured as one line of JSON, where --json says."""
    without = ["json", "out"]
    if args.shape:
        without += ["checkpoint_path", "task"]
    report = dict(
        settings=tasks.settings(args, *without),
        table=table,
        memory_gb=memory_gb,
        pass_seconds=pass_seconds,
        read_bandwidth_gb_per_s=bandwidth / 1e9,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=args.threads,
        machine=platform.machine(),
    )
    line = json.dumps(report)
    if args.json == "-":
        print(line)
    elif args.json:
        write_text(args.json, line + "\n")


if __name__ == "__main__":
    run_command(main)
