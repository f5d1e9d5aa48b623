"""The checkpoint that comes with the repository."""

import json

import pytest
import torch

from conftest import ROOT
from generate import CHECKPOINTS, Decoder, acceptance, load

FOLDER = ROOT / "checkpoints" / "demo"


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load(CHECKPOINTS / "demo" / "model.pth", "cpu", None)
    lines = (FOLDER / "prompts.jsonl").read_text().splitlines()
    return model, tokenizer, [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def test_it_is_small_and_says_what_it_is():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 32e6
    card = (FOLDER / "README.md").read_text()
    assert "scripts/train.py" in card and "PSF License" in card


def test_prompts_come_back_from_the_tokenizer(demo):
    model, tokenizer, prompts = demo
    for line, ids in zip((FOLDER / "prompts.jsonl").read_text().splitlines(), prompts, strict=False):
        assert tokenizer.decode(ids) == json.loads(line)["prompt"] and len(ids) + 256 <= model.config.context


@pytest.mark.parametrize(
    "exit_layer,k", [(2, 2), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, 3), (4, 6)))]
)
def test_self_speculation_writes_the_same_text_and_is_often_right(exit_layer, k, demo):
    model, _, prompts = demo
    plain, ours = Decoder(model), Decoder(model, exit_layer=exit_layer, k=k)
    for prompt in prompts[:3]:
        assert list(ours.generate(prompt, 120)) == list(plain.generate(prompt, 120))
        assert acceptance(ours.stats.accept_counts)[1] > 0.5


def test_transformers_writes_the_same_text(demo, tmp_path):
    from transformers import AutoModelForCausalLM

    from export_hf_checkpoint import export

    model, _, prompts = demo
    theirs = AutoModelForCausalLM.from_pretrained(export(FOLDER / "model.pth", tmp_path / "hf"), dtype=torch.float32)
    prompt = torch.tensor([prompts[0]])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False, pad_token_id=0
    )[0, prompt.shape[1] :]
    assert list(Decoder(model).generate(prompts[0], 60, model.config.eos_ids)) == expected.tolist()
