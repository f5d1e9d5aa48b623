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


NEW_TOKENS = 64
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
    "four thousand words": "the quick brown fox jumps over it " * 571 + "and then the",
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
def expected(model):
    """{name: (prompt ids, greedy tokens, text)} of transformers, chats included."""
    hf, tokenizer = model.theirs
    prompts = {name: tokenizer(text).input_ids for name, text in TEXTS.items()}
    for name, messages in CHATS.items():
        prompts[name] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = {}
    for name, ids in prompts.items():
        tokens = torch.tensor([ids])
        how = dict(attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0)
        new = hf.generate(tokens, max_new_tokens=NEW_TOKENS, **how)[0, len(ids) :].tolist()
        before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + new))
        found[name] = ids, new, whole[len(before) :]
    return found


def test_prompt_ids(model, expected):
    _, tokenizer = model.ours
    assert tokenizer.encode("") == model.theirs[1]("").input_ids == []
    for name, text in TEXTS.items():
        assert tokenizer.encode(text) == expected[name][0], name
    for name, messages in CHATS.items():
        assert tokenizer.chat(messages) == expected[name][0], name


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=10, k=2)], ids=["plain", "self-speculative"])
def test_greedy_tokens_and_texts(how, model, expected):
    ours, tokenizer = model.ours
    decoder, ending = Decoder(ours, rows=6000, **how), Ending.of(ours, tokenizer, NEW_TOKENS)
    for name, (ids, tokens, text) in expected.items():
        assert run_sample(decoder, tokenizer, ids, ending) == text, name
        assert decoder.stats.tokens == tokens, name
    with pytest.raises(InputError, match="the prompt is empty"):
        run_sample(decoder, tokenizer, tokenizer.encode(""), ending)


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=10, k=2)], ids=["plain", "self-speculative"])
def test_compiled(how, model, expected):
    ours, tokenizer = model.ours
    decoder = Decoder(ours, rows=200, compile=True, **how)
    for name in ("special tokens", "other scripts", "system"):
        ids, tokens, _ = expected[name]
        assert list(decoder.generate(ids, NEW_TOKENS, ours.config.eos_ids)) == tokens, name


def test_a_conversation(model):
    """The second turn, on the first one's caches, against transformers on all of it."""
    ours, tokenizer = model.ours
    hf, their_tokenizer = model.theirs
    conversation = Conversation(Decoder(ours, rows=400), tokenizer, Ending.of(ours, tokenizer, NEW_TOKENS))
    conversation.answer("What is the capital of Italy? Answer in one sentence.")
    assert "Rome" in conversation.messages[-1]["content"]
    conversation.answer("And of Spain?")
    talk = conversation.messages[:-1]
    ids = their_tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    tokens = torch.tensor([ids])
    how = dict(attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0)
    assert (
        conversation.decoder.stats.tokens
        == hf.generate(tokens, max_new_tokens=NEW_TOKENS, **how)[0, len(ids) :].tolist()
    )
    assert conversation.decoder.stats.prefill_tokens < len(ids) / 2
