"""This engine as a model of EleutherAI's lm-evaluation-harness. A file of its own, as the harness takes seconds to import."""
import json
import os
import zlib

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import tasks
from generate import Ending, Sampling, run_sample
from command import InputError

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of generated text


class Engine(TemplateLM):
    """model, tokenizer: of a checkpoint. exit_layer: the layer that log-likelihoods come from (None: the last). build: function
    (sampling, rows) -> Decoder that writes texts. batch_size: texts to score at once."""

    def __init__(self, model, tokenizer, exit_layer, build, batch_size):
        super().__init__()
        self.model, self.text_tokenizer, self.exit_layer, self.build, self.batch_size = model, tokenizer, exit_layer, build, batch_size
        self.context, self._device = model.config.context, model.embed.weight.device

    @property
    def eot_token_id(self):
        for token in (self.text_tokenizer.eos_id, *self.model.config.eos_ids):
            if token is not None:
                return token
        return self.prefix_token_id

    @property
    def prefix_token_id(self):
        for token in (self.text_tokenizer.bos_id, self.text_tokenizer.eos_id, *self.model.config.eos_ids):
            if token is not None:
                return token
        raise InputError("the checkpoint has neither BOS nor EOS, which texts without a context are scored after")

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.text_tokenizer.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(log-likelihood of the continuation, whether it is the greedy one)] for [(key, context ids, continuation ids)]."""
        self.model.drop_caches()
        results = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))  # batches of like lengths
        bar = tqdm(total=len(requests), desc="log-likelihoods", unit="text", disable=True if disable_tqdm else None)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start:start + self.batch_size]
            ids = [(requests[i][1] + requests[i][2])[-self.context - 1:] for i in chosen]  # too long: the end counts
            tokens = torch.zeros(len(chosen), max(map(len, ids)) - 1, dtype=torch.long)
            for row, text in zip(tokens, ids):  # padded at the end, where no token that counts sees it
                row[:len(text) - 1] = torch.tensor(text[:-1])
            hidden = self.model(tokens.to(self._device), None, 0, self.exit_layer)  # (B, T, D)
            for i, h, text in zip(chosen, hidden, ids):
                key, _, continuation = requests[i]
                logprobs = self.model.logits(h[max(0, len(text) - 1 - len(continuation)):len(text) - 1]).float().log_softmax(-1)
                wanted = torch.tensor(text[-len(logprobs):], device=self._device)[:, None]
                results[i] = logprobs.gather(1, wanted).sum().item(), bool((logprobs.argmax(-1, keepdim=True) == wanted).all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, results[i])
            bar.update(len(chosen))
        bar.close()
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of each whole text, in windows of the context's length."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            # BOS, which encoding puts first, is scored too, as with the harness's own models
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[number] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """The text that follows each context, up to the first stop string or EOS."""
        asked = []
        for request in requests:
            context, how = request.args[0], normalize_gen_kwargs(request.args[1], 256)
            if unknown := sorted(k for k in how.keys() - GENERATION if how[k] is not None):
                raise InputError(f"--tasks: {request.task_name} wants {unknown[0]} {how[unknown[0]]} of generated text, which this engine doesn't have")
            sampling = Sampling(how.get("temperature", 1.0) if how["do_sample"] else 0.0, how.get("top_k") or None, how.get("top_p") or 1.0)
            room = self.context - how["max_gen_toks"]
            if room < 1:
                raise InputError(f"--tasks: {request.task_name} generates {how['max_gen_toks']} tokens, but the context is {self.context}; set it with --max_gen_toks")
            asked.append((sampling, self.tok_encode(context)[-room:], Ending.of(self.model, self.text_tokenizer, how["max_gen_toks"], [s for s in how["until"] if s])))
        rows, decoders, texts = max(len(ids) + how.max_new_tokens for _, ids, how in asked), {}, []
        for request, (sampling, ids, how) in zip(requests, tqdm(asked, desc="generating", unit="text", disable=True if disable_tqdm else None)):
            if sampling not in decoders:
                decoders[sampling] = self.build(sampling, rows)
            texts.append(run_sample(decoders[sampling], self.text_tokenizer, ids, how))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def run_tasks(args, engine):
    """The harness's results for --tasks, as its own dict. Raises InputError for a task that isn't there or can't be had."""
    manager = TaskManager(include_path=str(args.include_path) if args.include_path else None)
    for name in args.tasks:
        if not manager.match_tasks([name]):
            raise InputError(f"--tasks {name}: not a task of the harness; `lm-eval ls tasks` lists them, --include_path adds your own")
    if args.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    # Answers are kept as they come, in a file of their own for each checkpoint and way to answer.
    way = tasks.measured_with(args, "tasks", "limit", "batch_size", "num_fewshot", "text", "window", "max_tokens", "reference", "out", "log_samples", "run_code")
    answers = zlib.crc32(json.dumps(way).encode())
    try:
        return lm_eval.simple_evaluate(
            model=engine, tasks=args.tasks, num_fewshot=args.num_fewshot, limit=args.limit, task_manager=manager, use_cache=f"{args.out}.{answers:08x}",
            gen_kwargs={"max_gen_toks": args.max_gen_toks} if args.max_gen_toks else None, confirm_run_unsafe_code=args.run_code, log_samples=args.log_samples)
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:  # data or a package that can't be had, code that mustn't run
        raise InputError(f"--tasks {' '.join(args.tasks)}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
