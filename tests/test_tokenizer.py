"""Tokenizers of every kind against transformers' AutoTokenizer: ids, text, streamed text, chat, and folders written
back.
"""

import base64
import functools
import io
import json
import random

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from command import InputError
from conftest import edit_json
from tokenizer import Text, Tokenizer

CORPUS = [
    "def f(self, x): return self.value + x\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
    "for i in range(100): print('the end of the line', i)\n",
    "The quick brown fox jumps over the lazy dog. 12345\n",
] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
TEXTS = [
    "",
    " ",
    "def f(self):",
    " x",
    "   three spaces,  two inside, one at the end ",
    "\n\n\ta line\r\n",
    "return<s>self</s> and <s> self",
    "<|im_start|>user\nhello<|im_end|>\n<|end|>",
    "call <tool>x</tool> y  <tool>  z",
    "é e\u0301 漢字 🙂👍🏽 ﬁ ① \u00a0\u200b\ufeff",
    "▁x ▁▁ y",
    "I'LL don't 1234567 x=1e-9",
    "<unk> \x00 <0x41>",
    "word " * 300,
]


# Folders: each function writes the tokenizer's files.


@functools.cache
def sentencepiece_model(**how):
    from sentencepiece import SentencePieceTrainer

    file = io.BytesIO()
    defaults = dict(
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    lines = iter([line.rstrip("\n") for line in CORPUS])
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **{**defaults, **how})
    return file.getvalue()


def spm(folder, how=None, **config):
    """tokenizer.model; with a tokenizer_config.json if anything is to be in it."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**(how or {})))
    if config:
        write_config(folder, **config)


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


LLAMA = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)


def spm_json(folder, normalizer=True, **config):
    """tokenizer.json as Llama 2 has it: spaces become ▁ in the normalizer, BOS comes from the post-processor."""
    from transformers import LlamaTokenizer

    spm(folder, **LLAMA, add_bos_token=True)
    backend = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    if normalizer:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    write_config(folder, **config)


def byte_level(folder, bos=True, pre_tokenizer=None, added=(), edit=None, **config):
    """tokenizer.json on bytes, as GPT-2 or Llama 3 have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(list(added))
    if bos:
        special = [(SPECIAL[0], 0)]
        backend.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    if edit:
        edit_json(folder / "tokenizer.json", **edit)
    if config:
        write_config(folder, bos_token=SPECIAL[0], eos_token=SPECIAL[3], **config)


def llama3_split():
    pattern = r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_first():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def spm_added(folder):
    """A fine-tuned Llama 2 in the layout of older transformers: tokens in files beside tokenizer.model."""
    spm(folder, **LLAMA, add_bos_token=True)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<tool>": 401, "</tool>": 402}))
    special = dict(bos_token=dict(content="<s>", lstrip=False, rstrip=False, normalized=False, single_word=False))
    special["additional_special_tokens"] = ["<|im_start|>"]
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def spm_decoder(folder):
    """The same in the layout of newer ones, with tokens that take the spaces beside them."""
    spm(folder, **LLAMA, add_bos_token=True, add_eos_token=True)
    flags = dict(normalized=False, single_word=False)
    tokens = {
        400: dict(content="<|im_start|>", special=True, lstrip=False, rstrip=True, **flags),
        401: dict(content="<tool>", special=False, lstrip=True, rstrip=False, **flags),
        402: dict(content="</tool>", special=False, lstrip=False, rstrip=False, **flags),
    }
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)


def several_templates(folder):
    templates = [dict(name="tool_use", template="tools"), dict(name="default", template=CHATML)]
    byte_level(folder, bos=False, tokenizer_class="PreTrainedTokenizerFast", chat_template=templates)


def template_file(folder):
    byte_level(folder, tokenizer_class="PreTrainedTokenizerFast", chat_template="not this one")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)


def truncating(folder):
    """Truncation and padding stand in the file; a text is encoded whole all the same."""
    padding = dict(
        strategy=dict(Fixed=64), direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="x"
    )
    truncation = dict(direction="Right", max_length=7, strategy="LongestFirst", stride=0)
    edit = dict(padding=padding, truncation=truncation)
    byte_level(folder, edit=edit, tokenizer_class="PreTrainedTokenizerFast")


def unigram(folder):
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        ("▁the", -3.0),
        ("▁x", -3.5),
        ("s", -4.0),
        ("e", -4.0),
    ]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.save(str(folder / "tokenizer.json"))
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>")


