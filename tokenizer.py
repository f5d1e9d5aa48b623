"""Text to token ids and back, chat templates included: what transformers' AutoTokenizer makes of the same folder.

A tokenizer.json is read by the `tokenizers` library, and a sentencepiece tokenizer.model is turned into the same kind
of object; which normalizer and pre-tokenizer it gets is decided as transformers 5 does, by the tokenizer class that
the folder names. Llama 3's own tokenizer.model, a tiktoken file, is read by `tiktoken`.
"""

import base64
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tiktoken
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

from command import InputError

# The pattern that both Llama 3's tokenizer.json and the model card of its tiktoken file print; data of that format.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
STANDARD_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces in a sentencepiece model


class Tokenizer:
    """What every kind of tokenizer has. `Tokenizer.load(folder)` gives the right one.

    Attributes: vocab_size, the number of ids, those of added tokens included; core_size, that without them;
    special_ids, the ids that no text shows; added, {text: id} of the tokens that are matched whole in a text; roles,
    {"bos_token": text, ...}; bos_id and eos_id (None where there is no such token); template, the chat template (None
    where there is none).
    """

    vocab_size: int
    core_size: int
    special_ids: frozenset[int]
    added: dict[str, int]
    roles: dict[str, str]
    template: str | None
    folder: Path
    model_size: int | None = None  # ids that the model beside it knows, once `check_model` was told

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """The tokenizer in a checkpoint folder. Raises InputError if there is none or it can't be read."""
        folder = Path(folder)
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        file = fast if fast.is_file() else model
        if not file.is_file():
            raise InputError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
        settings = Settings.read(folder)
        try:
            if file == model and is_tiktoken(model):
                return TiktokenTokenizer(folder, settings)
            return BackendTokenizer(folder, settings)
        except InputError:
            raise
        except Exception as error:  # each library has errors of its own for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{file}: not a readable tokenizer ({reason})") from None

    def check_model(self, vocab_size: int) -> None:
        """Raise InputError unless a model of `vocab_size` tokens can have been made for this tokenizer. Added tokens
        may lie beyond, as in folders that a padding token was added to: `encode` then refuses texts with them.
        """
        if self.core_size > vocab_size:
            raise InputError(
                f"{self.folder}: the tokenizer has {self.core_size} tokens, the model only {vocab_size}: "
                "they don't belong together"
            )
        self.model_size = vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._role_id("eos_token")

    def _role_id(self, name: str) -> int | None:
        text = self.roles.get(name)
        return None if text is None else self.added.get(text)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text. Tokens such as `<s>` in it become their ids.

        special: add what the tokenizer puts around a text, such as BOS. Raises InputError if the text isn't valid
        Unicode, or has a token that the model doesn't know.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text is not valid UTF-8") from None
        try:
            ids = self._encode(text, special)
        except InputError:
            raise
        except Exception as error:  # tiktoken gives up on a million spaces, for one
            raise InputError(f"the text can't be turned into tokens ({str(error).splitlines()[0]})") from None
        if self.model_size is not None and max(ids, default=0) >= self.model_size:
            unknown = next((token for token, id in self.added.items() if id == max(ids)), f"token id {max(ids)}")
            raise InputError(f"the text has {unknown} in it, which is a token of the tokenizer but not of the model")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids without special tokens. Ids beyond the vocabulary, which a padded model has, show nothing."""
        raise NotImplementedError

    def table(self) -> dict[str, int]:
        """{token: id} of the whole vocabulary."""
        raise NotImplementedError

    def _encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def _save(self, folder: Path) -> dict:
        """Write what this kind of tokenizer has; returns the settings that belong to it."""
        raise NotImplementedError

    def is_shown(self, token: int) -> bool:
        """Whether the id is part of a text at all. The others, special tokens and ids without one, don't even part
        what is beside them.
        """
        raise NotImplementedError

    def is_byte(self, token: int) -> bool:
        """Whether the id is one byte of a character, whose text depends on all bytes beside it."""
        return False

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The text that the chat template makes of messages, dicts with `role` and `content`.

        Raises InputError if the folder has no template, or the template refuses the messages.
        """
        if self.template is None:
            raise InputError(f"{self.folder}: has no chat template, so --chat can't be used with it")
        try:
            return (
                chat_environment()
                .from_string(self.template)
                .render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.roles,
                )
            )
        except Exception as error:  # whatever a template can do wrong
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.folder}: its chat template can't render this conversation ({reason})") from None

    def chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation and of the header of the answer to it."""
        return self.encode(self.render(messages), special=False)  # the template writes BOS itself where it wants it

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder, so that this class and transformers read the same from them."""
        folder = Path(folder)
        if (self.folder / "tokenizer.model").is_file():
            shutil.copy(self.folder / "tokenizer.model", folder / "tokenizer.model")
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.roles,
            "clean_up_tokenization_spaces": False,
            **self._save(folder),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether two tokenizers read texts alike and ids that both have mean the same: then one model can draft for
        another.
        """
        ours, theirs = self.table(), other.table()
        common = min(len(ours), len(theirs))
        kept = {token: id for token, id in ours.items() if id < common}
        if kept != {token: id for token, id in theirs.items() if id < common}:
            return False
        return all(self.encode(text, special=False) == other.encode(text, special=False) for text in SAMPLES)


class Text:
    """Turns a stream of ids into text: `push(id)` returns the text that has become certain, `flush` the rest.

    The pieces joined are what decoding prompt and ids at once gives, less the prompt's text. Holds back what a
    following id could still change: half a character, or the beginning of a stop string. After a stop string
    `stopped` is true, and the text ends before it. Each id costs the same, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = [id for id in prompt if tokenizer.is_shown(id)]  # decoded together with new ones
        self.taken = len(self.ids)  # of them, those whose text has been returned
        self.known = len(tokenizer.decode(self.ids))  # the length of that text
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        if not self.tokenizer.is_shown(token):
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if self.tokenizer.is_byte(token) or text.endswith("\ufffd") or len(text) <= self.known:
            return ""
        self.held += text[self.known :]
        self.ids = self.ids[self.taken :]  # the last piece is enough to show how a following id reads
        self.taken, self.known = len(self.ids), len(self.tokenizer.decode(self.ids))
        return self._release(last=False)

    def flush(self) -> str:
        if self.stopped:
            return ""
        self.held += self.tokenizer.decode(self.ids)[self.known :]
        return self._release(last=True)

    def _release(self, last: bool) -> str:
        """What is certain of the text held back: all of it before a stop string, or before the possible beginning of
        one.
        """
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        self.stopped = bool(found)
        beginning = 0
        if not last:
            beginning = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        certain = min(found, default=len(self.held) - beginning)
        text, self.held = self.held[:certain], self.held[certain:]
        return text


SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(self, x=3.14159):\n\treturn [i ** 2 for i in range(1000)]\n\n",
    "Prénom, naïve; 東京, Москва, ελληνικά, العربية 🙂👍🏽",
    "I'll say it's 12,345.67 (or 1e-9)... isn't it?\r\n",
)


# What the folder says of its tokenizer, beside the vocabulary.


@dataclass
class Settings:
    """tokenizer_config.json and the older files beside it, put together as transformers does.

    kind: the tokenizer class, without "Fast"; "" where none is named. values: what the files say. added: added tokens
    in the order of their ids. roles: tokens by their role, such as bos_token; None where a file says that there is
    none. extra: further special tokens; None where tokenizer_config.json doesn't list any. configured: whether that
    file is there.
    """

    kind: str
    values: dict
    configured: bool
    added: list[AddedToken] = field(default_factory=list)
    roles: dict[str, AddedToken | None] = field(default_factory=dict)
    extra: list[AddedToken] | None = None
    older_extra: list[AddedToken] = field(default_factory=list)  # of special_tokens_map.json, where extra is None
    template: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Raises InputError if one of the files is not what it should be."""
        path = folder / "tokenizer_config.json"
        own = read_object(path)
        kind = own.get("tokenizer_class") or read_object(folder / "config.json").get("tokenizer_class") or ""
        if not isinstance(kind, str):
            raise InputError(f"{path}: tokenizer_class is {kind!r}; a name was expected")
        settings = cls(kind.removesuffix("Fast"), dict(own), path.exists())
        if settings.kind not in CLASSES and settings.kind not in PLAIN_CLASSES:
            advice = "if tokenizer.json is right as it is, change it to PreTrainedTokenizerFast"
            raise InputError(f"{path}: tokenizer_class {kind} is not supported; {advice}")
        try:
            settings._read_roles(folder)
            settings._read_added(folder)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"{path}: not a readable list of tokens ({error})") from None
        settings.template = read_template(folder, settings.values)
        return settings

    def _read_roles(self, folder: Path) -> None:
        values = self.values
        extra = values.get("extra_special_tokens")
        if not extra and "additional_special_tokens" in values:  # the older name
            extra = values.pop("additional_special_tokens")
        if isinstance(extra, dict):  # special tokens with roles of their own
            values |= extra
        elif extra is not None:
            self.extra = [added_token(value) for value in extra]
        if "added_tokens_decoder" not in values:
            for name, value in read_object(folder / "special_tokens_map.json").items():
                values[name] = {**value, "__type": "AddedToken", "special": True} if isinstance(value, dict) else value
        self.older_extra = [added_token(value) for value in values.get("additional_special_tokens") or []]
        others = (name for name in values if name.endswith("_token") and name not in STANDARD_ROLES)
        for name in (*STANDARD_ROLES, *others):
            value = values.get(name)
            if isinstance(value, str) or isinstance(value, dict) and (name in STANDARD_ROLES or "__type" in value):
                self.roles[name] = added_token(value)
            elif name in values and value is None:
                self.roles[name] = None

    def _read_added(self, folder: Path) -> None:
        if "added_tokens_decoder" in self.values:
            by_id = {int(id): added_token(value) for id, value in self.values["added_tokens_decoder"].items()}
        else:
            special = {token.content for token in [*self.roles.values(), *(self.extra or [])] if token}
            by_id = {
                id: AddedToken(text, normalized=text not in special, special=text in special)
                for text, id in read_object(folder / "added_tokens.json").items()
            }
            tokens = read_object(folder / "tokenizer.json").get("added_tokens") or []
            by_id |= {token["id"]: added_token(token) for token in tokens}
        self.added = [by_id[id] for id in sorted(by_id)]
        described = {token.content: token for token in self.added}
        for name, token in self.roles.items():
            if token:
                self.roles[name] = described.get(token.content, token)

    def role_texts(self) -> dict[str, str]:
        return {name: token.content for name, token in self.roles.items() if token}

    def defaults(self, **roles: str) -> None:
        """Set roles that the folder doesn't mention."""
        described = {token.content: token for token in self.added}
        for name, text in roles.items():
            self.roles.setdefault(name, described.get(text) or AddedToken(text, special=True))


