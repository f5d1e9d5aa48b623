"""Is what self-speculation writes what the model alone would have written? A check on your own checkpoint, task and machine.

Greedy (the default): plain and self-speculative text are compared token for token. Where they part, FILE.jsonl has the position and
how far apart the two tokens' logits are, beside the error that rounding makes in these logits (against the same weights in float32).
In float32 no text may differ; in lower precision only where rounding explains it.

Sampled (--temperature above 0): each token is placed in the cumulative distribution that one pass of the whole model gives for it,
the tokens that the draft favours most coming first. If the text has the model's distribution, these places are uniform between 0
and 1 and independent (Rosenblatt 1952), which a Kolmogorov-Smirnov test judges.

Writes FILE.jsonl and FILE.csv, a row for each exit layer and draft length; an interrupted check goes on where it was. The exit code is 1 if the
check fails.
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tqdm import tqdm

import tasks
from generate import Decoder, load
from checkpoint import load_model
from command import check_writable, run_command

P_VALUE = 1e-3  # a sampled check of the whole grid fails by chance this often


def next_logits(model, ids):
    """Logits (V,) float32 of what follows the ids, by one pass without caches' help."""
    device = model.embed.weight.device
    return model.logits(model(torch.tensor([ids], device=device))[0, -1]).float()


def difference(model, reference, prompt, plain, speculative):
    """Where two texts that follow the prompt, ids all, part: {position, plain, speculative, gap, rounding}; None if they don't.

    gap: how far apart reference's logits of the two tokens are. rounding: the largest error of model's logits there, by reference.
    reference: function () -> the same model in float32; called only where texts part.
    """
    at = next((i for i, (a, b) in enumerate(zip(plain, speculative)) if a != b), None)
    if at is None:
        return None
    exact, rounded = (next_logits(m, prompt + plain[:at]) for m in (reference(), model))
    return dict(position=at, plain=plain[at], speculative=speculative[at], gap=(exact[plain[at]] - exact[speculative[at]]).abs().item(),
                rounding=(exact - rounded).abs().max().item())


def explained(d):
    """Whether two ways of computing the logits, each with an error up to `rounding`, could choose differently."""
    return d["gap"] <= 2 * d["rounding"]


def compare(decoder, reference, prompts, texts):
    """A row of the greedy check: decode every prompt and compare with texts, what plain decoding wrote."""
    found, tokens = [], 0
    for number, (prompt, text) in enumerate(zip(prompts, texts)):
        d = difference(decoder.model, reference, prompt, text, list(decoder.generate(prompt, len(text))))
        tokens += len(text) if d is None else d["position"] + 1
        if d is not None:
            found.append(dict(prompt=number, **d))
    return dict(exit_layer=decoder.exit_layer, k=decoder.K, texts=len(prompts), tokens=tokens, different=len(found),
                unexplained=sum(not explained(d) for d in found), differences=found)


def places(decoder, prompt, text, generator):
    """The place (len(text),) in [0, 1), float64, of each token of a text in the distribution that the model gives for it."""
    model, sampling, e = decoder.model, decoder.sampling, decoder.exit_layer
    device = model.embed.weight.device
    hidden = model(torch.tensor([prompt + text[:-1]], device=device), None, 0, e)
    draft = sampling.distribution(decoder.draft_logits(hidden[0, len(prompt) - 1:])).double()  # (T, V)
    target = sampling.distribution(model.logits(model(hidden, None, e)[0, len(prompt) - 1:])).double()
    order = (draft / target.clamp(min=1e-300)).argsort(dim=-1, descending=True)
    ranked = target.gather(1, order)
    chosen = (order == torch.tensor(text, device=device)[:, None]).double()
    before = ((ranked.cumsum(1) - ranked) * chosen).sum(1)
    u = torch.rand(len(text), dtype=torch.float64, generator=generator)
    return (before + u.to(device) * (ranked * chosen).sum(1)) / ranked.sum(1)


