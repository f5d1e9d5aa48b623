"""The model and the converter against transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import load_config, load_model
from command import InputError
from conftest import FAMILY, LLAMA3_ROPE, edit_json
from convert_hf_checkpoint import convert
from export_hf_checkpoint import export

SHAPES = list(FAMILY)


@pytest.fixture
def tokens():
    return torch.randint(0, 300, (1, 100), generator=torch.Generator().manual_seed(1))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, hf_folder, checkpoint, tokens):
    """At every position: without caches, by prefill, and step by step; every exit; any split of the layers."""
    _, theirs = hf_folder(shape)
    model, n = load_model(checkpoint(shape)), tokens.shape[1]

    def fill_caches(value):
        model.setup_caches(n + 7)
        for layer in model.layers:
            layer.attention.k_cache.fill_(value), layer.attention.v_cache.fill_(value)

    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
        exits = [theirs.lm_head(theirs.model.norm(h)) for h in out.hidden_states[1:-1]] + [out.logits]
        assert out.logits.abs().max() > 1  # weights large enough for the comparison to mean something
        pos = torch.arange(n)
        assert_close(model.logits(model(tokens)), out.logits)
        fill_caches(0)  # not NaN: PyTorch's attention multiplies masked rows by zero
        assert_close(model.logits(model(tokens, pos)), out.logits)
        fill_caches(torch.nan)
        for i in range(n):
            x = tokens[:, i : i + 1]
            for layer in range(model.config.n_layer):
                x = model(x, pos[i : i + 1], layer, layer + 1)
                assert_close(model.logits(x)[0, 0], exits[layer][0, i])
        fill_caches(0)
        x = model(model(tokens[:, :60], None, 0, 3), None, 3)  # fills the caches that the rest attends to
        assert_close(model.logits(x), out.logits[:, :60])
        x = model(model(tokens[:, 60:], pos[60:], 0, 1), pos[60:], 1)
        assert_close(model.logits(x), out.logits[:, 60:])


@pytest.mark.parametrize("rows", [1, 5, 30])  # the C++ kernels, and PyTorch's
def test_rows_beyond_the_position_are_hidden(rows, checkpoint, tokens):
    """Whatever a rejected draft left in the cache changes nothing once the position has moved back."""
    model, pos = load_model(checkpoint("llama3")), torch.arange(100)
    with torch.no_grad():
        model.setup_caches(100)
        expected = model(tokens)
        model(tokens[:, :50])
        for layer in model.layers:
            layer.attention.k_cache[:, :, 50:] = 1e4
            layer.attention.v_cache[:, :, 50:] = 1e4
        assert_close(model(tokens[:, 50 : 50 + rows], pos[50 : 50 + rows]), expected[:, 50 : 50 + rows])


LAYOUTS = {
    "safetensors": {},
    "sharded safetensors": dict(max_shard_size="60KB"),
    "bin": {},
    "sharded bin": dict(max_shard_size="60KB"),
}


def write_layout(theirs, folder, layout):
    """Save a transformers model in one of the layouts; .bin, which transformers 5 no longer writes, by renaming."""
    theirs.save_pretrained(folder, **LAYOUTS[layout])
    if "bin" in layout:
        from safetensors.torch import load_file

        for file in folder.glob("*.safetensors"):
            torch.save(
                load_file(file), folder / file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            )
            file.unlink()
        for index in folder.glob("*.safetensors.index.json"):
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_converts(shape, layout, hf_folder, tmp_path, tokens):
    source, theirs = hf_folder(shape)
    write_layout(theirs, tmp_path, layout)
    shutil.copy(source / "tokenizer.model", tmp_path)
    assert ("sharded" in layout) == (len(list(tmp_path.glob("*-of-*"))) > 1)
    before = (tmp_path / "config.json").read_bytes()
    model = load_model(convert(tmp_path))
    with torch.no_grad():
        assert_close(model.logits(model(tokens)), theirs(tokens).logits)
    assert (tmp_path / "config.json").read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_rope_in_both_spellings(scaling, hf_folder, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    folder, _ = hf_folder("llama3.2")
    new, old = tmp_path / "new", tmp_path / "old"
    shutil.copytree(folder, new)
    shutil.copytree(folder, old)
    edit_json(new / "config.json", rope_parameters=dict(scaling or dict(rope_type="default"), rope_theta=5e5))
    edit_json(old / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    configs = [load_config(convert(f).with_suffix(".json")) for f in (new, old)]
    assert configs[0].rope_theta == configs[1].rope_theta == 5e5
    assert configs[0].rope_scaling == configs[1].rope_scaling
    assert (configs[0].rope_scaling is None) == (scaling is None)


def test_special_tokens_come_from_the_files(hf_folder, checkpoint, tmp_path):
    assert load_config(checkpoint("llama3").with_suffix(".json")).eos_ids == (5, 7)
    assert load_config(checkpoint("llama2").with_suffix(".json")).eos_ids == (2,)
    folder, _ = hf_folder("llama2")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    config = load_config(convert(tmp_path / "copy").with_suffix(".json"))
    assert config.eos_ids == (3, 4) and config.bos_id == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_export_goes_back(shape, hf_folder, checkpoint, tmp_path, tokens):
    from transformers import AutoModelForCausalLM

    _, theirs = hf_folder(shape)
    back = AutoModelForCausalLM.from_pretrained(export(checkpoint(shape), tmp_path / "hf"))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, atol=0, rtol=0)
    assert back.generation_config.eos_token_id in (theirs.config.eos_token_id, [theirs.config.eos_token_id])
    assert (tmp_path / "hf" / "tokenizer.model").is_file()
    prompt = tokens[:, :8]
    how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(back.generate(prompt, assistant_early_exit=2, **how), theirs.generate(prompt, **how))
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint(shape), tmp_path / "hf")


# What can't be in config.json: the change, and words of the message that must come.
BAD_CONFIG = {
    "architecture": (dict(model_type="mistral"), "mistral"),
    "bias": (dict(attention_bias=True), "attention_bias"),
    "rope": (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "'yarn' is not supported"),
    "dynamic rope": (
        dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)),
        "'dynamic' is not supported",
    ),
    "rope without its number": (dict(rope_parameters=None, rope_scaling=dict(type="linear")), "with factor a number"),
    "part of a head": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
        "partial_rotary_factor",
    ),
    "field": (dict(hidden_size=None), "hidden_size"),
    "text for a number": (dict(num_hidden_layers="4"), "num_hidden_layers is '4'"),
    "odd head": (dict(head_dim=15), "head_dim = 15"),
    "heads": (dict(num_key_value_heads=3), "3 key/value heads"),
    "shape": (dict(intermediate_size=80), "layers.0.mlp.gate_proj.weight has the shape (96, 64)"),
    "layers": (dict(num_hidden_layers=5), "model.layers.4"),
    "fewer layers": (dict(num_hidden_layers=3), "model.layers.3.input_layernorm.weight is not part of"),
    "too many layers": (dict(num_hidden_layers=1001), "num_hidden_layers is 1001"),
    "quantized": (dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
    "tied in words": (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    "other tokenizer": (dict(vocab_size=100), "don't belong together"),
}


def damage(folder, case):
    """Break a good Hugging Face folder in one way; returns words of the message that must come."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if case in BAD_CONFIG:
        changes, words = BAD_CONFIG[case]
        edit_json(config, **changes)
        return words
    match case:
        case "tokenizer class":
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
            return "tokenizer_class GemmaTokenizer is not supported"
        case "no objects":
            config.write_text("[]")
            return "config.json: not a JSON object"
        case "eos":
            edit_json(config, eos_token_id=99999)
            (folder / "generation_config.json").unlink()
            return "eos_ids"
        case "bias tensor" | "integer tensor" | "not a number" | "infinity":
            return damage_tensor(weights, case)
        case "eos true":
            edit_json(config, eos_token_id=True)
            (folder / "generation_config.json").unlink()
            return "eos_token_id is True"
        case "json":
            config.write_text('{"model_type": ')
            return "config.json: not readable"
        case "no config":
            config.unlink()
            return "config.json: not found"
        case "no weights":
            weights.unlink()
            return "neither model.safetensors"
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
            return "model.safetensors: truncated"
        case "truncated bin":
            torch.save({"a": torch.zeros(1000)}, folder / "pytorch_model.bin")
            data = (folder / "pytorch_model.bin").read_bytes()
            (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
            weights.unlink()
            return "pytorch_model.bin: truncated"
        case "shard":
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            )
            return "model-00001-of-00002.safetensors: not found"
        case "no tokenizer":
            (folder / "tokenizer.model").unlink()
            return "neither tokenizer.json nor tokenizer.model"
        case "bad tokenizer":
            (folder / "tokenizer.model").write_bytes(b"\x00nonsense")
            return "tokenizer.model: not a readable tokenizer"


