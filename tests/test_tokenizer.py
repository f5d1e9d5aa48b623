"""The three kinds of tokenizer files behind one interface."""
import base64

import pytest
from conftest import write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from model import InputError
from tokenizer import Tokenizer

TEXT = "def f1(x):\n    return x * 3  # é漢🙂"


def write_tiktoken(folder):
    """Byte-level ranks as Llama 3's tokenizer.model has them, with a few merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"re", b"tu", b"retu", b"rn", b"return", b"  ", b"    "]
    (folder / "tokenizer.model").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return len(tokens)


def write_fast(folder):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(["def f1(x): return x"] * 9, trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.save(str(folder / "tokenizer.json"))


def test_sentencepiece(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([tokenizer.bos_id] + tokenizer.encode("return x # é漢") + [tokenizer.eos_id, 10**6]) == "return x # é漢"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_tiktoken(tmp_path):
    ordinary = write_tiktoken(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 10**6]) == TEXT and max(ids) < ordinary
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (ordinary, ordinary + 1, ordinary + 256)  # as Llama 3's 128000, 128001, 128256
    assert tokenizer.encode("<|begin_of_text|>") != [tokenizer.bos_id]  # text never smuggles in a special token


def test_tokenizer_json(tmp_path):
    write_fast(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([0, *ids]) == TEXT and tokenizer.bos_id is None


@pytest.mark.parametrize("name,content", [("tokenizer.model", b""), ("tokenizer.model", b"YQ== 0\nnot base64 1\n"), ("tokenizer.model", b"\x00\x01"),
                                          ("tokenizer.json", b"{"), ("tokenizer.json", b"")])
def test_damaged_files_are_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)
