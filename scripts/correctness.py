"""Is what self-speculation writes what the model alone would have written? A check on your own checkpoint, task and
machine.

Greedy (the default): plain and self-speculative text are compared token for token. Where they differ first, FILE.jsonl
has the position and how far apart the two tokens' logits are, beside the error that rounding makes in these logits
(against the same weights in float32). In float32 no text may differ; in lower precision, only where rounding explains
it.

Sampled (--temperature above 0): one pass of the whole model gives the distribution of each token. Each token is placed
in its cumulative distribution, those that the draft favours most coming first. If the text has the model's
distribution, these places are uniform between 0 and 1 and independent (Rosenblatt 1952), which a Kolmogorov-Smirnov
test judges.

Writes FILE.jsonl and FILE.csv, a row for each exit layer and draft length. An interrupted check goes on where it was.
The exit code is 1 if the check fails.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from tqdm import tqdm

import tasks
from checkpoint import load_model
from command import check_writable, run_command
from generate import Decoder, load
from model import Transformer
from tune import Cell

P_VALUE = 1e-3  # a sampled check of the whole grid fails by chance this often


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = tasks.parser(__doc__, [1, 2, 4, 6], num_prompts=16)
    p.add_argument("--out", default="correctness", metavar="FILE", help="where to write, without suffix")
    args = p.parse_args(argv)
    check_writable("--out", f"{args.out}.jsonl")
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tasks.check(args)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    exits, ks = tasks.grid(args, model.config.n_layer)
    _, prompts = tasks.load_prompts(args, model, tokenizer)
    rows = max(map(len, prompts)) + args.max_new_tokens
    tasks.make_decoder(args, model, rows, exits[0], ks[-1])  # the largest caches first: all decoders use them
    tasks.make_decoder(args, model, rows, exits[-1], ks[0])  # with the one above: what is out of range shows now
    results = tasks.Results(args.out, tasks.measured_with(args, "early_exit", "speculate_k", "out"))
    known = {(row["exit_layer"], row["k"]) for row in results.rows}
    cells = [cell for cell in itertools.product(exits, ks) if cell not in known]
    if cells and args.temperature > 0:
        check_sampled(args, model, rows, prompts, cells, results)
    elif cells:
        check_greedy(args, model, rows, prompts, cells, results)
    write_csv(args, results.rows)
    report(args, model, results.rows)


def write_csv(args: argparse.Namespace, rows: list[tasks.Row]) -> None:
    """The rows without the list of differences, which a table has no place for."""
    table = []
    for row in rows:
        table.append({name: value for name, value in row.items() if name != "differences"})
    tasks.write_csv(f"{args.out}.csv", table)


# The greedy check: token for token.


def check_greedy(
    args: argparse.Namespace,
    model: Transformer,
    rows: int,
    prompts: list[list[int]],
    cells: list[Cell],
    results: tasks.Results,
) -> None:
    """Add a row for each cell. rows: positions that every decoder has."""

    @functools.cache
    def reference() -> Transformer:  # loaded only if texts differ
        if model.embed.weight.dtype == torch.float32:
            return model
        return load_model(args.checkpoint_path, args.device, torch.float32)

    plain = tasks.make_decoder(args, model, rows)
    texts = []
    for prompt in tqdm(prompts, desc="plain", disable=None):
        texts.append(list(plain.generate(prompt, args.max_new_tokens)))
    for e, k in tqdm(cells, desc="self-speculative", disable=None):
        decoder = tasks.make_decoder(args, model, rows, e, k)
        results.add(compare(decoder, reference, prompts, texts))


def compare(
    decoder: Decoder, reference: Callable[[], Transformer], prompts: list[list[int]], texts: list[list[int]]
) -> tasks.Row:
    """A row of the greedy check: decode every prompt and compare with texts, what plain decoding wrote."""
    found: list[tasks.Row] = []
    tokens = unexplained = 0
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        written = list(decoder.generate(prompt, len(text)))
        d = difference(decoder.model, reference, prompt, text, written)
        if d is None:
            tokens += len(text)
            continue
        tokens += d["position"] + 1
        unexplained += not explained(d)
        found.append(dict(prompt=number, **d))
    return dict(
        exit_layer=decoder.exit_layer,
        k=decoder.K,
        texts=len(prompts),
        tokens=tokens,
        different=len(found),
        unexplained=unexplained,
        differences=found,
    )


def difference(
    model: Transformer,
    reference: Callable[[], Transformer],
    prompt: list[int],
    plain: list[int],
    speculative: list[int],
) -> tasks.Row | None:
    """Where two texts that follow the prompt, ids all, differ first; None if they don't.

    Returns {position, plain, speculative, gap, rounding}. gap: how far apart reference's logits of the two tokens are.
    rounding: the largest error of model's logits there, by reference. reference: gives the same model in float32;
    called only where texts differ.
    """
    pairs = enumerate(zip(plain, speculative, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return None
    exact = next_logits(reference(), prompt + plain[:at])
    rounded = next_logits(model, prompt + plain[:at])
    return dict(
        position=at,
        plain=plain[at],
        speculative=speculative[at],
        gap=(exact[plain[at]] - exact[speculative[at]]).abs().item(),
        rounding=(exact - rounded).abs().max().item(),
    )


def next_logits(model: Transformer, ids: list[int]) -> Tensor:
    """Logits (V,) float32 of what follows the ids, by one pass without caches' help."""
    device = model.embed.weight.device
    return model.logits(model(torch.tensor([ids], device=device))[0, -1]).float()