def damage_tensor(weights, case):
    """The same for one of the tensors."""
    tensors, name = load_file(weights), "model.layers.1.self_attn.q_proj.weight"
    match case:
        case "bias tensor":
            tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
            words = "q_proj.bias is not part of"
        case "integer tensor":
            tensors[name] = tensors[name].to(torch.int8)
            words = "q_proj.weight is int8"
        case "not a number":
            tensors[name][3, 5] = torch.nan
            words = "q_proj.weight holds values that are not finite"
        case "infinity":
            tensors[name][3, 5] = -torch.inf
            words = "q_proj.weight holds values that are not finite"
    save_file(tensors, weights, metadata={"format": "pt"})
    return words


CASES = [
    *BAD_CONFIG,
    "no objects",
    "eos",
    "json",
    "no config",
    "no weights",
    "truncated",
    "truncated bin",
    "shard",
    "bias tensor",
    "integer tensor",
    "not a number",
    "eos true",
    "infinity",
    "tokenizer class",
    "no tokenizer",
    "bad tokenizer",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_folders_leave_nothing_behind(case, hf_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder("llama2")[0], folder, ignore=shutil.ignore_patterns("model.pth", "model.json"))
    words = damage(folder, case)
    with pytest.raises(InputError) as error:
        convert(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(folder.glob("model.pth*")) and not list(folder.glob("model.json*"))


@pytest.mark.parametrize(
    "case", ["missing", "truncated", "no description", "wrong description", "lacks a field", "not json"]
)
def test_bad_checkpoints(case, checkpoint, tmp_path):
    path = tmp_path / "model.pth"
    shutil.copy(checkpoint("llama2"), path)
    shutil.copy(checkpoint("llama2").with_suffix(".json"), tmp_path)
    description = tmp_path / "model.json"
    match case:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:5000])
        case "no description":
            description.unlink()
        case "wrong description":
            edit_json(description, dim=32)
        case "lacks a field":
            description.write_text(json.dumps({"vocab_size": 3}))
        case "not json":
            description.write_text("{")
    with pytest.raises(InputError) as error:
        load_model(path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_is_said_before_it_is_taken(checkpoint, monkeypatch, tmp_path):
    path = checkpoint("llama2")
    with pytest.raises(InputError, match=r"a KV cache of 1000000000000 positions needs .* GB, but cpu has only"):
        load_model(path).setup_caches(10**12)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    monkeypatch.setattr(
        "builtins.open", lambda *a, real=open: real(tmp_path / "meminfo") if a[0] == "/proc/meminfo" else real(*a)
    )
    with pytest.raises(InputError, match=r"model.pth in bfloat16 needs .* GB, but cpu has only 0.00 GB free"):
        load_model(path, dtype=torch.bfloat16)
