"""Which exit layer E and draft length K are fastest for a checkpoint, predicted from little, and the settings kept beside it.

A round costs the same whatever it accepts, and how often drafts are accepted follows from the model's own text: one pass over
it gives what every exit would have drafted at every position. So a few timed rounds and that pass predict every E and K.
`generate.py --early_exit auto --speculate_k auto` and `scripts/sweep.py` use it.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from command import InputError

CALIBRATION_TOKENS, CALIBRATION_K = (
    64,
    6,
)  # of the text that `calibrate` decodes, and the longest draft that it considers


@torch.inference_mode()
def exit_chances(decoder, prompt, text, exits):
    """{exit: chances (len(text) - 1,)} that a token drafted there is accepted, for each token of a text but its first.

    text: what plain decoding wrote after the prompt, ids both. A chance is the overlap sum(min(p, q)) of the draft's and the
    target's distribution, given the text so far (Leviathan et al. 2211.17192, corollary 3.6); at temperature 0 it is 1 or 0,
    whether the draft is the text's own token. decoder: a self-speculative one of any exit, with rows for all of it.
    """
    model, sampling, chances = decoder.model, decoder.sampling, {}
    x, hidden = torch.tensor([prompt + text[:-1]], device=decoder.pos.device), {}
    for i in range(model.config.n_layer):
        x = model(x, None, i, i + 1)
        hidden[i + 1] = x[0, len(prompt) :]  # where the drafts of text[1:] are made
    q = sampling.distribution(model.logits(x[0, len(prompt) :])) if sampling.temperature else None
    for e in exits:
        logits = decoder.draft_logits(hidden[e])
        if q is None:
            chances[e] = (logits.argmax(-1) == torch.tensor(text[1:], device=x.device)).double().tolist()
        else:
            chances[e] = torch.minimum(sampling.distribution(logits), q).sum(-1).clamp(max=1).tolist()
    return chances


def expected_counts(chances, k, tokens):
    """Accept counts (K+1,), as `Stats` has them, to expect of decoding `tokens` tokens whose drafts are accepted with these chances.

    A draft goes on from the text's own tokens as long as it is accepted, so a round accepts a run of positions. Where all
    chances are 1 or 0 this is what decoding counts, if chances go k beyond the tokens, as its last round may.
    """
    starts, counts = [1.0] + [0.0] * (tokens + k), [0.0] * (k + 1)  # starts[i]: chance that a round starts from token i
    for i in range(tokens - 1):
        reached = starts[i]
        for n in range(k + 1):
            further = chances[i + n] if n < k and i + n < len(chances) else 0.0
            counts[n] += reached * (1 - further)
            starts[i + n + 1] += reached * (1 - further)
            reached *= further
    return counts


def round_cost(decoder, plain, prompt, repeats, rounds=12, settling=4):
    """Time of a round after the prompt, in rounds of plain decoding: the median ratio of timings in turn, after one that compiles.

    The first few rounds, `settling`, are not counted: the prompt's pass has driven from the caches what they need.
    """
    ratios = []
    for _ in range(repeats + 1):
        seconds = []
        for d in (plain, decoder):
            times = [0.0]  # when each round was over
            for _ in d.generate(prompt, (settling + rounds) * (d.K + 1)):
                if sum(d.stats.accept_counts) == len(times):
                    times.append(d.stats.decode_seconds)
                if len(times) > settling + rounds:
                    break
            first = settling if len(times) > settling + 1 else 0
            seconds.append((times[-1] - times[first]) / (len(times) - 1 - first))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])


def predict(build, prompts, tokens, exits, ks, timed_ks, repeats):
    """{(exit, k): (speedup over plain decoding, accept counts)} to expect for every exit and k, tokens from each prompt.

    build: function (exit layer or None for plain decoding, k, rows) -> Decoder. Decodes every prompt plainly, runs one pass over
    each text, and times rounds of timed_ks at the first and the last exit, `repeats` times in turn with plain ones. Between exits
    the time is linear, layers moving from the verification to the K drafting steps; between timed_ks it is taken as linear. A
    progress bar shows the timings.
    """
    rows = max(map(len, prompts)) + tokens + max(ks)
    drafting, plain = (
        build(exits[0], max(timed_ks), rows),
        build(None, 0, rows),
    )  # the largest caches first: all decoders are compiled for them
    texts = [list(plain.generate(prompt, tokens + max(ks))) for prompt in tqdm(prompts, desc="decoding", disable=None)]
    chances = [exit_chances(drafting, prompt, text, exits) for prompt, text in zip(prompts, texts)]
    middle = prompts[0] + texts[0][: tokens // 2]  # a text of half the length costs what a text does on average
    pairs = [(e, k) for e in sorted({exits[0], exits[-1]}) for k in timed_ks]
    cost = {
        (e, k): round_cost(build(e, k, rows), plain, middle, repeats)
        for e, k in tqdm(pairs, desc="timing", disable=None)
    }
    result = {}
    for e in exits:
        share = (e - exits[0]) / max(exits[-1] - exits[0], 1)
        for k in ks:
            first, last = (np.interp(k, timed_ks, [cost[end, t] for t in timed_ks]) for end in (exits[0], exits[-1]))
            lengths = [min(tokens, len(text)) for text in texts]
            counts = [sum(c) for c in zip(*(expected_counts(chance[e], k, n) for chance, n in zip(chances, lengths)))]
            result[e, k] = (sum(lengths) - len(lengths)) / (sum(counts) * ((1 - share) * first + share * last)), counts
    return result


def calibrate(build, model, prompt, exit_layer=None, k=None):
    """(exit layer, k, reason) to decode this prompt with, the exit layer None for plain decoding where nothing is faster.

    exit_layer, k: what is settled already. build: as in `predict`. Raises InputError if there is no room in the context.
    """
    if model.config.n_layer == 1:
        return None, 1, "the model's only layer leaves none to draft with"
    exits = list(range(1, model.config.n_layer)) if exit_layer is None else [exit_layer]
    ks = list(range(1, CALIBRATION_K + 1)) if k is None else [k]
    tokens = min(CALIBRATION_TOKENS, model.config.context - len(prompt) + 1)
    if tokens < 3:  # one that is the prompt's, and a round after half of the rest
        raise InputError(
            f"auto: the prompt's {len(prompt)} tokens leave no room to calibrate in; name --early_exit and --speculate_k"
        )
    predicted = predict(build, [prompt], tokens, exits, ks, sorted({ks[0], ks[-1]}), repeats=5)
    best = max(predicted, key=lambda setting: predicted[setting][0])
    gain = predicted[best][0]
    return best[0] if gain > 1 else None, best[1], f"calibrated, {gain:.2f}x of plain decoding expected"


# The settings kept beside a checkpoint: model.tune.json, a list of objects, each a `key` with exit_layer (None: plain) and k.


def tuned_path(checkpoint):
    return Path(checkpoint).with_suffix(".tune.json")


def key(model, compile, temperature):
    """What a fastest setting holds for: the device's name, and how many of them, the precision, whether decoding is compiled, and whether it is greedy."""
    weight = model.embed.weight
    device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    if model.shard:
        device = f"{model.shard.size} x {device}"
    return dict(device=device, precision=str(weight.dtype)[6:], compile=compile, greedy=temperature == 0)


def read_settings(checkpoint):
    """All settings kept beside a checkpoint; [] if there are none. Raises InputError if the file is something else."""
    path = tuned_path(checkpoint)
    try:
        entries = json.loads(path.read_text()) if path.is_file() else []
        for entry in entries:
            [entry[name] for name in ("device", "precision", "compile", "greedy", "exit_layer", "k")]
        return entries
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the settings that scripts/sweep.py writes ({error}); delete it, or run the sweep again"
        ) from None


def store(checkpoint, key, exit_layer, k):
    """Keep a setting in place of what was kept for the same key."""
    path = tuned_path(checkpoint)
    entries = [e for e in read_settings(checkpoint) if any(e[name] != value for name, value in key.items())]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([*entries, {**key, "exit_layer": exit_layer, "k": k}], indent=2) + "\n")
    partial.replace(path)


def stored(checkpoint, key):
    """(exit layer, k, reason) that was kept for the key, or None."""
    for entry in read_settings(checkpoint):
        if all(entry[name] == value for name, value in key.items()):
            return entry["exit_layer"], entry["k"], f"stored in {tuned_path(checkpoint)}"
