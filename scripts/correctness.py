"""Is what speculation writes what the model alone would have written? A check on your own checkpoint, task and machine.

Drafts come from the model's own layers, with --draft_precision from copies of them, with --draft from n-grams too.

Greedy (the default): plain and speculative text are compared token for token. Where they differ first, FILE.jsonl
has the position and how far apart the two tokens' logits are, beside the error that rounding makes in these logits
(against the same weights in float32). In float32 no text may differ; in lower precision, only where rounding explains
it.

Sampled (--temperature above 0): one pass of the whole model gives the distribution of each token. Each token is placed
in its cumulative distribution, those that the draft favours most coming first; with n-grams, whose drafts are not
kept, the least likely ones, as wrong drafts are. If the text has the model's distribution, these places are uniform
between 0 and 1 and independent (Rosenblatt 1952), which a Kolmogorov-Smirnov test judges.

Writes FILE.jsonl and FILE.csv, a row for each way to draft. An interrupted check goes on where it was.
The exit code is 1 if the check fails.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import argparse
import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tasks
from checkpoint import load_model
from command import run_command
from generate import Decoder, load
from model import Transformer
from values import OBJECT, TEXT, filled, list_of, real, whole

P_VALUE = 1e-3  # a sampled check of the whole grid fails by chance this often

GREEDY = {  # the columns of FILE.jsonl
    "decoding": TEXT,
    **dict.fromkeys(("texts", "tokens", "different", "unexplained"), whole()),
    "differences": list_of(OBJECT),
}
SAMPLED = {"decoding": TEXT, "texts": whole(), "tokens": whole(), "statistic": real(0, 1), "p_value": real(0, 1)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = tasks.parser(__doc__, [1, 2, 4, 6], num_prompts=16)
    tasks.add_ngram_options(p)
    p.add_argument("--out", type=filled, default="correctness", metavar="FILE", help="where to write, without suffix")
    args = p.parse_args(argv)
    tasks.check_outputs(args, ".jsonl", ".csv")
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tasks.check(args)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    _, prompts = tasks.load_prompts(args, model, tokenizer)
    rows = max(map(len, prompts)) + args.max_new_tokens
    build = functools.partial(tasks.make_decoder, args, model, rows)
    ways = {}
    for way in tasks.ways(args, model.config.n_layer):  # what is out of range shows now; all use the largest caches
        ways[tasks.describe(build(**way))] = functools.partial(build, **way)
    without = ("early_exit", "speculate_k", "draft_precision", "draft", "ngram_k", "out")
    results = tasks.Results(args.out, tasks.measured_with(args, *without), SAMPLED if args.temperature > 0 else GREEDY)
    known = results.by("decoding")
    missing = [way for name, way in ways.items() if name not in known]
    if missing and args.temperature > 0:
        check_sampled(args, prompts, missing, results)
    elif missing:
        check_greedy(args, build(), prompts, missing, results)
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
    plain: Decoder,
    prompts: list[list[int]],
    ways: Sequence[Callable[[], Decoder]],
    results: tasks.Results,
) -> None:
    """Add a row for each decoder that one of the ways makes."""

    @functools.cache
    def reference() -> Transformer:  # loaded only if texts differ
        if plain.model.embed.weight.dtype == torch.float32:
            return plain.model
        return load_model(args.checkpoint_path, args.device, torch.float32)

    texts = []
    for prompt in tqdm(prompts, desc="plain", disable=None):
        texts.append(list(plain.generate(prompt, args.max_new_tokens)))
    for way in tqdm(ways, desc="speculative", disable=None):
        results.add(compare(way(), reference, prompts, texts))


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
        decoding=tasks.describe(decoder),
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
    args: argparse.Namespace, prompts: list[list[int]], ways: Sequence[Callable[[], Decoder]], results: tasks.Results
) -> None:
    """Add a row for each decoder that one of the ways makes."""
    for way in tqdm(ways, desc="speculative", disable=None):
        results.add(sample(way(), prompts, args.max_new_tokens, args.seed))


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
        decoding=tasks.describe(decoder),
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
    model, sampling = decoder.model, decoder.sampling
    drafter: Any = decoder.drafter  # a SelfDrafter, or one of n-grams
    device = model.embed.weight.device
    start = len(prompt) - 1  # its hidden state gives the text's first token
    ids = torch.tensor([prompt + text[:-1]], device=device)
    target = sampling.distribution(model.logits(model(ids)[0, start:])).double()  # (T, V)
    draft = torch.ones_like(target)
    if not drafter.reads_text:
        hidden = model.run(drafter.layers, model.embed(ids), None)
        draft = sampling.distribution(drafter.logits(hidden[0, start:])).double()  # (T, V)
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
    tokens = sum(map(itemgetter("tokens"), results))
    print(
        f"\n{args.checkpoint_path}, {tasks.weights_kind(model)} on {args.device}, "
        f"temperature {args.temperature}: {len(results)} settings, {tokens} tokens"
    )
    if args.temperature > 0:
        report_sampled(results)
    else:
        report_greedy(results, exact=model.embed.weight.dtype == torch.float32)


def report_greedy(rows: list[tasks.Row], exact: bool) -> None:
    """exact: the model is in float32, where no text may differ."""
    print(f"{'decoding':32s}  tokens  texts that differ")
    for r in rows:
        print(f"{r['decoding']:32s} {r['tokens']:7d}  {r['different']} of {r['texts']}")
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
        sys.exit("speculative text is NOT what plain decoding writes")


def report_sampled(rows: list[tasks.Row]) -> None:
    print(f"{'decoding':32s}  tokens  statistic  p")
    for r in rows:
        print(f"{r['decoding']:32s} {r['tokens']:7d} {r['statistic']:10.4f}  {r['p_value']:.3g}")
    least = min(map(itemgetter("p_value"), rows))
    limit = P_VALUE / len(rows)  # Bonferroni: of so many tests, one is below it by chance with probability P_VALUE
    print(f"smallest p of {len(rows)}: {least:.3g}; the check fails below {limit:.2g}")
    if least < limit:
        sys.exit("the sampled text does NOT have the model's distribution")


if __name__ == "__main__":
    run_command(main)
