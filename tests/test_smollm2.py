"""A real model, SmolLM2-135M-Instruct, against transformers: prompt ids, greedy tokens, texts and chat.

The model is downloaded once per machine (scripts/smollm2.py); without it and without a network these tests fail.
"""

from types import SimpleNamespace

import pytest
import torch

import generate
import smollm2
from command import InputError
from convert_hf_checkpoint import convert
from generate import Conversation, Decoder, Ending, run_sample

pytestmark = pytest.mark.slow


NEW_TOKENS = 48
HOW = [dict(), dict(exit_layer=10, k=2)]
TEXTS = {
    "prose": "The capital of France is",
    "leading spaces": "   and so the story began",
    "newlines": "First line.\n\n\nSecond line:\n",
    "emoji": "I am so happy 🙂👍🏽! Today we will",
    "special tokens": "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "digits": "1 2 3 5 8 13 21 34 12345678",
    "other scripts": "Le café était fermé. 東京は",
    "tabs": "name\tage\nAda\t36\nAlan\t",
    "one letter": "A",
    "two thousand words": "the quick brown fox jumps over it " * 285 + "and then the",
}
CHATS = {
    "question": [dict(role="user", content="What is the capital of Italy? Answer in one sentence.")],
    "system": [dict(role="system", content="You answer in French."), dict(role="user", content="Good morning!")],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """folder; ours: model and tokenizer; theirs: transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.prepare(tmp_path_factory.mktemp("smollm2") / "hf")
    return SimpleNamespace(
        path=convert(folder),
        ours=generate.load(folder / "model.pth", "cpu", "float32"),
        theirs=(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
        ),
    )


@pytest.fixture(scope="module")
def prompts(model):
    """{name: ids} of transformers, chats included."""
    _, tokenizer = model.theirs
    found = {name: tokenizer(text).input_ids for name, text in TEXTS.items()}
    for name, messages in CHATS.items():
        found[name] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


def greedy(model, ids, tokens):
    """Whether these are transformers' greedy tokens after the prompt, up to the first EOS. One pass tells: each of
    them must be its choice behind those before.
    """
    hf, eos = model.theirs[0], model.ours[0].config.eos_ids
    with torch.inference_mode():
        logits = hf(torch.tensor([ids + tokens[:-1]]), logits_to_keep=len(tokens)).logits
    ends = [token in eos for token in tokens]
    whole = not any(ends[:-1]) and (ends[-1] or len(tokens) == NEW_TOKENS)
    return whole and logits[0].argmax(-1).tolist() == tokens


@pytest.fixture(scope="module")
def written(model, prompts):
    """{name: [(our text, our greedy tokens)], decoded plainly and with self-speculation}. The second finds the prompt
    in the caches, which spares the long one.
    """
    ours, tokenizer = model.ours
    ending = Ending.of(ours, tokenizer, NEW_TOKENS)
    decoders = [Decoder(ours, rows=3000, **how) for how in HOW]
    return {
        name: [
            (run_sample(decoder, tokenizer, ids, ending, reuse=i > 0), decoder.stats.tokens)
            for i, decoder in enumerate(decoders)
        ]
        for name, ids in prompts.items()
    }


def test_prompt_ids(model, prompts):
    _, tokenizer = model.ours
    assert tokenizer.encode("") == model.theirs[1]("").input_ids == []
    for name, text in TEXTS.items():
        assert tokenizer.encode(text) == prompts[name], name
    for name, messages in CHATS.items():
        assert tokenizer.chat(messages) == prompts[name], name


def test_greedy_tokens_and_texts(model, prompts, written):
    for name, ids in prompts.items():
        text, tokens = written[name][0]
        assert greedy(model, ids, tokens), name
        before, whole = (model.theirs[1].decode(part, skip_special_tokens=True) for part in (ids, ids + tokens))
        assert text == whole[len(before) :], name


def test_self_speculation_writes_the_same(written):
    for name, (plain, ours) in written.items():
        assert ours == plain, name


@pytest.mark.parametrize("how", HOW, ids=["plain", "self-speculative"])
def test_an_empty_prompt_is_refused(how, model):
    ours, tokenizer = model.ours
    with pytest.raises(InputError, match="the prompt is empty"):
        run_sample(Decoder(ours, rows=60, **how), tokenizer, tokenizer.encode(""), Ending.of(ours, tokenizer, 5))


def test_a_conversation(model):
    """The second turn, on the first one's caches, against transformers on all of it."""
    ours, tokenizer = model.ours
    conversation = Conversation(Decoder(ours, rows=400), tokenizer, Ending.of(ours, tokenizer, NEW_TOKENS))
    conversation.answer("What is the capital of Italy? Answer in one sentence.")
    assert "Rome" in conversation.messages[-1]["content"]
    conversation.answer("And of Spain?")
    talk = conversation.messages[:-1]
    ids = model.theirs[1].apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert greedy(model, ids, conversation.decoder.stats.tokens)
    assert conversation.decoder.stats.prefill_tokens < len(ids) / 2
