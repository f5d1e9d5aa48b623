"""Plain against self-speculative decoding in one run: tokens/s, share of the memory bandwidth, speedup, acceptance, memory.

Every setting decodes every prompt in turn, plain and speculative interleaved, after a warm-up that is reported apart. Both
share every kernel. Greedy text is compared token for token. With --shape no checkpoint is needed: random weights of a
known model's shape, in which layers from the smallest exit on contribute nothing, so that a draft is right (but for the rounding
of an int8 draft head), except that it is spoilt with probability 1 - --acceptance. The bytes and kernels are those of the real model; the acceptance is
synthetic, and so is the text.
"""
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tqdm import tqdm

import kernels
import tasks
from generate import Decoder, acceptance, load, peak_memory_gb
from checkpoint import empty_model
from command import InputError, check_writable, run_command
from model import ModelConfig, RMSNorm
from model import Linear

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


def random_model(shape, quantization, first_idle, rows, device, dtype):
    """A model of one of SHAPES with random weights, whose layers from first_idle on add nothing to the hidden states. rows: positions that it must have."""
    vocab, dim, layers, heads, kv_heads, head_dim, ffn, context, tied = SHAPES[shape]
    config = ModelConfig(vocab, dim, layers, heads, kv_heads, head_dim, ffn, max(context, rows), tied=tied, quantization=quantization, groupsize=128 if quantization == "int4" else None)
    model = empty_model(config, device, dtype, f"--shape {shape}")
    for norm in (m for m in model.modules() if isinstance(m, RMSNorm)):
        norm.weight.fill_(1)
    torch.nn.init.normal_(model.embed.weight, std=dim ** -0.5)
    for name, linear in ((n, m) for n, m in model.named_modules() if isinstance(m, Linear)):
        idle = name.startswith("layers.") and int(name.split(".")[1]) >= first_idle and name.endswith(("wo", "w2"))
        std = 0 if idle else dim ** -0.5
        if linear.scale is None:
            torch.nn.init.normal_(linear.weight, std=std)
        else:  # every value is as likely: those of int8 have a standard deviation of 74, those of int4 one of 4.6 and a mean of -1/2
            linear.weight.random_(-128, 128) if linear.zero is None else linear.weight.random_(0, 256)
            linear.scale.fill_(std / 74 if linear.zero is None else std / 4.6)
            if linear.zero is not None:
                linear.zero.copy_(linear.scale / 2)
    return model


class SpoiltDecoder(Decoder):
    """Replaces drafted tokens by wrong ones with probability 1 - acceptance."""

    acceptance = 1.0

    def _propose(self, token, pos, u):
        hidden, token, probs = super()._propose(token, pos, u)
        spoilt = (token + 1) % self.model.config.vocab_size
        return hidden, torch.where(torch.rand((), device=token.device) < self.acceptance, token, spoilt), probs


def read_bandwidth(device):
    """Bytes per second that this machine reads from memory: the median of sums over 512 MB (8 GB on a GPU), far beyond any cache."""
    x = torch.ones(2**27 if torch.device(device).type == "cpu" else 2**31, device=device)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times)


def bars(probs, width=40):
    return "\n".join(f"  {i} {'█' * round(p * width)} {p:.1%}" for i, p in enumerate(probs))


def by_position(counts):
    """Share of rounds that accepted draft i, of those that accepted all before it, from accept counts."""
    return [sum(counts[i + 1:]) / reached if (reached := sum(counts[i:])) else 0.0 for i in range(len(counts) - 1)]


def label(row):
    return f"self-speculative E={row['exit_layer']} K={row['k']}" if row["k"] else "plain"


