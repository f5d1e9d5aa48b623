"""This engine as a model of EleutherAI's lm-evaluation-harness.

It has a file of its own because the harness takes seconds to import.
"""

import argparse
import json
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

import tasks
from command import InputError, first_line
from generate import Decoder, Ending, Sampling, run_sample
from model import Transformer
from tokenizer import Tokenizer

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of a text

Request = tuple[Any, list[int], list[int]]  # key in the harness's cache or None, context ids, continuation ids
Answer = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one


class Engine(TemplateLM):
    """A checkpoint that the harness can ask."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        exit_layer: int | None,
        build: Callable[[Sampling, int], Decoder],
        batch_size: int,
    ) -> None:
        """exit_layer: where log-likelihoods come from (None: the last layer). batch_size: texts to score at once.

        build: function (sampling, rows) -> Decoder that writes texts.
        """
        super().__init__()
        self.model = model
        self.text_tokenizer = tokenizer  # `tokenizer` is a name of the harness's own
        self.exit_layer = exit_layer
        self.build = build
        self.batch_size = batch_size
        self.context = model.config.context
        self._device = model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        found = self.first_token(self.text_tokenizer.eos_id, *self.model.config.eos_ids)
        return self.prefix_token_id if found is None else found

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.text_tokenizer
        found = self.first_token(tokenizer.bos_id, tokenizer.eos_id, *self.model.config.eos_ids)
        if found is None:
            raise InputError("the checkpoint has neither BOS nor EOS, which texts without a context are scored after")
        return found

    def first_token(self, *candidates: int | None) -> int | None:
        """The first candidate that isn't None."""
        return next((token for token in candidates if token is not None), None)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text_tokenizer.encode(string, special=add_special_tokens is not False)

    # Log-likelihoods. tqdm takes None as "a bar in a terminal only".

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Answer]:
        """The answers to the requests, in their order."""
        self.model.drop_caches()
        results: list[Answer] = [(0.0, False)] * len(requests)
        # The longest first, so that those of a batch are about equally long.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        bar = tqdm(total=len(requests), desc="log-likelihoods", unit="text", disable=disable_tqdm or None)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            answers = self.score([requests[i] for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                results[i] = answer
                key = requests[i][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            bar.update(len(chosen))
        bar.close()
        return results

    def score(self, batch: Sequence[Request]) -> list[Answer]:
        """The answers to one batch of requests, by one pass."""
        texts = []
        for _, context, continuation in batch:
            texts.append((context + continuation)[-self.context - 1 :])  # of a text that is too long, the end counts
        tokens = torch.zeros(len(batch), max(map(len, texts)) - 1, dtype=torch.long)  # (B, T)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text) - 1] = torch.tensor(text[:-1])  # padded at the end, where no token that counts sees it
        hidden = self.model(tokens.to(self._device), None, 0, self.exit_layer)  # (B, T, D)
        hidden = self.model.exit_states(hidden, self.exit_layer or self.model.config.n_layer)
        answers = []
        for h, text, (_, _, continuation) in zip(hidden, texts, batch, strict=True):
            first = max(0, len(text) - 1 - len(continuation))
            answers.append(self.judge(h[first : len(text) - 1], text))
        return answers

    def judge(self, hidden: Tensor, text: list[int]) -> Answer:
        """The answer for the last n ids of a text, given what the head predicts them from (n, D)."""
        logprobs = self.model.head(hidden).float().log_softmax(-1)  # (n, V)
        wanted = torch.tensor(text[-len(logprobs) :], device=self._device)[:, None]  # (n, 1)
        greedy = (logprobs.argmax(-1, keepdim=True) == wanted).all()
        return logprobs.gather(1, wanted).sum().item(), bool(greedy)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the context's length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            # BOS, which encoding puts first, is scored too, as with the harness's own models.
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.context, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(owners, answers, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generated texts.

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first stop string or EOS."""
        asked = [self.understand(request) for request in requests]
        rows = max([len(ids) + ending.max_new_tokens for _, ids, ending in asked])
        decoders: dict[Sampling, Decoder] = {}
        texts = []
        bar = tqdm(asked, desc="generating", unit="text", disable=disable_tqdm or None)
        for request, (sampling, ids, ending) in zip(requests, bar, strict=True):
            if sampling not in decoders:
                decoders[sampling] = self.build(sampling, rows)
            text = run_sample(decoders[sampling], self.text_tokenizer, ids, ending)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def understand(self, request: Instance) -> tuple[Sampling, list[int], Ending]:
        """(how to draw tokens, the context's ids, where to stop) of a request.

        Raises InputError for what this engine can't do.
        """
        context, how = request.args[0], normalize_gen_kwargs(request.args[1], 256)
        for name in sorted(how.keys() - GENERATION):
            if how[name] is not None:
                raise InputError(
                    f"--tasks: {request.task_name} wants {name} {how[name]} of generated text, "
                    "which this engine doesn't have"
                )
        temperature = how.get("temperature", 1.0) if how["do_sample"] else 0.0
        sampling = Sampling(temperature, how.get("top_k") or None, how.get("top_p") or 1.0)
        tokens = how["max_gen_toks"]
        room = self.context - tokens
        if room < 1:
            raise InputError(
                f"--tasks: {request.task_name} generates {tokens} tokens, but the context is {self.context}; "
                "set it with --max_gen_toks"
            )
        stop = [string for string in how["until"] if string]
        ids = self.tok_encode(context)[-room:]  # of a context that is too long, the end counts
        return sampling, ids, Ending.of(self.model, self.text_tokenizer, tokens, stop)


# Options that change what is asked or reported, not how a question is answered.
ASKING = ("tasks", "limit", "num_fewshot", "log_samples", "run_code")
TEXT = ("text", "draft_precision", "window", "max_tokens", "reference")


def run_tasks(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The harness's results for --tasks. Raises InputError for a task that isn't there or can't be had."""
    manager = TaskManager(include_path=args.include_path and str(args.include_path))
    for name in args.tasks:
        if not manager.match_tasks([name]):
            raise InputError(
                f"--tasks {name}: not a task of the harness; `lm-eval ls tasks` lists them, "
                "--include_path adds your own"
            )
    if args.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    generation = None
    if args.max_gen_toks:
        generation = {"max_gen_toks": args.max_gen_toks}
    try:
        return lm_eval.simple_evaluate(
            model=engine,
            tasks=args.tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            use_cache=answers_file(args),
            gen_kwargs=generation,
            confirm_run_unsafe_code=args.run_code,
            log_samples=args.log_samples,
        )
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:  # data or a package that can't be had, code that mustn't run
        reason = first_line(error, type(error).__name__)
        raise InputError(f"--tasks {' '.join(args.tasks)}: {reason}") from error


def answers_file(args: argparse.Namespace) -> str:
    """Where answers are kept as they come: a file of its own for each checkpoint and way to answer."""
    way = tasks.measured_with(args, "batch_size", "out", *ASKING, *TEXT)
    return f"{args.out}.{zlib.crc32(json.dumps(way).encode()):08x}"
