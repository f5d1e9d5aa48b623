"""Texts that a model writes itself, sampled from its own distribution: what its exits are trained on."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from checkpoint import DIGEST, described_by, dtype_name
from command import InputError
from data import Document, digest, tokenizer_digest
from files import read_object
from generate import Sampling, draw
from model import Transformer
from tokenizer import Tokenizer

TOGETHER = {"cuda": 256}  # texts that are written at a time; elsewhere 16: as many rows as the CPU's kernels take
MOST_BYTES = 8e9  # of caches
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for what a user says


@dataclass(frozen=True)
class OwnTexts:
    """The texts by number: stands where `data.Sources` does."""

    count: int

    def documents(self) -> Iterator[Document]:
        for number in range(self.count):
            yield f"own text {number}", ""

    def describe(self) -> dict[str, Any]:
        return {"sources": "the model's own text", "settings": [self.count]}


@dataclass
class Page:
    """A text that is being written."""

    ids: list[int]
    coming: list[int]  # what stands next in the text, whatever the model would write
    answering: bool  # whether it is past the user's words
    ends: frozenset[int]  # EOS
    done: bool = False

    def add(self, drawn: int, turn: list[int], longest: int) -> int:
        """Take the next token: one that was to come, or the drawn one. Returns it.

        turn: what stands between a user's words and the answer. longest: ids of a text until the user's words end.
        """
        if self.coming:
            token = self.coming.pop(0)
            self.ids.append(token)
            return token
        if not self.answering and (drawn in self.ends or len(self.ids) >= longest):
            self.answering = True
            self.coming = turn[1:]
            self.ids.append(turn[0])
            return turn[0]
        if not self.done:
            self.ids.append(drawn)
            self.done = drawn in self.ends
        if not self.answering:  # there are templates in which a user's words don't end with EOS
            self.answering = self.ids[-len(turn) :] == turn
        return drawn


class Author:
    """Writes the texts: stands where `data.Encoder` does.

    A model with a chat template first writes what a user would say, then the answer (Magpie, arXiv 2406.08464); another
    one begins with BOS. A text ends with EOS, or is `context` tokens long.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, path: Path, context: int, seed: int) -> None:
        """path: the model's model.pth. The texts depend on what `describe` names and on the device.

        Raises InputError if no text can begin, or `context` is too short for one.
        """
        self.context = min(context, model.config.context)
        self.batch_size = texts_together(model, self.context)
        self.vocab_size = model.config.vocab_size
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.seed = seed
        self.opening, self.turn = frame(model, tokenizer, path)
        least = 2 * (len(self.opening) + len(self.turn) + 1)
        if self.context < least:
            raise InputError(f"--context {context}: texts that {path} writes need {least} tokens or more")

    def describe(self) -> dict[str, Any]:
        """What the texts depend on, as JSON has it."""
        stat = self.path.stat()
        return {
            "model": read_object(described_by(self.path)).get(DIGEST) or [stat.st_size, stat.st_mtime_ns],
            "precision": dtype_name(self.model.embed.weight.dtype),
            "tokenizer": tokenizer_digest(self.tokenizer.folder),
            "template": digest((self.tokenizer.template or "").encode()),
            "context": self.context,
            "seed": self.seed,
        }

    @torch.inference_mode()
    def batch(self, documents: list[Document]) -> list[list[int]]:
        """The ids of each text. All are written at the same time, token by token."""
        model, count = self.model, len(documents)
        device = model.embed.weight.device
        first = int(documents[0][0].rpartition(" ")[2])
        random = torch.Generator(device).manual_seed(self.seed * 1_000_003 + first)
        ends = frozenset(model.config.eos_ids)
        pages = [Page(list(self.opening), [], not self.turn, ends) for _ in documents]
        model.setup_caches(self.context, count)
        tokens = torch.tensor(self.opening, device=device).expand(count, -1)
        hidden = model(tokens, None)
        for position in range(len(self.opening), self.context):
            probs = Sampling(1.0).distribution(model.logits(hidden[:, -1]))  # (B, V)
            u = torch.rand(count, dtype=torch.float64, device=device, generator=random)
            drawn = draw(probs, u).tolist()
            chosen = []
            for page, token in zip(pages, drawn, strict=True):
                chosen.append(page.add(token, self.turn, self.context // 2))
            if all(page.done for page in pages):
                break
            tokens = torch.tensor(chosen, device=device)[:, None]
            hidden = model(tokens, torch.tensor([position], device=device))
        return [page.ids for page in pages]

    def __enter__(self) -> "Author":
        return self

    def __exit__(self, *_: object) -> None:
        self.model.drop_caches()


def texts_together(model: Transformer, context: int) -> int:
    """How many texts of this length are written at a time."""
    weight, attention = model.embed.weight, model.layers[0].attention
    row = 2 * len(model.layers) * attention.kv_heads * attention.head_dim * weight.itemsize
    count = TOGETHER.get(weight.device.type, 16)
    while count > 1 and count * context * row > MOST_BYTES:
        count //= 2
    return count


def frame(model: Transformer, tokenizer: Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """(ids that a text begins with, ids between a user's words and the answer): those of the chat template.

    Where the template has nothing there, and without a template: BOS, or else EOS; and nothing. Raises InputError if
    there is neither, or the template shows no user's words.
    """
    opening, turn = [], []
    if tokenizer.template is not None:
        before, mark, behind = tokenizer.render([dict(role="user", content=MARK)]).partition(MARK)
        if not mark:
            raise InputError(f"{path.parent}: its chat template doesn't show what a user says; give texts with --data")
        opening = tokenizer.encode(before.rstrip(" "), special=False)
        turn = tokenizer.encode(behind, special=False)
    candidates = tokenizer.bos_id, tokenizer.eos_id, *model.config.eos_ids
    known = [token for token in candidates if token is not None]
    if not opening and not known:
        raise InputError(f"{path}: has neither BOS nor EOS for a text to begin with; give texts with --data")
    return opening or known[:1], turn