FAST = dict(tokenizer_class="PreTrainedTokenizerFast")
TOOLS = [AddedToken("<tool>", special=False, normalized=False), AddedToken("</tool>", special=True, rstrip=True)]
KINDS = {
    "spm": lambda f: spm(f, **LLAMA, add_bos_token=True),
    "spm, no BOS": lambda f: spm(f, **LLAMA, add_bos_token=False),
    "spm, BOS not mentioned": lambda f: spm(f, **LLAMA),
    "spm, BOS and EOS": lambda f: spm(f, **LLAMA, add_bos_token=True, add_eos_token=True),
    "spm, no space in front": lambda f: spm(f, **LLAMA, add_bos_token=True, add_prefix_space=False),
    "spm, legacy": lambda f: spm(f, **{**LLAMA, "legacy": True}, add_bos_token=True),
    "spm, no class": lambda f: spm(f, add_bos_token=True, legacy=False),
    "spm, split digits, own line tokens": lambda f: spm(
        f, dict(split_digits=True, add_dummy_prefix=False, user_defined_symbols="\n"), add_bos_token=True
    ),
    "spm, unigram and NFKC": lambda f: spm(
        f,
        dict(model_type="unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
        add_bos_token=True,
    ),
    "spm, no bytes": lambda f: spm(f, dict(byte_fallback=False), **LLAMA, add_bos_token=True),
    "spm, added tokens in files": spm_added,
    "spm, added tokens in the configuration": spm_decoder,
    "Llama 2's json": lambda f: spm_json(f, **LLAMA),
    "Llama 2's json, legacy": lambda f: spm_json(f, **{**LLAMA, "legacy": True}),
    "Llama 2's json, BOS contradicted": lambda f: spm_json(f, **LLAMA, add_bos_token=False),
    "Llama 2's json as it is": lambda f: spm_json(f, **FAST),
    "Llama 2's json, no class": lambda f: spm_json(f, bos_token="<s>"),
    "CodeLlama's json": lambda f: spm_json(f, normalizer=False, **{**LLAMA, "tokenizer_class": "CodeLlamaTokenizer"}),
    "bytes": lambda f: byte_level(f, **FAST),
    "bytes, Llama 3's cuts": lambda f: byte_level(f, pre_tokenizer=llama3_split(), **FAST),
    "bytes, wrongly called Llama": lambda f: byte_level(
        f, pre_tokenizer=llama3_split(), tokenizer_class="LlamaTokenizerFast"
    ),
    "bytes, GPT-2's class": lambda f: byte_level(
        f, bos=False, pre_tokenizer=digits_first(), tokenizer_class="GPT2Tokenizer"
    ),
    "bytes, GPT-NeoX's class": lambda f: byte_level(f, tokenizer_class="GPTNeoXTokenizerFast"),
    "bytes, Qwen 2's class": lambda f: byte_level(f, bos=False, tokenizer_class="Qwen2Tokenizer"),
    "bytes, added tokens": lambda f: byte_level(f, added=TOOLS, **FAST),
    "bytes, a token the model lacks": lambda f: byte_level(f, pad_token="<pad>", image_token="<image>", **FAST),
    "bytes, special tokens are text": lambda f: byte_level(f, split_special_tokens=True, **FAST),
    "bytes, nothing but the file": lambda f: byte_level(f),
    "truncation in the file": truncating,
    "unigram": unigram,
    "several templates": several_templates,
    "template in a file": template_file,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Function: kind -> (folder, our tokenizer, transformers')."""

    @functools.cache
    def make(kind):
        from transformers import AutoTokenizer

        folder = tmp_path_factory.mktemp("kind")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        KINDS[kind](folder)
        return folder, Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)

    return make


def some_ids(tokenizer, count=200):
    """Random id sequences; many of them in the first 300 ids, where special tokens and bytes are."""
    chance = random.Random(0)
    for _ in range(count):
        top = chance.choice([300, tokenizer.vocab_size])
        yield [chance.randrange(top) for _ in range(chance.randrange(1, 14))]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(kind, pair):
    _, ours, theirs = pair(kind)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids, text
    for ids in some_ids(ours):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
    assert ours.roles == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", [*KINDS, "tiktoken"])
def test_streamed_pieces_join_to_the_whole_text(kind, pair, tmp_path):
    if kind == "tiktoken":
        write_tiktoken(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
    else:
        tokenizer = pair(kind)[1]
    for ids in some_ids(tokenizer):
        cut = len(ids) // 3
        text = Text(tokenizer, ids[:cut])
        pieces = [text.push(id) for id in ids[cut:]] + [text.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:cut])) :], ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_reads_the_same_here_and_in_transformers(kind, pair, tmp_path):
    from transformers import AutoTokenizer

    folder, ours, _ = pair(kind)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) == theirs(text).input_ids, text
    for ids in some_ids(ours, 50):
        assert again.decode(ids) == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert again.roles == ours.roles == theirs.special_tokens_map
    assert again.template == ours.template == theirs.chat_template


TALKS = [
    [dict(role="user", content="hi")],
    [
        dict(role="system", content=" be brief "),
        dict(role="user", content="hi"),
        dict(role="assistant", content="yes?"),
    ],
]


