"""How good is a checkpoint, at the end and at every exit?

--tasks: tasks of EleutherAI's lm-evaluation-harness with this engine as the model: log-likelihoods of the whole model, or of
--exit_layer; texts decoded plainly, or with --self_speculative. Writes FILE.json (the harness's results), FILE.jsonl and FILE.csv
(a row per metric). Answers are kept as they come (of rolling log-likelihoods, all at the end): an interrupted evaluation goes on where it was.

--text: loss, perplexity and agreement with the last layer of every exit on any text file, as FILE.text.csv and a plot, FILE.text.png. With
--reference, the agreement is with the last layer of that checkpoint: of a quantized one with what it was made from, say.
"""
import argparse
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import tasks
from generate import CHECKPOINTS, Decoder, Sampling, load
from command import InputError, check_writable, run_command
from train import LayerSkipLoss, evaluate

def plot(path, rows, title):
    """Perplexity and agreement over the exit layer, as a PNG."""
    plt = tasks.pyplot()
    layers = [row["exit_layer"] for row in rows]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lines = axis.plot(layers, [row["perplexity"] for row in rows], "o-", color="tab:blue", label="perplexity (left)")
    axis.set(title=title, xlabel="exit layer", ylabel="perplexity", yscale="log")
    other = axis.twinx()
    lines += other.plot(layers, [100 * row["agreement"] for row in rows], "s--", color="tab:orange", label="agreement, % (right)")
    other.set_ylim(0, 102)
    axis.legend(handles=lines, loc="center right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_text(args, model, tokenizer):
    """Loss, perplexity and agreement of every exit on --text: rows of the table."""
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {args.text}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    ids, context = torch.tensor(tokenizer.encode(text)), min(args.window, model.config.context)
    if len(ids) <= context:
        raise InputError(f"--text {args.text}: has {len(ids)} tokens; more than the window of {context} are needed, see --window")
    reference = None
    if args.reference:
        reference, other = load(args.reference, args.device, args.precision)
        if not tokenizer.same_as(other):
            raise InputError(f"--reference {args.reference}: has another tokenizer than {args.checkpoint_path}, so their tokens can't be compared")
    model.drop_caches()
    losses, agreement, count = evaluate(LayerSkipLoss(model), ids, context, args.batch_size, args.max_tokens, nullcontext(), model.embed.weight.device, reference)
    per_byte = (len(ids) - 1) / len(text.encode()) / math.log(2)
    return count, [dict(exit_layer=i, loss=loss, perplexity=math.exp(loss), bits_per_byte=loss * per_byte, agreement=share)
                   for i, (loss, share) in enumerate(zip(losses.tolist(), agreement.tolist()), 1)]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint_path", type=Path, default=CHECKPOINTS / "demo" / "model.pth", help="default: the demo checkpoint")
    add("--out", default="eval", metavar="FILE", help="where to write, without suffix (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="texts to score at once (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--precision", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on CUDA, float32 on the CPU")
    g = p.add_argument_group("tasks of the harness")
    g.add_argument("--tasks", nargs="+", metavar="NAME", default=[], help="such as hellaswag arc_easy humaneval")
    g.add_argument("--include_path", type=Path, metavar="DIR", help="folder with task descriptions (YAML) of your own")
    g.add_argument("--num_fewshot", type=int, help="solved examples before each question (default: the task's)")
    g.add_argument("--limit", type=int, help="use the first examples of each task only, to try things out")
    g.add_argument("--exit_layer", type=int, help="log-likelihoods of this layer's exit (default: the last layer)")
    g.add_argument("--self_speculative", action="store_true", help="decode texts with self-speculation: the same distribution")
    g.add_argument("--early_exit", type=int, help="layers to draft with (default: a quarter)")
    g.add_argument("--speculate_k", type=int, default=4, help="tokens to draft per round (default: %(default)s)")
    g.add_argument("--compile", action="store_true", help="compile decoding")
    g.add_argument("--max_gen_toks", type=int, help="most tokens of a generated text (default: the task's)")
    g.add_argument("--run_code", action="store_true", help="let the harness run code that the model wrote, as humaneval and mbpp do: UNSAFE outside a sandbox")
    g.add_argument("--log_samples", action="store_true", help="keep every question and answer in FILE.json")
    g = p.add_argument_group("a text")
    g.add_argument("--text", type=Path, metavar="FILE", help="loss, perplexity and agreement per exit on this text")
    g.add_argument("--window", type=int, default=512, help="tokens that are scored together (default: %(default)s, at most the context)")
    g.add_argument("--max_tokens", type=int, default=10 ** 9, help="of the text, windows evenly spread (default: all)")
    g.add_argument("--reference", type=Path, metavar="CHECKPOINT", help="model.pth whose last layer's choices the agreement is with")
    args = p.parse_args(argv)
    if not args.tasks and not args.text:
        raise InputError("nothing to do: give --tasks, --text or both")
    if args.early_exit is not None and not args.self_speculative:
        raise InputError("--early_exit is for --self_speculative: give both; --exit_layer is for log-likelihoods")
    for name in ("batch_size", "window", "max_tokens", "limit", "max_gen_toks"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: must be 1 or more")
    tasks.check_machine(args.device)
    check_writable("--out", f"{args.out}.jsonl")
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    if args.exit_layer is not None and not 1 <= args.exit_layer <= model.config.n_layer:
        raise InputError(f"--exit_layer {args.exit_layer}: the model has layers 1 to {model.config.n_layer}")
    if args.tasks:
        draft = (model.config.default_exit if args.early_exit is None else args.early_exit) if args.self_speculative else None

        def build(sampling, rows):
            return Decoder(model, exit_layer=draft, k=args.speculate_k, sampling=sampling, rows=rows, compile=args.compile, seed=0)

        build(Sampling(), 1)  # what is out of range shows now
        from harness import Engine, run_tasks
        results = run_tasks(args, Engine(model, tokenizer, args.exit_layer, build, args.batch_size))
        Path(f"{args.out}.json").write_text(json.dumps(results, default=str) + "\n")
        rows = [dict(task=task, metric=name, value=value, stderr=error if isinstance(error := values.get(name.replace(",", "_stderr,")), float) else None) for task, values in results["results"].items()
                for name, value in values.items() if isinstance(value, (int, float)) and "_stderr" not in name and name != "sample_len"]
        tasks.write_rows(args.out, rows)
        print(f"\n{args.checkpoint_path}, {'all layers' if args.exit_layer is None else f'exit {args.exit_layer}'}")
        for row in rows:
            error = f" ± {row['stderr']:.4f}" if row["stderr"] is not None else ""
            print(f"{row['task']:30s} {row['metric']:30s} {row['value']:.4f}{error}")
    if args.text:
        count, rows = run_text(args, model, tokenizer)
        tasks.write_rows(f"{args.out}.text", rows)
        plot(f"{args.out}.text.png", rows, f"{args.checkpoint_path.parent.name}/{args.checkpoint_path.name} on {args.text.name}")
        print(f"\n{args.checkpoint_path} on {count} tokens of {args.text}; agreement with the last layer{f' of {args.reference}' if args.reference else ''}")
        print("exit   loss  perplexity  bits/byte  agreement")
        for row in rows:
            print(f"{row['exit_layer']:4d}  {row['loss']:.3f}  {row['perplexity']:10.3f}  {row['bits_per_byte']:9.3f}  {row['agreement']:9.1%}")


if __name__ == "__main__":
    run_command(main)