def sample(decoder, prompts, tokens, seed):
    """A row of the sampled check."""
    from scipy.stats import kstest
    generator = torch.Generator().manual_seed(seed)
    found = [places(decoder, prompt, list(decoder.generate(prompt, tokens)), generator) for prompt in prompts]
    test = kstest(torch.cat(found).cpu().numpy(), "uniform")
    return dict(exit_layer=decoder.exit_layer, k=decoder.K, texts=len(prompts), tokens=sum(map(len, found)), statistic=float(test.statistic), p_value=float(test.pvalue))


def parse_args(argv=None):
    p = tasks.parser(__doc__, [1, 2, 4, 6], num_prompts=16)
    p.add_argument("--out", default="correctness", metavar="FILE", help="where to write, without suffix")
    args = p.parse_args(argv)
    check_writable("--out", f"{args.out}.jsonl")
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    sampling = tasks.check(args)
    model, tokenizer = load(args.checkpoint_path, args.device, args.precision)
    (exits, ks), precision = tasks.grid(args, model.config.n_layer), str(model.embed.weight.dtype)[6:]
    _, prompts = tasks.load_prompts(args, model, tokenizer)
    rows = max(map(len, prompts)) + args.max_new_tokens

    def build(**how):
        return Decoder(model, sampling=sampling, rows=rows, compile=args.compile, seed=args.seed, draft_head=args.draft_head, **how)

    build(exit_layer=exits[0], k=ks[-1]), build(exit_layer=exits[-1], k=ks[0])  # the largest caches first; and what is out of range shows now

    @functools.cache
    def reference():
        return model if precision == "float32" else load_model(args.checkpoint_path, args.device, torch.float32)

    results = tasks.Results(args.out, tasks.measured_with(args, "early_exit", "speculate_k", "out"))
    known = {(r["exit_layer"], r["k"]) for r in results.rows}
    cells = [(e, k) for e in exits for k in ks if (e, k) not in known]
    texts = []
    if sampling.temperature == 0 and cells:
        plain = build()
        texts = [list(plain.generate(prompt, args.max_new_tokens)) for prompt in tqdm(prompts, desc="plain", disable=None)]
    for e, k in tqdm(cells, desc="self-speculative", disable=None):
        decoder = build(exit_layer=e, k=k)
        results.add(sample(decoder, prompts, args.max_new_tokens, args.seed) if sampling.temperature else compare(decoder, reference, prompts, texts))
    tasks.write_csv(f"{args.out}.csv", [{k: v for k, v in row.items() if k != "differences"} for row in results.rows])

    found = sorted(results.rows, key=lambda r: (r["exit_layer"], r["k"]))
    total = sum(r["tokens"] for r in found)
    print(f"\n{args.checkpoint_path}, {model.config.quantization or precision} on {args.device}, temperature {args.temperature}: {len(found)} settings, {total} tokens")
    if sampling.temperature:
        print(" E  K  tokens  statistic  p")
        for r in found:
            print(f"{r['exit_layer']:2d} {r['k']:2d} {r['tokens']:7d} {r['statistic']:10.4f}  {r['p_value']:.3g}")
        least = min(r["p_value"] for r in found)
        print(f"smallest p of {len(found)}: {least:.3g}; the check fails below {P_VALUE / len(found):.2g}")
        if least < P_VALUE / len(found):
            sys.exit("the sampled text does NOT have the model's distribution")
        return
    print(" E  K  tokens  texts that differ")
    for r in found:
        print(f"{r['exit_layer']:2d} {r['k']:2d} {r['tokens']:7d}  {r['different']} of {r['texts']}")
        for d in r["differences"]:
            print(f"       prompt {d['prompt']}, token {d['position']}: {d['plain']} against {d['speculative']}, logits {d['gap']:.2g} apart, rounding errors up to {d['rounding']:.2g}")
    unexplained = sum(r["unexplained"] for r in found)
    different = sum(r["different"] for r in found)
    print(f"{different} differences" + (f", {unexplained} of them not explained by rounding" if different else ""))
    if unexplained or different and precision == "float32":
        sys.exit("self-speculative text is NOT what plain decoding writes")


if __name__ == "__main__":
    run_command(main)
