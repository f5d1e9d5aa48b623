"""Which draft precision, exit layer E and draft length K decode a checkpoint fastest, and the settings kept beside it.

The fastest is predicted from little. A round costs the same whatever it accepts, and the model's own text tells how
often drafts are accepted: one pass over it gives what every exit would have drafted at every position. So that pass and
a few timed rounds, for each precision, predict every E and K. `generate.py --early_exit auto --speculate_k auto` and
`scripts/sweep.py` use it.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import kernels
from checkpoint import dtype_name
from command import InputError
from drafters import last_exit
from files import check_fields, locked, read_json, write_json
from model import SIZES, Transformer
from values import FLAG, NOTHING, TEXT, list_of, one_of, whole

Decoder = Any  # generate.Decoder; generate.py imports this module

CALIBRATION_TOKENS = 64  # length of the text that `calibrate` decodes
CALIBRATION_K = 6  # the longest draft that `calibrate` considers
ROUNDS = 12  # how many rounds a timing covers
SETTLING = 4  # rounds before those, not timed: after the prompt's pass the processor's caches hold other things

# (draft precision, exit layer or None for plain decoding, k, rows) -> Decoder
Build = Callable[[str, "int | None", int, int], "Decoder"]
Cell = tuple[str, int, int]  # draft precision, exit layer and draft length: a cell of the grid
Setting = tuple["int | None", int, str, str]  # exit layer (None: plain decoding), k, draft precision, how it was found
Chances = dict[int, list[float]]  # {exit: chance that a token drafted there is accepted, for each position}


# Prediction: how often drafts are accepted, times what a round costs.


@torch.inference_mode()
def exit_chances(decoder: Decoder, prompt: list[int], text: list[int], exits: Sequence[int]) -> Chances:
    """{exit: chances (len(text) - 1,)} that a token drafted there is accepted, for each token of a text but its first.

    text: the ids that plain decoding wrote after the prompt's. A chance is the overlap sum(min(p, q)) of the draft's
    and the target's distribution, given the text so far (Leviathan et al. 2211.17192, corollary 3.6). At temperature 0
    it is 1 if the draft is the text's own token, else 0. decoder: a self-speculative one of the largest exit, with rows
    for all of it. For drafts by a copy the chances are a little too low: here the copy reads its own cache rows of the
    whole text, not the target's.
    """
    model, sampling = decoder.model, decoder.sampling
    drafter: Any = decoder.drafter  # a SelfDrafter
    ids = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)  # (1, T)
    target = None
    if sampling.temperature > 0:
        target = sampling.distribution(model.logits(model(ids)[0, len(prompt) :]))  # (len(text) - 1, V)
    chosen = torch.tensor(text[1:], device=ids.device)
    chances = {}
    x = model.embed(ids)
    for number, layer in enumerate(drafter.first_layers(), 1):
        x = model.run([layer], x, None)
        if number not in exits:
            continue
        logits = drafter.at(number).text_logits(x, len(prompt))  # (len(text) - 1, V), where text[1:] is drafted
        if target is None:
            chance = (logits.argmax(-1) == chosen).double()
        else:
            chance = torch.minimum(sampling.distribution(logits), target).sum(-1).clamp(max=1)
        chances[number] = chance.tolist()
    model.cached_ids = []  # the rows are the drafts' now
    return chances


def expected_counts(chances: Sequence[float], k: int, tokens: int) -> list[float]:
    """Accept counts (K+1,), as `Stats` has them, to expect of decoding `tokens` tokens with these chances.

    A draft goes on from the text's own tokens as long as it is accepted, so a round accepts a run of positions. Where
    all chances are 1 or 0, this is what decoding counts. For that, chances must go k beyond the tokens, as the last
    round may.
    """
    starts = [1.0] + [0.0] * (tokens + k)  # starts[i]: chance that a round starts from token i
    counts = [0.0] * (k + 1)
    for i in range(tokens - 1):
        reached = starts[i]  # chance that a round from token i accepts n drafts or more
        for n in range(k + 1):
            further = 0.0
            if n < k and i + n < len(chances):
                further = chances[i + n]
            ends = reached * (1 - further)
            counts[n] += ends
            starts[i + n + 1] += ends
            reached *= further
    return counts


def round_cost(decoder: Decoder, plain: Decoder, prompt: list[int], repeats: int) -> float:
    """Time of a round after the prompt, in rounds of plain decoding.

    This is the median ratio of timings in turn, after a first one that compiles and does not count.
    """
    ratios = []
    for _ in range(repeats + 1):
        plain_seconds = seconds_per_round(plain, prompt)
        ratios.append(seconds_per_round(decoder, prompt) / plain_seconds)
    return statistics.median(ratios[1:])


def seconds_per_round(decoder: Decoder, prompt: list[int]) -> float:
    """Mean time of up to ROUNDS rounds after the prompt, without the first SETTLING ones, if there are more."""
    ends = [0.0]  # seconds when each round was over
    for _ in decoder.generate(prompt, (SETTLING + ROUNDS) * (decoder.K + 1)):
        if decoder.stats.decode_seconds > ends[-1]:
            ends.append(decoder.stats.decode_seconds)
        if len(ends) > SETTLING + ROUNDS:
            break
    first = SETTLING if len(ends) > SETTLING + 1 else 0
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def predict(
    build: Build,
    prompts: list[list[int]],
    tokens: int,
    exits: dict[str, list[int]],
    ks: Sequence[int],
    timed_ks: Sequence[int],
    repeats: int,
) -> dict[Cell, tuple[float, list[float]]]:
    """{cell: (speedup over plain decoding, accept counts)} to expect for every exit and k.

    tokens: how many are decoded from each prompt. exits: {draft precision: its exits}. ks and each precision's exits:
    sorted. Decodes every prompt plainly, runs one pass of each precision over each text, and times rounds of timed_ks
    at a precision's first and last exit, `repeats` times in turn with plain ones. All other cells' times are
    interpolated. A progress bar shows the timings.
    """
    rows = max(map(len, prompts)) + tokens + max(ks)
    # With the largest caches first: all decoders are compiled for them.
    drafting = {precision: build(precision, own[-1], max(timed_ks), rows) for precision, own in exits.items()}
    plain = build("same", None, 0, rows)
    texts = []
    for prompt in tqdm(prompts, desc="decoding", disable=None):
        texts.append(list(plain.generate(prompt, tokens + max(ks))))
    middle = prompts[0] + texts[0][: tokens // 2]  # a text of half the length costs what a text does on average
    lengths = [min(tokens, len(text)) for text in texts]
    plain_rounds = sum(lengths) - len(lengths)  # the prompt's pass gives each text's first token
    result = {}
    for precision, own in exits.items():
        chances = []
        for prompt, text in zip(prompts, texts, strict=True):
            chances.append(exit_chances(drafting[precision], prompt, text, own))
        drafter: Any = drafting[precision].drafter
        for group in (  # an adapter's block makes a round cost more
            [e for e in own if not drafter.at(e).block],
            [e for e in own if drafter.at(e).block],
        ):
            costs = time_corners(partial(build, precision), plain, middle, group, timed_ks, rows, repeats)
            for e, k in itertools.product(group, ks):
                counts = text_counts(chances, e, k, lengths)
                time = sum(counts) * interpolate(costs, timed_ks, e, k)  # in plain rounds
                result[precision, e, k] = plain_rounds / time, counts
    return result


def text_counts(chances: list[Chances], exit_layer: int, k: int, lengths: list[int]) -> list[float]:
    """Accept counts (K+1,) to expect of all texts together. chances and lengths: of each text."""
    total = np.zeros(k + 1)
    for chance, length in zip(chances, lengths, strict=True):
        total += expected_counts(chance[exit_layer], k, length)
    return total.tolist()


def time_corners(
    build: Callable[[int, int, int], Decoder],
    plain: Decoder,
    prompt: list[int],
    exits: Sequence[int],
    timed_ks: Sequence[int],
    rows: int,
    repeats: int,
) -> dict[int, list[float]]:
    """{exit: what a round costs with each of timed_ks}, in plain rounds, for the first and the last exit, if any.

    build: function (exit, k, rows) -> Decoder.
    """
    corners = list(itertools.product(sorted({*exits[:1], *exits[-1:]}), timed_ks))
    costs: dict[int, list[float]] = {}
    for e, k in tqdm(corners, desc="timing", disable=None):
        costs.setdefault(e, []).append(round_cost(build(e, k, rows), plain, prompt, repeats))
    return costs


def interpolate(costs: dict[int, list[float]], timed_ks: Sequence[int], e: int, k: int) -> float:
    """The cost of a round at (e, k), given that of timed_ks at the first and the last exit.

    Between exits that all have an adapter's block, or all have none, it is linear: layers move from the verification to
    the K drafting steps. Between timed_ks it is taken
    as linear.
    """
    first, last = min(costs), max(costs)
    at_first = np.interp(k, timed_ks, costs[first])
    at_last = np.interp(k, timed_ks, costs[last])
    share = (e - first) / max(last - first, 1)
    return float((1 - share) * at_first + share * at_last)


def calibrate(
    build: Build,
    precisions: Sequence[str],
    model: Transformer,
    prompt: list[int],
    exit_layer: int | None = None,
    k: int | None = None,
) -> Setting:
    """What to decode this prompt with. The exit layer is None where plain decoding is fastest.

    precisions: those that may be chosen. exit_layer, k: what is settled already. Raises InputError if there is no room
    in the context.
    """
    ks = list(range(1, CALIBRATION_K + 1)) if k is None else [k]
    tokens = min(CALIBRATION_TOKENS, model.config.context - len(prompt) + 1)
    if tokens < 3:  # the prompt's pass gives one, and a round after half of the rest needs two
        raise InputError(
            f"auto: the prompt's {len(prompt)} tokens leave no room to calibrate in; "
            "name --early_exit and --speculate_k"
        )
    exits = {}
    for precision in precisions:
        last = last_exit(model.config.n_layer, precision)
        exits[precision] = list(range(1, last + 1)) if exit_layer is None else [exit_layer]
    exits = {precision: own for precision, own in exits.items() if own}
    if not exits:
        return None, 1, "same", "the model's only layer leaves none to draft with"
    predicted = predict(build, [prompt], tokens, exits, ks, sorted({ks[0], ks[-1]}), repeats=5)
    precision, fastest, length = max(predicted, key=lambda cell: predicted[cell][0])
    gain, _ = predicted[precision, fastest, length]
    why = f"calibrated, {gain:.2f}x of plain decoding expected"
    if gain <= 1:
        return None, 1, "same", why
    return fastest, length, precision, why


# Settings kept beside a checkpoint, in model.tune.json: a list of objects, each a `key` with exit_layer, k and
# draft_precision.

FIELDS = {
    "device": TEXT,
    "precision": TEXT,
    "compile": FLAG,
    "greedy": FLAG,
    "exit_layer": SIZES["n_layer"] | NOTHING,  # nothing: plain decoding
    "k": whole(1, kernels.MAX_ROWS - 1),
    "draft_precision": one_of("same", "int8", "int4") | NOTHING,  # older entries have none
    "adapters": list_of(SIZES["n_layer"]) | NOTHING,
}


def key(model: Transformer, compile: bool, temperature: float) -> dict[str, Any]:
    """What a fastest setting holds for: device and how many of them, precision, compiled or not, greedy or not, and
    exits with adapters, if there are any.
    """
    weight = model.embed.weight
    device = weight.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(weight.device)
    if model.shard:
        device = f"{model.shard.size} x {device}"
    compiled = compile and kernels.can_compile(weight)
    found = dict(device=device, precision=dtype_name(weight.dtype), compile=compiled, greedy=temperature == 0)
    return {**found, "adapters": list(model.adapters)} if model.adapters else found


def tuned_path(checkpoint: str | Path) -> Path:
    return Path(checkpoint).with_suffix(".tune.json")


def read_settings(checkpoint: str | Path) -> list[dict[str, Any]]:
    """All settings kept beside a checkpoint; [] if there are none. Raises InputError if the file is something else."""
    path = tuned_path(checkpoint)
    if not os.path.lexists(path):
        return []
    try:
        entries = read_json(path)
        if not isinstance(entries, list):
            raise InputError(f"{path}: not a JSON list")
        for number, entry in enumerate(entries, 1):
            check_fields(entry, FIELDS, f"{path}, entry {number}")
    except InputError as error:
        raise InputError(f"{error}; scripts/sweep.py writes it: delete it, or run the sweep again") from None
    return entries


def store(checkpoint: str | Path, key: dict[str, Any], exit_layer: int | None, k: int, precision: str) -> None:
    """Keep a setting in place of what was kept for the same key."""
    path = tuned_path(checkpoint)
    with locked(path, wait=10):  # another run may keep its own just now
        entries = [entry for entry in read_settings(checkpoint) if not is_for(entry, key)]
        entries.append({**key, "exit_layer": exit_layer, "k": k, "draft_precision": precision})
        write_json(path, entries, indent=2)


def stored(checkpoint: str | Path, key: dict[str, Any]) -> Setting | None:
    """What was kept for the key, or None."""
    for entry in read_settings(checkpoint):
        if is_for(entry, key):
            precision = entry.get("draft_precision") or "same"
            return entry["exit_layer"], entry["k"], precision, f"stored in {tuned_path(checkpoint)}"
    return None


def options(exit_layer: int | None, k: int, precision: str) -> str:
    """A setting as options of generate.py, for people."""
    if exit_layer is None:
        return "plain decoding, which no draft beats"
    chosen = f"--self_speculative --early_exit {exit_layer} --speculate_k {k}"
    return chosen if precision == "same" else f"{chosen} --draft_precision {precision}"


def is_for(entry: dict[str, Any], key: dict[str, Any]) -> bool:
    return key.items() <= entry.items() and entry.get("adapters") == key.get("adapters")