def added_token(value: str | dict) -> AddedToken:
    """An added token from its text, which is then a special one, or from the JSON object that describes it."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], **{name: value[name] for name in TOKEN_FLAGS if name in value})


def read_object(path: Path) -> dict:
    """The JSON object in a file; {} if there is no such file. Raises InputError if it holds something else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model holds tiktoken's lines of `base64 rank` rather than a sentencepiece protobuf."""
    with open(path, "rb") as file:
        line = file.readline(4096).split()
    try:
        return len(line) == 2 and line[1].isdigit() and bool(base64.b64decode(line[0], validate=True))
    except ValueError:
        return False


# Chat templates.


def read_template(folder: Path, settings: dict) -> str | None:
    """The folder's chat template: that in a file of its own, or else that in tokenizer_config.json, or None."""
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
    except (ValueError, OSError):
        raise InputError(f"{file}: not a readable UTF-8 text") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, with names
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said, for training. Here it renders its
    content.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def chat_environment() -> jinja2.Environment:
    """Where chat templates run: jinja2's sandbox, with what transformers offers them and nothing else."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    del environment.globals["lipsum"]  # makes texts of any length
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


# tokenizer.json and sentencepiece, both on the `tokenizers` library.


class BackendTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from tokenizer.json or from a sentencepiece tokenizer.model."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder = folder
        self.backend = read_backend(folder, settings)
        add_tokens(self.backend, settings)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = bool(settings.values.get("split_special_tokens", False))
        if settings.values.get("clean_up_tokenization_spaces") and not isinstance(self.backend.model, BPE):
            raise InputError(f"{folder}: clean_up_tokenization_spaces is true, which is not supported; set it to false")
        tokens = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in tokens.items() if token.special)
        self.added = {token.content: id for id, token in tokens.items()}
        self.core_size = self.backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.roles = settings.role_texts()
        self.template = settings.template
        self.fill = self.roles.get("fill_token") if settings.kind == "CodeLlamaTokenizer" else None
        has_bytes = "ByteFallback" in repr(self.backend.decoder)
        names = (f"<0x{byte:02X}>" for byte in range(256) if has_bytes)
        self._bytes = frozenset(id for id in map(self.backend.token_to_id, names) if id is not None)

    def _encode(self, text: str, special: bool) -> list[int]:
        if self.fill and self.fill in text:
            raise InputError(f"the text has {self.fill} in it: CodeLlama's infilling is not supported")
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def table(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def is_shown(self, token: int) -> bool:
        return token not in self.special_ids and self.backend.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        return token in self._bytes

    def _save(self, folder: Path) -> dict:
        self.backend.save(str(folder / "tokenizer.json"))
        return {"split_special_tokens": self.backend.encode_special_tokens}


def read_backend(folder: Path, settings: Settings) -> tokenizers.Tokenizer:
    """The library's tokenizer with everything but the tokens that the settings add.

    Some tokenizer classes of transformers 5 take vocabulary, merges and post-processor from the files and bring a
    normalizer, pre-tokenizer and decoder of their own; the others take tokenizer.json as it is.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return sentencepiece_backend(folder / "tokenizer.model", settings)
    whole = tokenizers.Tokenizer.from_file(str(file))
    if settings.extra is None:
        settings.extra = settings.older_extra
    if whole.padding:
        settings.defaults(pad_token=whole.padding["pad_token"])
    text = file.read_text(encoding="utf-8")
    if settings.kind == "LlamaTokenizer" and '"ByteLevel"' in text:  # Llama 3's, wrongly labelled
        return whole
    if settings.kind not in CLASSES:
        return whole
    if not isinstance(whole.model, BPE):
        kind = type(whole.model).__name__
        raise InputError(f"{file}: a {kind} model, which {settings.kind}, named in tokenizer_config.json, can't have")
    model = json.loads(text)["model"]
    merges: list[Any] = []
    for pair in model["merges"]:  # written in two ways
        merges.append(tuple(pair.split(" ") if isinstance(pair, str) else pair))
    backend = CLASSES[settings.kind](model["vocab"], merges, settings)
    if settings.kind == "CodeLlamaTokenizer":
        frame_texts(backend, settings, bos=True)
    elif settings.kind != "GPTNeoXTokenizer":  # which adds nothing to a text, whatever the file says
        backend.post_processor = whole.post_processor
    return backend