@pytest.mark.parametrize("kind", ["several templates", "template in a file"])
def test_chats_are_rendered_as_transformers_does(kind, pair):
    _, ours, theirs = pair(kind)
    for talk in TALKS:
        assert ours.render(talk) == theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        assert ours.chat(talk) == theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ loop.index0 }}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ '<é>' | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "whitespace": "  {% if true %}\n  a\n  {%- endif %}\n{{ eos_token }}\n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "tools": "{% if tools is none %}no tools{% endif %}{% if documents %}x{% endif %}{{ tools }}",
    "unset": "{{ date_string is defined }}{{ undefined_name }}{{ bos_token }}|",
    "time": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_may_use(name, pair):
    _, ours, theirs = pair("bytes")
    ours.template = theirs.chat_template = TEMPLATES[name]
    for talk in TALKS:
        for wanted in (True, False):
            expected = theirs.apply_chat_template(talk, add_generation_prompt=wanted, tokenize=False)
            assert ours.render(talk, wanted) == expected


@pytest.mark.parametrize(
    "template,words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{% if %}", "Expected"),
        (None, "has no chat template"),
    ],
)
def test_bad_templates_are_one_line(template, words, pair):
    _, tokenizer, _ = pair("bytes")
    tokenizer.template = template
    with pytest.raises(InputError) as error:
        tokenizer.render(TALKS[0])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_texts_with_a_token_beyond_the_model_are_refused(pair):
    _, tokenizer, _ = pair("bytes, a token the model lacks")
    tokenizer.check_model(366)
    with pytest.raises(InputError, match="<pad> in it, which is a token of the tokenizer but not of the model"):
        tokenizer.encode("x <pad> y")
    with pytest.raises(InputError, match="the tokenizer has 366 tokens, the model only 300"):
        tokenizer.check_model(300)
    with pytest.raises(InputError, match="not valid UTF-8"):
        tokenizer.encode("\udcff")


def test_which_tokenizers_can_draft_for_each_other(pair):
    plain, added, other, spm = (
        pair(kind)[1] for kind in ("bytes", "bytes, added tokens", "bytes, Qwen 2's class", "spm")
    )
    assert plain.same_as(plain) and plain.same_as(added) and added.same_as(plain)  # more tokens in one are no matter
    assert not plain.same_as(other)  # the same table, another way to cut
    assert not plain.same_as(spm) and not spm.same_as(plain)
    assert spm.same_as(pair("spm, no BOS")[1])  # what comes before a text is the target's to say


# Sentencepiece by its own rules, and tiktoken.


def test_the_demos_tokenizer_reads_as_sentencepiece_itself():
    from sentencepiece import SentencePieceProcessor

    from conftest import ROOT

    folder = ROOT / "checkpoints" / "demo"
    ours, theirs = Tokenizer.load(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for text in texts + ["  two\n\n\nthree ", "x\r\n\ty", "é漢🙂"]:
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)) == text


def write_tiktoken(folder):
    """Byte-level ranks as Llama 3's tokenizer.model has them, with a few merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"re", b"tu", b"retu", b"rn", b"return", b"  ", b"    "]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return len(tokens)


def test_tiktoken(tmp_path):
    ordinary = write_tiktoken(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "def f1(x):\n    return x * 3  # é漢🙂"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id and max(ids[1:]) < ordinary
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**6]) == text
    # as Llama 3's 128000, 128001 and 128256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (ordinary, ordinary + 1, ordinary + 256)
    assert tokenizer.encode("x<|eot_id|>", special=False) == [ord("x"), ordinary + 9]


def test_a_saved_tiktoken_file_reads_the_same_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "saved").mkdir()
    write_tiktoken(tmp_path)
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = Tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) == theirs(text).input_ids, text
    for ids in some_ids(ours, 50):
        assert again.decode(ids) == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


BROKEN = {
    "empty tokenizer.model": ("tokenizer.model", b""),
    "half a tiktoken file": ("tokenizer.model", b"YQ== 0\nnot base64 1\n"),
    "not sentencepiece": ("tokenizer.model", b"\x00\x01"),
    "half a tokenizer.json": ("tokenizer.json", b"{"),
    "empty tokenizer.json": ("tokenizer.json", b""),
    "configuration not JSON": ("tokenizer_config.json", b"{"),
    "configuration a list": ("tokenizer_config.json", b"[]"),
    "configuration not UTF-8": ("tokenizer_config.json", b'{"a": "\xff"}'),
    "class a number": ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
    "tokens a number": ("tokenizer_config.json", b'{"added_tokens_decoder": 3}'),
    "token without a text": ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {}}}'),
    "special tokens not objects": ("special_tokens_map.json", b"[3]"),
    "template not UTF-8": ("chat_template.jinja", b"\xff"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_one_line(case, tmp_path):
    name, content = BROKEN[case]
    if not name.startswith("tokenizer."):
        spm(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)