def explained(d: tasks.Row) -> bool:
    """Whether two ways of computing the logits, each with an error up to `rounding`, could choose differently."""
    return d["gap"] <= 2 * d["rounding"]


# The sampled check: the distribution.


def check_sampled(
    args: argparse.Namespace,
    model: Transformer,
    rows: int,
    prompts: list[list[int]],
    cells: list[Cell],
    results: tasks.Results,
) -> None:
    """Add a row for each cell. rows: positions that every decoder has."""
    for e, k in tqdm(cells, desc="self-speculative", disable=None):
        decoder = tasks.make_decoder(args, model, rows, e, k)
        results.add(sample(decoder, prompts, args.max_new_tokens, args.seed))


def sample(decoder: Decoder, prompts: list[list[int]], tokens: int, seed: int) -> tasks.Row:
    """A row of the sampled check."""
    from scipy.stats import kstest

    generator = torch.Generator().manual_seed(seed)
    found = []
    for prompt in prompts:
        text = list(decoder.generate(prompt, tokens))
        found.append(places(decoder, prompt, text, generator))
    u = torch.cat(found).cpu().numpy()
    test = kstest(u, "uniform")
    return dict(
        exit_layer=decoder.exit_layer,
        k=decoder.K,
        texts=len(prompts),
        tokens=len(u),
        statistic=float(test.statistic),
        p_value=float(test.pvalue),
    )


def places(decoder: Decoder, prompt: list[int], text: list[int], generator: torch.Generator) -> Tensor:
    """The place (T,) in [0, 1), float64, of each token of a text in the distribution that the model gives for it.

    A token's place is drawn from its own part of the cumulative distribution.
    """
    model, sampling, e = decoder.model, decoder.sampling, decoder.exit_layer
    drafter: Any = decoder.drafter  # a SelfDrafter
    device = model.embed.weight.device
    start = len(prompt) - 1  # its hidden state gives the text's first token
    hidden = model(torch.tensor([prompt + text[:-1]], device=device), None, 0, e)
    draft = sampling.distribution(drafter.logits(hidden[0, start:])).double()  # (T, V)
    target = sampling.distribution(model.logits(model(hidden, None, e)[0, start:])).double()  # (T, V)
    order = (draft / target.clamp(min=1e-300)).argsort(dim=-1, descending=True)
    ranked = target.gather(1, order)
    chosen = (order == torch.tensor(text, device=device)[:, None]).double()  # (T, V), one 1 in each row
    before = ((ranked.cumsum(1) - ranked) * chosen).sum(1)
    own = (ranked * chosen).sum(1)
    u = torch.rand(len(text), dtype=torch.float64, generator=generator).to(device)
    return (before + u * own) / ranked.sum(1)


# The report.


def report(args: argparse.Namespace, model: Transformer, results: list[tasks.Row]) -> None:
    """Print what was found, and exit with code 1 if the check failed."""
    rows = sorted(results, key=itemgetter("exit_layer", "k"))
    tokens = sum(map(itemgetter("tokens"), rows))
    print(
        f"\n{args.checkpoint_path}, {tasks.weights_kind(model)} on {args.device}, "
        f"temperature {args.temperature}: {len(rows)} settings, {tokens} tokens"
    )
    if args.temperature > 0:
        report_sampled(rows)
    else:
        report_greedy(rows, exact=model.embed.weight.dtype == torch.float32)


def report_greedy(rows: list[tasks.Row], exact: bool) -> None:
    """exact: the model is in float32, where no text may differ."""
    print(" E  K  tokens  texts that differ")
    for r in rows:
        print(f"{r['exit_layer']:2d} {r['k']:2d} {r['tokens']:7d}  {r['different']} of {r['texts']}")
        for d in r["differences"]:
            print(
                f"       prompt {d['prompt']}, token {d['position']}: {d['plain']} against {d['speculative']}, "
                f"logits {d['gap']:.2g} apart, rounding errors up to {d['rounding']:.2g}"
            )
    different = sum(map(itemgetter("different"), rows))
    unexplained = sum(map(itemgetter("unexplained"), rows))
    verdict = f"{different} differences"
    if different:
        verdict += f", {unexplained} of them not explained by rounding"
    print(verdict)
    if unexplained or (different and exact):
        sys.exit("self-speculative text is NOT what plain decoding writes")


def report_sampled(rows: list[tasks.Row]) -> None:
    print(" E  K  tokens  statistic  p")
    for r in rows:
        print(f"{r['exit_layer']:2d} {r['k']:2d} {r['tokens']:7d} {r['statistic']:10.4f}  {r['p_value']:.3g}")
    least = min(map(itemgetter("p_value"), rows))
    limit = P_VALUE / len(rows)  # Bonferroni: of so many tests, one is below it by chance with probability P_VALUE
    print(f"smallest p of {len(rows)}: {least:.3g}; the check fails below {limit:.2g}")
    if least < limit:
        sys.exit("the sampled text does NOT have the model's distribution")


if __name__ == "__main__":
    run_command(main)