def add_tokens(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Add the tokens that the settings name and the backend doesn't have as they are described."""
    present = backend.get_added_tokens_decoder().values()
    described = {repr(token) for token in present}
    new = [token for token in settings.added if repr(token) not in described]
    names = {token.content for token in [*present, *new]}
    roles = [token for token in settings.roles.values() if token and token.content]
    for token in [*roles, *(settings.extra or [])]:
        if token.content not in names and token not in new:
            new.append(token)
    for token in new:
        if token.content in {role.content for role in roles}:
            token.special = True
    backend.add_tokens(new)


def frame_texts(backend: tokenizers.Tokenizer, settings: Settings, bos: bool, eos: bool = False) -> None:
    """Make the backend put BOS before, and EOS behind, each text."""
    first, last = settings.roles.get("bos_token"), settings.roles.get("eos_token")
    add_tokens(backend, settings)  # so that they have ids
    frame = ["$A"]
    if bos and first and first.content:
        frame.insert(0, first.content)
    if eos and last and last.content:
        frame.append(last.content)
    special = [(text, backend.token_to_id(text)) for text in frame if text != "$A"]
    backend.post_processor = TemplateProcessing(single=frame, pair=[*frame, "$B:1"], special_tokens=special)


def llama_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """LlamaTokenizer: a space before the first word, or (legacy) before every piece of text between special tokens."""
    settings.defaults(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    prefix = settings.values.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "always" if settings.values.get("legacy", False) else "first"
    return word_start_backend(
        BPE(vocab, merges, fuse_unk=True, byte_fallback=True), scheme if prefix else "never", prefix
    )


def code_llama_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """CodeLlamaTokenizer: as LlamaTokenizer, with the tokens of its infilling format."""
    settings.defaults(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    infill = dict(prefix="▁<PRE>", middle="▁<MID>", suffix="▁<SUF>", eot="▁<EOT>", fill="<FILL_ME>")
    settings.defaults(**{f"{name}_token": text for name, text in infill.items()})
    prefix = settings.values.get("add_prefix_space")
    scheme = "first" if prefix is None or prefix else "never"
    unknown = settings.roles["unk_token"]
    model = BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown.content if unknown else None)
    return word_start_backend(model, scheme, True)


def word_start_backend(model: BPE, scheme: str, strip: bool) -> tokenizers.Tokenizer:
    """A tokenizer that writes spaces as ▁, before a text too. strip: whether the space before a text is dropped
    again.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * strip)
    return backend


def gpt2_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """GPT2Tokenizer: bytes, cut where GPT-2 cuts."""
    settings.defaults(unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    prefix = bool(settings.values.get("add_prefix_space", False))
    return byte_level_backend(vocab, merges, pre_tokenizers.ByteLevel(add_prefix_space=prefix))


def gpt_neox_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """GPTNeoXTokenizer: as GPT2Tokenizer, on composed characters."""
    settings.defaults(pad_token="<|padding|>")
    backend = gpt2_class(vocab, merges, settings)
    backend.normalizer = normalizers.NFC()
    return backend


def qwen2_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """Qwen2Tokenizer: bytes, every digit by itself."""
    settings.defaults(unk_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    prefix = bool(settings.values.get("add_prefix_space"))
    steps = [
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ]
    backend = byte_level_backend(vocab, merges, pre_tokenizers.Sequence(steps))
    backend.normalizer = normalizers.NFC()
    return backend


def byte_level_backend(
    vocab: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer: pre_tokenizers.PreTokenizer
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


CLASSES = {
    "LlamaTokenizer": llama_class,
    "CodeLlamaTokenizer": code_llama_class,
    "GPT2Tokenizer": gpt2_class,
    "GPTNeoXTokenizer": gpt_neox_class,
    "Qwen2Tokenizer": qwen2_class,
}
PLAIN_CLASSES = ("", "PreTrainedTokenizer", "TokenizersBackend")  # take the files as they are


def sentencepiece_backend(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """A sentencepiece model as a tokenizer of the library: by LlamaTokenizer's rules, or by the model's own."""
    from sentencepiece import sentencepiece_model_pb2  # wants protobuf, which only this needs: an optional package

    made_at_run_time: Any = sentencepiece_model_pb2
    proto = made_at_run_time.ModelProto()
    proto.ParseFromString(path.read_bytes())
    if not proto.pieces:
        raise InputError(f"{path}: not a readable tokenizer (it has no pieces)")
    llama = settings.kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if settings.kind in CLASSES and not llama:
        raise InputError(
            f"{path}: a sentencepiece model, which {settings.kind}, named in tokenizer_config.json, can't have"
        )
    if settings.extra is None:
        kinds = (CONTROL, USER_DEFINED) if llama else (CONTROL,)
        pieces = [piece for piece in proto.pieces if piece.type in kinds]
        settings.extra = [AddedToken(p.piece, normalized=False, special=p.type == CONTROL) for p in pieces]
    if llama:
        vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
        backend = CLASSES[settings.kind](vocab, halves(vocab), settings)
    else:
        backend = proto_backend(proto, settings)
    # Without a configuration BOS is added, as Llama's own code does; with one, transformers wants to be told.
    bos = settings.values.get("add_bos_token", settings.kind == "CodeLlamaTokenizer" or not settings.configured)
    frame_texts(backend, settings, bool(bos), bool(settings.values.get("add_eos_token", False)))
    return backend


def halves(vocab: dict) -> list[tuple[str, str]]:
    """The merges [(left, right), ...] that make each token of vocab {token: rank} out of two others, in order of
    rank.
    """
    merges = []
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    return merges


def proto_backend(proto: Any, settings: Settings) -> tokenizers.Tokenizer:
    """A sentencepiece model by its own rules: what its normalizer does, whether it puts a space before a text."""
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    for name, id, text in (
        ("bos_token", trainer.bos_id, trainer.bos_piece or "<s>"),
        ("eos_token", trainer.eos_id, trainer.eos_piece or "</s>"),
        ("unk_token", trainer.unk_id, trainer.unk_piece or "<unk>"),
    ):
        if id >= 0:
            settings.defaults(**{name: text})
    names = {}
    if "added_tokens_decoder" in settings.values:
        names = {int(id): token["content"] for id, token in settings.values["added_tokens_decoder"].items()}
    if spec.add_dummy_prefix:
        settings.added = [unnormalized(token) for token in settings.added]
        settings.roles = {name: token and unnormalized(token) for name, token in settings.roles.items()}
    backend = tokenizers.Tokenizer(proto_model(proto, names))
    legacy = settings.values.get("legacy", True)
    backend.normalizer = normalizers.Sequence(proto_normalizers(spec, legacy))
    steps: list[Any] = []
    if spec.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        steps.append(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False))
    if user_defined := user_defined_pieces(proto):  # always whole, never merged with what is beside them
        longest_first = sorted(user_defined, key=len, reverse=True)
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated"))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace("▁", " ")]
    if trainer.byte_fallback:
        undo.append(decoders.ByteFallback())
    undo.append(decoders.Fuse())
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(undo)
    return backend


def unnormalized(token: AddedToken) -> AddedToken:
    """The token, matched in a text before the normalizer has seen it."""
    flags = {name: getattr(token, name) for name in TOKEN_FLAGS}
    return AddedToken(token.content, **{**flags, "normalized": False})


def user_defined_pieces(proto: Any) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]


def proto_model(proto: Any, names: dict[int, str]) -> BPE | Unigram:
    """The library's model. names: {id: text} of pieces, such as placeholders, that the folder's settings rename."""
    trainer = proto.trainer_spec
    kept = {piece.piece for id, piece in enumerate(proto.pieces) if id not in names}
    texts = [names[id] if id in names and names[id] not in kept else p.piece for id, p in enumerate(proto.pieces)]
    if trainer.model_type == trainer.UNIGRAM:
        pieces = [(text, piece.score) for text, piece in zip(texts, proto.pieces, strict=True)]
        return Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    normal = [
        (text, -p.score, id) for id, (text, p) in enumerate(zip(texts, proto.pieces, strict=True)) if p.type == NORMAL
    ]
    rank = {text: (cost, id) for text, cost, id in normal}
    merges = sorted((*rank[left + right], left, right) for left, right in halves(rank))
    return BPE(
        {text: id for id, text in enumerate(texts)},
        [(left, right) for _, _, left, right in merges],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=bool(user_defined_pieces(proto)),
    )


def proto_normalizers(spec: Any, legacy: bool) -> list[normalizers.Normalizer]:
    """What sentencepiece does to a text before it cuts it, in its order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix and legacy:  # Metaspace adds none where there is one
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    return steps


# Llama 3's tiktoken file.


class TiktokenTokenizer(Tokenizer):
    """Llama 3's tokenizer.model: tiktoken ranks without their split pattern or special tokens, which belong to the
    format.
    """

    def __init__(self, folder: Path, settings: Settings):
        self.folder = folder
        lines = (line.split() for line in (folder / "tokenizer.model").read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(LLAMA3_SPECIAL) + 2)]
        self.added = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL + reserved)}
        named = settings.values.get("added_tokens_decoder", {})
        if named:  # the folder names them itself: the versions of Llama 3 use different names
            self.added = {token["content"]: int(id) for id, token in named.items() if token["content"]}
        self.bos = settings.values.get("add_bos_token", True)
        self.eos = settings.values.get("add_eos_token", False)
        self.model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.added
        )
        self.ordinary = len(ranks)
        self.core_size = self.vocab_size = self.model.n_vocab
        self.special_ids = frozenset(self.added.values())
        settings.defaults(bos_token=LLAMA3_SPECIAL[0], eos_token=LLAMA3_SPECIAL[1])
        self.roles = settings.role_texts()
        self.template = settings.template

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = self.model.encode(text, allowed_special="all")
        if special and self.bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if special and self.eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([id for id in ids if self.is_shown(id)])

    def is_shown(self, token: int) -> bool:
        return token < self.ordinary

    def table(self) -> dict[str, int]:
        ordinary = {token.decode("latin-1"): id for id, token in enumerate(self.model.token_byte_values())}
        return {**ordinary, **self.added}

    def _save(self, folder: Path) -> dict:
        tokens = {id: dict(content=text, special=True, normalized=False) for text, id in self.added.items()}
        return {"add_bos_token": self.bos, "add_eos_token": self.eos, "added_tokens_decoder": tokens}