def text_of(tokenizer, prompt, ids, eos_ids):
    """The text of new ids up to the first of eos_ids, as it stands after the prompt."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return tokenizer.decode(prompt + ids[:end])[len(tokenizer.decode(prompt)):]


def few_exits(layers):
    return sorted({max(1, layers // 8), max(1, layers // 4)})


def pass_times(model, rows, compile, repeats=9):
    """Median seconds of one full pass over M = 1..rows rows at position 128, with the head on each."""
    model.setup_caches(128 + rows)
    step = torch.compile(lambda x, pos: model.logits(model(x, pos)), fullgraph=True, dynamic=False) if compile else lambda x, pos: model.logits(model(x, pos))
    times, device = [], model.embed.weight.device
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)  # each number of rows is compiled for itself
    for m in range(1, rows + 1):
        x, pos = torch.zeros(1, m, dtype=torch.long, device=device), torch.arange(128, 128 + m, device=device)
        samples, run = [], lambda: step(x, pos)
        out = run()
        if device.type == "cuda" and compile:  # as decoding does, without the time it takes to launch kernel by kernel
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run()
            run = graph.replay
        for _ in range(repeats + 3):
            began = time.perf_counter()
            run()
            out[0, 0, 0].item()
            samples.append(time.perf_counter() - began)
        times.append(statistics.median(samples[3:]))
    return times


def parse_args(argv=None):
    p = tasks.parser(__doc__, [2, 4], "an eighth and a quarter of the layers")
    p.add_argument("--repeats", type=int, default=3, help="timed passes over the prompts")
    p.add_argument("--pass_rows", type=int, default=8, help="time one full pass over 1 to this many rows")
    p.add_argument("--score", action="store_true", help="also say how close the texts come to the task's references (needs scripts/requirements.txt)")
    p.add_argument("--plain_kernels", action="store_true", help="leave this engine's kernels out, plain decoding's too: PyTorch's own instead")
    p.add_argument("--json", metavar="FILE", default="-", help="write everything measured as one line of JSON; - means the last line of the output")
    p.add_argument("--out", metavar="FILE", help="also keep every decoded text in FILE.jsonl, from where an interrupted run goes on, and the table in FILE.csv")
    g = p.add_argument_group("random weights of a known shape")
    g.add_argument("--shape", choices=SHAPES, help="instead of a checkpoint and a task")
    g.add_argument("--quantization", choices=["int8", "int4"], help="of the weights (a checkpoint says it itself)")
    g.add_argument("--acceptance", type=float, default=0.8, help="chance that a drafted token is right")
    g.add_argument("--prompt_tokens", type=int, default=128, help="length of the random prompts")
    args = p.parse_args(argv)
    for option, path in (("--json", args.json != "-" and args.json), ("--out", args.out and f"{args.out}.jsonl")):
        if path:
            check_writable(option, path)
    for name in ("repeats", "prompt_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if args.quantization and not args.shape:
        raise InputError("--quantization: is for --shape; quantize.py makes a quantized checkpoint")
    if args.shape and args.temperature:
        raise InputError("--temperature: --shape is greedy, since drafts can be spoilt to a wanted acceptance only there")
    if args.score and args.shape:
        raise InputError("--score: random weights write nothing worth comparing; name a checkpoint")
    if args.score:
        tasks.score(["a"], ["a"])  # if a package is missing, that shows now
    if not 0 <= args.acceptance <= 1:
        raise InputError(f"--acceptance {args.acceptance}: must be between 0 and 1")
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    sampling = tasks.check(args)
    torch.manual_seed(args.seed)
    kernels.enabled = not args.plain_kernels
    if args.shape:
        vocab, layers = SHAPES[args.shape][0], SHAPES[args.shape][2]
        args.early_exit = args.early_exit or few_exits(layers)
        precision = args.precision or ("bfloat16" if args.device.startswith("cuda") else "float32")
        model = random_model(args.shape, args.quantization, min(args.early_exit), args.prompt_tokens + args.max_new_tokens, args.device, getattr(torch, precision))
        prompts = torch.randint(vocab, (args.num_prompts, args.prompt_tokens)).tolist()
        name, decoder_class = f"{args.shape} shape with random weights and synthetic acceptance {args.acceptance}", SpoiltDecoder
        SpoiltDecoder.acceptance = args.acceptance
    else:
        model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
        args.early_exit = args.early_exit or few_exits(model.config.n_layer)
        examples, prompts = tasks.load_prompts(args, model, tokenizer)
        if args.score and any(example.reference is None for example in examples):
            raise InputError(f"--score: --task {args.task} has prompts without a reference")
        name, decoder_class = str(args.checkpoint_path), Decoder
    settings = [None] + [(e, k) for e in args.early_exit for k in args.speculate_k]
    bandwidth = read_bandwidth(args.device)
    times = pass_times(model, args.pass_rows, args.compile) if args.pass_rows else []
    rows = max(map(len, prompts)) + args.max_new_tokens
    results = tasks.Results(args.out, tasks.measured_with(args, "json", "out", "pass_rows", "score"))
    done = {(row["repeat"], row["prompt"]) for row in results.rows}
    todo = [(repeat, i) for repeat in range(args.repeats) for i in range(len(prompts)) if (repeat, i) not in done]
    decoders, compile_seconds = [], []
    for setting in settings:
        how = dict(exit_layer=setting[0], k=setting[1], draft_head=args.draft_head) if setting else {}
        decoders.append(decoder_class(model, sampling=sampling, rows=rows, compile=args.compile, seed=args.seed, **how))
    for decoder in tqdm(decoders, desc="compiling", disable=None):
        began = time.perf_counter()
        for _ in decoder.generate(prompts[0], 3 * (decoder.K + 1)):
            pass
        compile_seconds.append(time.perf_counter() - began)
    for repeat, i in tqdm(todo, desc="decoding", unit="prompt", disable=None):
        decoded = []
        for decoder in decoders:
            tokens, s = list(decoder.generate(prompts[i], args.max_new_tokens)), decoder.stats
            decoded.append(dict(tokens=tokens, accept_counts=s.accept_counts, prefill_seconds=s.prefill_seconds, decode_seconds=s.decode_seconds))
        results.add(dict(repeat=repeat, prompt=i, decoded=decoded))

    def seconds(i):
        """Of the decoder number i: (prompts, repeats)."""
        return [[row["decoded"][i]["decode_seconds"] for row in results.rows if row["prompt"] == prompt] for prompt in range(len(prompts))]

    table, plain_texts = [], [row["decoded"][0]["tokens"] for row in results.rows]
    for i, (setting, decoder) in enumerate(zip(settings, decoders)):
        runs = [row["decoded"][i] for row in results.rows]
        counts = [sum(c) for c in zip(*(run["accept_counts"] for run in runs))]
        probs, mean = acceptance(counts)
        speedup, low, high = tasks.compare(seconds(0), seconds(i))
        rate = len(prompts) * (args.max_new_tokens - 1) / tasks.typical(seconds(i))  # the first token is the prefill's
        used = decoder.bytes_per_round() * sum(counts) / args.repeats / tasks.typical(seconds(i))
        table.append(dict(
            exit_layer=setting and setting[0], k=decoder.K, tokens_per_second=rate, ms_per_token=1e3 / rate,
            speedup=speedup, speedup_low=low, speedup_high=high, ideal_speedup=decoder.ideal_speedup(mean),
            mean_accepted=mean, acceptance_probs=probs, acceptance_by_position=by_position(counts),
            bandwidth_gb_per_s=used / 1e9, bandwidth_share=used / bandwidth, prefill_seconds=statistics.median(run["prefill_seconds"] for run in runs),
            compile_seconds=compile_seconds[i], same_text=[run["tokens"] for run in runs] == plain_texts))
        if args.score:  # a text ends at the first EOS, which decoding went beyond
            texts = [text_of(tokenizer, prompts[row["prompt"]], row["decoded"][i]["tokens"], model.config.eos_ids) for row in results.rows]
            table[-1] |= tasks.score(texts, [examples[row["prompt"]].reference for row in results.rows])
    if args.out:
        tasks.write_csv(f"{args.out}.csv", table)
    print(f"\n{name}, {model.config.quantization or str(model.embed.weight.dtype)[6:]} on {args.device}, {'compiled' if args.compile else 'eager'}{', plain kernels' * args.plain_kernels}, "
          f"temperature {args.temperature}, {len(prompts)} prompts x {args.max_new_tokens} new tokens, medians of {args.repeats}")
    print(f"read bandwidth of this machine: {bandwidth / 1e9:.1f} GB/s; one full pass reads {decoders[0].bytes_per_round() / 1e6:.1f} MB of weights")
    if times:
        print("one full pass over M rows: " + ", ".join(f"{m}: {1e3 * t:.2f} ms ({t / times[0]:.2f}x)" for m, t in enumerate(times, 1)))
    print()
    print("decoding                 tokens/s  ms/token  speedup (95% interval)  ideal (reached)  accepted  GB/s (share)")
    for row in table:
        print(f"{label(row):23s} {row['tokens_per_second']:9.1f} {row['ms_per_token']:9.2f}  {row['speedup']:6.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f}) {row['ideal_speedup']:5.2f}x {row['speedup'] / row['ideal_speedup']:7.0%} {row['mean_accepted']:11.2f}  "
              f"{row['bandwidth_gb_per_s']:5.1f} ({row['bandwidth_share']:.0%})")
    best = max(table[1:], key=lambda row: row["speedup"])
    print(f"\ndrafted tokens accepted per round at E={best['exit_layer']} K={best['k']}:\n{bars(best['acceptance_probs'])}")
    print("accepted, of those whose predecessors were, by position: " + ", ".join(f"{share:.0%}" for share in best["acceptance_by_position"]) + "\n")
    if args.score:
        for row in table:
            print(f"{label(row):23s} " + ", ".join(f"{name} {row[name]:.3f}" for name in tasks.SCORES))
        print()
    if args.temperature == 0:
        print("text: " + ("the same, token for token" if all(row["same_text"] for row in table) else "DIFFERS between plain and speculative decoding"))
    if best["speedup"] <= 1:
        print(f"speculation loses here: its best setting reaches {best['speedup']:.2f}x of plain decoding's {table[0]['tokens_per_second']:.1f} tokens/s")
    memory = peak_memory_gb(args.device)
    print(f"prefill {table[0]['prefill_seconds']:.3f} s for a prompt of {statistics.median(map(len, prompts)):.0f} tokens, "
          f"compilation {sum(row['compile_seconds'] for row in table):.1f} s in all, peak memory {memory:.2f} GB")
    line = json.dumps(dict(settings=tasks.settings(args, "json", "out", *(("checkpoint_path", "task") if args.shape else ())), table=table, memory_gb=memory, pass_seconds=times,
                           read_bandwidth_gb_per_s=bandwidth / 1e9, torch=torch.__version__, python=platform.python_version(),
                           threads=torch.get_num_threads(), machine=platform.machine()))
    if args.json == "-":
        print(line)
    elif args.json:
        Path(args.json).write_text(line + "\n")


if __name__ == "__main__":
    run_command(main)
