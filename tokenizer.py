"""Text to token ids and back, and chat templates. The results are those of transformers' AutoTokenizer.

The `tokenizers` library reads a tokenizer.json. A sentencepiece tokenizer.model is turned into the same kind of object.
The tokenizer class that the folder names decides about its normalizer and pre-tokenizer, as in transformers 5.
Llama 3's own tokenizer.model is a tiktoken file, and `tiktoken` reads it.
"""

import base64
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from command import InputError, blaming, first_line, unheard
from files import check_fields, parse_json, read_object, read_text, replacing, write_json, write_text
from values import FLAG, NOTHING, OBJECT, TEXT, Kind, list_of, whole

# Where Llama 3 cuts a text into words. The same pattern is in its tokenizer.json and in the model card of its tiktoken
# file. It belongs to the format.
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
FLAGS = (  # of tokenizer_config.json
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "split_special_tokens",
)
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MOST_CHARACTERS = 256  # of a token on average; a text with more of them per token is not encoded
RENDER_SECONDS = 10.0  # for a chat template, which takes milliseconds
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces in a sentencepiece model


class Tokenizer:
    """What every kind of tokenizer has. `Tokenizer.load(folder)` gives the right kind."""

    vocab_size: int  # number of ids, with added tokens
    core_size: int  # number of ids, without added tokens
    special_ids: frozenset[int]  # ids that a decoded text does not show
    added: dict[str, int]  # {text: id} of the tokens that are always found whole in a text
    roles: dict[str, str]  # {"bos_token": text, ...}
    template: str | None  # the chat template
    folder: Path
    model_size: int | None = None  # number of ids that the model knows; `check_model` sets it

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """The tokenizer in a checkpoint folder. Raises InputError if there is none or it can't be read."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            file = folder / "tokenizer.model"
        if not file.is_file():
            raise InputError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
        settings = Settings.read(folder)
        with library(f"{file}: not a readable tokenizer"):
            if file.name == "tokenizer.model" and is_tiktoken(file):
                return TiktokenTokenizer(folder, settings)
            return BackendTokenizer(folder, settings)

    def check_model(self, vocab_size: int) -> None:
        """Raise InputError if a model of `vocab_size` tokens is too small for this tokenizer.

        Added tokens may be beyond the model's: some folders have a padding token that was added later. `encode` then
        refuses texts with such a token.
        """
        if self.core_size > vocab_size:
            raise InputError(
                f"{self.folder}: the tokenizer has {self.core_size} tokens, the model only {vocab_size}: "
                "they don't belong together"
            )
        self.model_size = vocab_size

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text; None if there is none."""
        return self._role_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a text; None if there is none."""
        return self._role_id("eos_token")

    def _role_id(self, name: str) -> int | None:
        text = self.roles.get(name)
        if text is None:
            return None
        return self.added.get(text)

    def encode(self, text: str, special: bool = True, context: int | None = None) -> list[int]:
        """The ids of a text. A special token such as `<s>` in the text becomes its id.

        special: add what the tokenizer puts around a text, such as BOS. context: how many tokens there is room for; a
        text that is much too long is refused at once, as encoding it could take minutes. Raises InputError for that,
        and if the text isn't valid Unicode, or has a token that the model doesn't know.
        """
        if context is not None and len(text) > context * MOST_CHARACTERS:
            raise InputError(
                f"the text has {len(text)} characters, which can't fit into the context of {context} tokens"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text is not valid UTF-8") from None
        with library(f"{self.folder}: its tokenizer can't turn the text into tokens"):
            ids = self._encode(text, special)
        highest = max(ids, default=0)
        if self.model_size is not None and highest >= self.model_size:
            unknown = self._name_of(highest)
            raise InputError(f"the text has {unknown} in it, which is a token of the tokenizer but not of the model")
        return ids

    def _name_of(self, token: int) -> str:
        """How an error message names an id."""
        for text, id in self.added.items():
            if id == token:
                return text
        return f"token id {token}"

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Special tokens give no text, nor do ids beyond the vocabulary, which a padded model has.

        Raises InputError if the tokenizer's own rules for it fail.
        """
        # Not `library`: this is within the decoding round, and what fails here fails without a word on stderr.
        with blaming(f"{self.folder}: its tokenizer can't turn tokens into text"):
            return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def table(self) -> dict[str, int]:
        """{token: id} of the whole vocabulary."""
        raise NotImplementedError

    def _encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def _save(self, folder: Path) -> dict:
        """Write the files of this kind of tokenizer. Returns its entries of tokenizer_config.json."""
        raise NotImplementedError

    def is_shown(self, token: int) -> bool:
        """Whether the id adds to a text. Special tokens and ids without a token don't: `decode` skips them."""
        raise NotImplementedError

    def is_byte(self, token: int) -> bool:
        """Whether the id is one byte. What it shows depends on the bytes beside it."""
        return False

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The text that the chat template makes of messages, which are dicts with `role` and `content`.

        add_generation_prompt: end with the header of the next answer. Raises InputError if the folder has no template,
        or the template refuses the messages or takes too long.
        """
        if self.template is None:
            raise InputError(f"{self.folder}: has no chat template, so --chat can't be used with it")
        known = dict(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
        try:
            with time_limit(RENDER_SECONDS):
                template = chat_environment().from_string(self.template)
                return template.render(**known, **self.roles)
        except Exception as error:  # a template is a program: it can fail in any way
            reason = first_line(error, type(error).__name__)
            raise InputError(f"{self.folder}: its chat template can't render this conversation ({reason})") from None

    def chat(self, messages: list[dict], context: int | None = None) -> list[int]:
        """The ids of a conversation, with the header of the next answer at the end.

        context: as for `encode`. Raises InputError as `render` and `encode` do.
        """
        return self.encode(self.render(messages), special=False, context=context)  # the template itself writes BOS

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder. This class and transformers read the same tokenizer from them."""
        folder = Path(folder)
        if (self.folder / "tokenizer.model").is_file():
            with replacing(folder / "tokenizer.model") as file:
                shutil.copy(self.folder / "tokenizer.model", file)
        if self.template is not None:
            write_text(folder / "chat_template.jinja", self.template)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.roles,
            "clean_up_tokenization_spaces": False,
            **self._save(folder),
        }
        write_json(folder / "tokenizer_config.json", settings, indent=2)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether two tokenizers agree, so that one model can draft for the other.

        They must give the same ids to SAMPLES, and the ids that both have must be the same tokens.
        """
        ours, theirs = self.table(), other.table()
        common = min(len(ours), len(theirs))
        if tokens_below(common, ours) != tokens_below(common, theirs):
            return False
        return all(self.encode(text, special=False) == other.encode(text, special=False) for text in SAMPLES)


@contextmanager
def library(what: str) -> Iterator[None]:
    """Around what loads a tokenizer's library and encodes by it: any failure, a panic of Rust too, is an InputError.

    what: what the message says has failed.
    """
    with unheard(), blaming(what):
        yield


def tokens_below(end: int, table: dict[str, int]) -> dict[str, int]:
    """The part of a {token: id} table whose ids are below `end`."""
    return {token: id for token, id in table.items() if id < end}


class Text:
    """Turns a stream of ids into text. `push(id)` returns the text that is certain by now, `flush()` returns the rest.

    Together the pieces are the text of prompt and ids, decoded at once, without the prompt's text. Some text must wait,
    as the next id could still change it: half a character, or the beginning of a stop string. After a stop string
    `stopped` is True, and the text ends before that string. An id costs the same however long the text already is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """prompt: the ids before the stream, whose end decides how the first new ids read. stop: the stop strings."""
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids = [id for id in prompt if tokenizer.is_shown(id)]  # decoded together with new ones
        self.taken = len(self.ids)  # how many of them have had their text returned
        self.known = len(tokenizer.decode(self.ids))  # the length of that text
        self.held = ""  # decoded, but not returned yet
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more id. Returns the text that is now certain; it may be empty."""
        if not self.tokenizer.is_shown(token):
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if self.tokenizer.is_byte(token) or text.endswith("\ufffd") or len(text) <= self.known:
            return ""
        self.held += text[self.known :]
        self.ids = self.ids[self.taken :]  # the last piece is enough to show how the next id reads
        self.taken = len(self.ids)
        self.known = len(self.tokenizer.decode(self.ids))
        return self._release(last=False)

    def flush(self) -> str:
        """The text that still waits. No more ids may come."""
        if self.stopped:
            return ""
        self.held += self.tokenizer.decode(self.ids)[self.known :]
        return self._release(last=True)

    def _release(self, last: bool) -> str:
        """Take what is certain out of `held`: the text before a stop string, or before what may become one."""
        found = []
        for stop in self.stop:
            place = self.held.find(stop)
            if place >= 0:
                found.append(place)
        self.stopped = bool(found)
        end = min(found, default=len(self.held))
        if not last and not found:
            end -= self._begun()
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _begun(self) -> int:
        """How many characters at the end of `held` may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(1, len(stop)):
                if self.held.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest


# Texts that tokenizers of different families cut differently.
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(self, x=3.14159):\n\treturn [i ** 2 for i in range(1000)]\n\n",
    "Prénom, naïve; 東京, Москва, ελληνικά, العربية 🙂👍🏽",
    "I'll say it's 12,345.67 (or 1e-9)... isn't it?\r\n",
)


# What the folder's files say about the tokenizer, apart from the vocabulary.

TOKEN_ID = whole(0, 2**31 - 1)


def is_token(value: object) -> bool:
    return TEXT.allows(value) or is_described(value)


def is_described(value: object) -> bool:
    """Whether it is an object with a token's text and flags."""
    if not isinstance(value, dict) or not TEXT.allows(value.get("content")):
        return False
    return all(FLAG.allows(value[name]) for name in TOKEN_FLAGS if name in value)


def is_listed(value: object) -> bool:
    """The same, with the token's id."""
    return isinstance(value, dict) and is_described(value) and TOKEN_ID.allows(value.get("id"))


def is_token_table(value: object) -> bool:
    """Whether it is {id in digits: token}."""
    if not isinstance(value, dict) or not all(map(is_token, value.values())):
        return False
    return all(name.isdecimal() and len(name) < 20 and TOKEN_ID.allows(int(name)) for name in value)


def is_template_list(value: object) -> bool:
    """Whether it is [{name: text, template: text}, ...]."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return False
    return all(TEXT.allows(entry.get("name")) and TEXT.allows(entry.get("template")) for entry in value)


TOKEN = Kind("a text or an object with its content", is_token)
TEMPLATES = Kind("a list of objects with the texts name and template", is_template_list)
LISTED = Kind("an object with the content, id and flags of a token", is_listed)
SETTINGS = {
    "tokenizer_class": TEXT | NOTHING,
    "chat_template": TEXT | OBJECT | TEMPLATES | NOTHING,
    "added_tokens_decoder": Kind("an object of tokens by their ids", is_token_table) | NOTHING,
    "additional_special_tokens": list_of(TOKEN) | NOTHING,
    "extra_special_tokens": list_of(TOKEN) | OBJECT | NOTHING,
    **dict.fromkeys(STANDARD_ROLES, TOKEN | NOTHING),
    **dict.fromkeys(FLAGS, FLAG | NOTHING),
}


@dataclass
class Settings:
    """What tokenizer_config.json and the older files beside it say, put together as transformers does."""

    kind: str  # the tokenizer class without "Fast"; "" if no file names one
    values: dict  # the entries of tokenizer_config.json, and what older files say in their place
    configured: bool  # whether tokenizer_config.json is there
    added: list[AddedToken] = field(default_factory=list)  # in the order of their ids
    roles: dict[str, AddedToken | None] = field(default_factory=dict)  # None: a file says that there is no such token
    extra: list[AddedToken] | None = None  # more special tokens; None if tokenizer_config.json has no list of them
    older_extra: list[AddedToken] = field(default_factory=list)  # those of special_tokens_map.json, if extra is None
    template: str | None = None  # the chat template

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """The settings of a folder. Raises InputError if one of the files is not what it should be."""
        path = source = folder / "tokenizer_config.json"
        own = read_object(path)
        check_fields(own, SETTINGS, path)
        kind = own.get("tokenizer_class")
        if not kind:
            source = folder / "config.json"
            config = read_object(source)
            check_fields(config, {"tokenizer_class": TEXT | NOTHING}, source)
            kind = config.get("tokenizer_class") or ""
        settings = cls(kind.removesuffix("Fast"), dict(own), path.exists())
        if settings.kind not in CLASSES and settings.kind not in PLAIN_CLASSES:
            advice = "if tokenizer.json is right as it is, change it to PreTrainedTokenizerFast"
            raise InputError(f"{source}: tokenizer_class {kind} is not supported; {advice}")
        with blaming(f"{path}, or a file beside it, has no readable list of tokens"):
            settings._read_roles(folder)
            settings._read_added(folder)
        settings.template = read_template(folder, settings.values)
        return settings

    def _read_roles(self, folder: Path) -> None:
        """Fill `roles`, `extra` and `older_extra`."""
        values = self.values
        self._read_extra()
        if values.get("added_tokens_decoder") is None:
            self._read_older_map(folder)
        self.older_extra = [added_token(value) for value in values.get("additional_special_tokens") or []]
        others = [name for name in values if name.endswith("_token") and name not in STANDARD_ROLES]
        for name in (*STANDARD_ROLES, *others):
            value: Any = values.get(name)
            is_token = isinstance(value, str)
            if isinstance(value, dict):  # under another name, an object need not be a token
                is_token = name in STANDARD_ROLES or "__type" in value
            if is_token:
                self.roles[name] = added_token(value)
            elif name in values and value is None:
                self.roles[name] = None

    def _read_extra(self) -> None:
        """The special tokens beside the standard ones: a list, or a dict in which each has a role."""
        extra = self.values.get("extra_special_tokens")
        if not extra and "additional_special_tokens" in self.values:  # the older name
            extra = self.values.pop("additional_special_tokens")
        if isinstance(extra, dict):
            self.values |= extra
        elif extra is not None:
            self.extra = [added_token(value) for value in extra]

    def _read_older_map(self, folder: Path) -> None:
        """Take what special_tokens_map.json says into `values`."""
        path = folder / "special_tokens_map.json"
        values = read_object(path)
        check_fields(values, SETTINGS, path)
        for name, value in values.items():
            if isinstance(value, dict):
                value = {**value, "__type": "AddedToken", "special": True}
            self.values[name] = value

    def _read_added(self, folder: Path) -> None:
        """Fill `added`, and give the roles the flags that are described there."""
        by_id = self._added_by_id(folder)
        self.added = [by_id[id] for id in sorted(by_id)]
        described = self._described()
        for name, token in self.roles.items():
            if token:
                self.roles[name] = described.get(token.content, token)

    def _added_by_id(self, folder: Path) -> dict[int, AddedToken]:
        """{id: token} as tokenizer_config.json lists them, or as the other files do if it doesn't."""
        listed = self.values.get("added_tokens_decoder")
        if listed is not None:
            return {int(id): added_token(value) for id, value in listed.items()}
        special = {token.content for token in [*self.roles.values(), *(self.extra or [])] if token}
        by_id = {}
        path = folder / "added_tokens.json"
        for text, id in read_object(path).items():
            check_fields({text: id}, {text: TOKEN_ID}, path)
            is_special = text in special
            by_id[id] = AddedToken(text, normalized=not is_special, special=is_special)
        path = folder / "tokenizer.json"
        backend = read_object(path)
        check_fields(backend, {"added_tokens": list_of(LISTED) | NOTHING}, path)
        for value in backend.get("added_tokens") or []:
            by_id[value["id"]] = added_token(value)
        return by_id

    def _described(self) -> dict[str, AddedToken]:
        """{text: token} of the added tokens."""
        return {token.content: token for token in self.added}

    def role_texts(self) -> dict[str, str]:
        """{role: text} of the tokens that there are."""
        return {name: token.content for name, token in self.roles.items() if token}

    def defaults(self, **roles: str) -> None:
        """Give texts to the roles that no file mentions."""
        described = self._described()
        for name, text in roles.items():
            self.roles.setdefault(name, described.get(text) or AddedToken(text, special=True))


def added_token(value: str | dict) -> AddedToken:
    """The added token that a file describes, by a JSON object or by its text alone, which means a special token."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value[name] for name in TOKEN_FLAGS if name in value}
    return AddedToken(value["content"], **flags)


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is a tiktoken file: lines of `base64 rank`. The other kind is sentencepiece's."""
    with open(path, "rb") as file:
        words = file.readline(4096).split()
    if len(words) != 2 or not words[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(words[0], validate=True))
    except ValueError:
        return False


# Chat templates.


def read_template(folder: Path, settings: dict) -> str | None:
    """The chat template: from its own file, else from tokenizer_config.json (`settings`); None if neither has one.

    Raises InputError if the file isn't UTF-8.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, with names
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        return template
    return None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after so many seconds. No limit outside the main thread, or without timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, as jinja2 drops some errors
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class GenerationBlock(jinja2.ext.Extension):
    """The template tag `{% generation %} ... {% endgeneration %}`. It marks the assistant's words for training.

    Here it just renders what is inside.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def chat_environment() -> jinja2.Environment:
    """Where chat templates run: jinja2's sandbox, with only the functions that transformers also gives them."""

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

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    del environment.globals["lipsum"]  # it can make texts of any length
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment


# tokenizer.json and sentencepiece: both become a tokenizer of the `tokenizers` library, the backend.


class BackendTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from tokenizer.json or from a sentencepiece tokenizer.model."""

    def __init__(self, folder: Path, settings: Settings):
        """Raises InputError for a setting that isn't supported; the library raises its own errors for damaged files."""
        self.folder = folder
        self.backend = read_backend(folder, settings)
        add_tokens(self.backend, settings)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = bool(settings.values.get("split_special_tokens", False))
        if settings.values.get("clean_up_tokenization_spaces") and not isinstance(self.backend.model, BPE):
            raise InputError(f"{folder}: clean_up_tokenization_spaces is true, which is not supported; set it to false")
        tokens = self.backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in tokens.items()}
        self.special_ids = frozenset(id for id, token in tokens.items() if token.special)
        self.core_size = self.backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.roles = settings.role_texts()
        self.template = settings.template
        self.fill: str | None = None
        if settings.kind == "CodeLlamaTokenizer":
            self.fill = self.roles.get("fill_token")
        self._bytes = byte_ids(self.backend)

    def _encode(self, text: str, special: bool) -> list[int]:
        if self.fill and self.fill in text:
            raise InputError(f"the text has {self.fill} in it: CodeLlama's infilling is not supported")
        return self.backend.encode(text, add_special_tokens=special).ids

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def table(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def is_shown(self, token: int) -> bool:
        return token not in self.special_ids and self.backend.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        return token in self._bytes

    def _save(self, folder: Path) -> dict:
        with replacing(folder / "tokenizer.json") as file:
            self.backend.save(str(file))
        return {"split_special_tokens": self.backend.encode_special_tokens}


def byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The ids of the tokens <0x00> to <0xFF>, if the backend reads such a token as one byte of a character."""
    if "ByteFallback" not in repr(backend.decoder):
        return frozenset()
    ids = set()
    for byte in range(256):
        id = backend.token_to_id(f"<0x{byte:02X}>")
        if id is not None:
            ids.add(id)
    return frozenset(ids)


def read_backend(folder: Path, settings: Settings) -> tokenizers.Tokenizer:
    """The folder's backend, without the tokens that the settings add.

    Some tokenizer classes of transformers 5 only take vocabulary, merges and post-processor from the file, and have
    their own normalizer, pre-tokenizer and decoder. The others take tokenizer.json as it is. Raises InputError if the
    class can't have such a model.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return sentencepiece_backend(folder / "tokenizer.model", settings)
    whole = tokenizers.Tokenizer.from_file(str(file))
    if settings.extra is None:
        settings.extra = settings.older_extra
    if whole.padding:
        settings.defaults(pad_token=whole.padding["pad_token"])
    text = read_text(file)
    is_llama3 = settings.kind == "LlamaTokenizer" and '"ByteLevel"' in text  # the folder names the wrong class
    if settings.kind not in CLASSES or is_llama3:
        return whole
    if not isinstance(whole.model, BPE):
        kind = type(whole.model).__name__
        raise InputError(f"{file}: a {kind} model, which the tokenizer_class {settings.kind} can't have")
    backend = class_backend(parse_json(text)["model"], settings)
    if settings.kind == "CodeLlamaTokenizer":
        frame_texts(backend, settings, bos=True)
    elif settings.kind != "GPTNeoXTokenizer":  # this class adds nothing to a text, whatever the file says
        backend.post_processor = whole.post_processor
    return backend


def class_backend(model: dict, settings: Settings) -> tokenizers.Tokenizer:
    """The backend that the settings' class makes of `model`, which is that part of a tokenizer.json."""
    merges: list[Any] = []
    for pair in model["merges"]:
        if isinstance(pair, str):  # "left right" in some files, ["left", "right"] in others
            pair = pair.split(" ")
        merges.append(tuple(pair))
    return CLASSES[settings.kind](model["vocab"], merges, settings)


def add_tokens(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Add the tokens of the settings that the backend doesn't have, or has with other flags."""
    present = backend.get_added_tokens_decoder().values()
    described = set(map(repr, present))
    names = {token.content for token in present}
    new = []
    for token in settings.added:
        if repr(token) not in described:
            new.append(token)
            names.add(token.content)
    roles = [token for token in settings.roles.values() if token and token.content]
    for token in [*roles, *(settings.extra or [])]:
        if token.content not in names and token not in new:
            new.append(token)
    role_names = {token.content for token in roles}
    for token in new:
        if token.content in role_names:
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


def wants_prefix(settings: Settings) -> bool:
    """Whether a space belongs before a text. Llama's classes say yes if the folder says nothing."""
    prefix = settings.values.get("add_prefix_space")
    return prefix is None or bool(prefix)


def prepend_scheme(prefix: bool, legacy: bool) -> str:
    """Metaspace's name for the places where it puts a space.

    legacy: before every piece of text between special tokens, not only before the first word.
    """
    if not prefix:
        return "never"
    if legacy:
        return "always"
    return "first"


def llama_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """LlamaTokenizer: words with the space before them."""
    settings.defaults(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model = BPE(vocab, merges, fuse_unk=True, byte_fallback=True)
    prefix = wants_prefix(settings)
    scheme = prepend_scheme(prefix, legacy=bool(settings.values.get("legacy", False)))
    return word_start_backend(model, scheme, strip=prefix)


def code_llama_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """CodeLlamaTokenizer: as LlamaTokenizer, with the tokens of its infilling format."""
    settings.defaults(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    settings.defaults(prefix_token="▁<PRE>", middle_token="▁<MID>", suffix_token="▁<SUF>")
    settings.defaults(eot_token="▁<EOT>", fill_token="<FILL_ME>")
    unknown = settings.role_texts().get("unk_token")
    model = BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    scheme = prepend_scheme(wants_prefix(settings), legacy=False)
    return word_start_backend(model, scheme, strip=True)


def word_start_backend(model: BPE, scheme: str, strip: bool) -> tokenizers.Tokenizer:
    """A backend that writes spaces as ▁. scheme: where it adds one. strip: decoding drops the space before a text."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def gpt2_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """GPT2Tokenizer: bytes, with the text cut into words as GPT-2 does."""
    settings.defaults(unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    prefix = bool(settings.values.get("add_prefix_space", False))
    return byte_level_backend(vocab, merges, pre_tokenizers.ByteLevel(add_prefix_space=prefix))


def gpt_neox_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """GPTNeoXTokenizer: as GPT2Tokenizer, after Unicode's normal form C."""
    settings.defaults(pad_token="<|padding|>")
    backend = gpt2_class(vocab, merges, settings)
    backend.normalizer = normalizers.NFC()
    return backend


def qwen2_class(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> tokenizers.Tokenizer:
    """Qwen2Tokenizer: bytes, with every digit on its own."""
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
    """A backend whose tokens are pieces of UTF-8. pre_tokenizer: cuts the text and writes its bytes as letters."""
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


def read_proto(path: Path) -> Any:
    """The sentencepiece ModelProto in a file. Raises InputError if it has no pieces."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, an optional package that nothing else needs

    made_at_run_time: Any = sentencepiece_model_pb2
    proto = made_at_run_time.ModelProto()
    proto.ParseFromString(path.read_bytes())
    if not proto.pieces:
        raise InputError(f"{path}: not a readable tokenizer (it has no pieces)")
    return proto


def sentencepiece_backend(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """The backend for a sentencepiece model: by LlamaTokenizer's rules, or by the model's own.

    Raises InputError if the file can't be read, or the settings' class can't have such a model.
    """
    proto = read_proto(path)
    llama = settings.kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if settings.kind in CLASSES and not llama:
        raise InputError(f"{path}: a sentencepiece model, which the tokenizer_class {settings.kind} can't have")
    if settings.extra is None:
        settings.extra = special_pieces(proto, user_defined=llama)
    if llama:
        vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
        backend = CLASSES[settings.kind](vocab, halves(vocab), settings)
    else:
        backend = proto_backend(proto, settings)
    # If there is no tokenizer_config.json, BOS is added, as in Llama's own code. If there is one, it must ask for BOS.
    bos = settings.values.get("add_bos_token", settings.kind == "CodeLlamaTokenizer" or not settings.configured)
    eos = settings.values.get("add_eos_token", False)
    frame_texts(backend, settings, bool(bos), bool(eos))
    return backend


def special_pieces(proto: Any, user_defined: bool) -> list[AddedToken]:
    """The control pieces of a model as added tokens. user_defined: those pieces too."""
    tokens = []
    for piece in proto.pieces:
        is_control = piece.type == CONTROL
        if is_control or (user_defined and piece.type == USER_DEFINED):
            tokens.append(AddedToken(piece.piece, normalized=False, special=is_control))
    return tokens


def halves(vocab: dict) -> list[tuple[str, str]]:
    """The merges [(left, right), ...] that make a token of vocab {token: rank} from two others, in order of rank."""
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    return merges


def proto_backend(proto: Any, settings: Settings) -> tokenizers.Tokenizer:
    """The backend for a sentencepiece model by its own rules."""
    spec = proto.normalizer_spec
    legacy = settings.values.get("legacy", True)
    default_roles(proto.trainer_spec, settings)
    if spec.add_dummy_prefix:
        settings.added = [unnormalized(token) for token in settings.added]
        for name, token in settings.roles.items():
            if token:
                settings.roles[name] = unnormalized(token)
    backend = tokenizers.Tokenizer(proto_model(proto, settings))
    backend.normalizer = normalizers.Sequence(proto_normalizers(spec, legacy))
    steps = proto_pre_tokenizers(proto, legacy)
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Sequence(proto_decoders(proto))
    return backend


def default_roles(trainer: Any, settings: Settings) -> None:
    """Give the roles that no file mentions the tokens that the model itself has for them."""
    if trainer.bos_id >= 0:
        settings.defaults(bos_token=trainer.bos_piece or "<s>")
    if trainer.eos_id >= 0:
        settings.defaults(eos_token=trainer.eos_piece or "</s>")
    if trainer.unk_id >= 0:
        settings.defaults(unk_token=trainer.unk_piece or "<unk>")


def unnormalized(token: AddedToken) -> AddedToken:
    """The same token, but looked for in a text before the normalizer changes the text."""
    flags = {name: getattr(token, name) for name in TOKEN_FLAGS}
    flags["normalized"] = False
    return AddedToken(token.content, **flags)


def user_defined_pieces(proto: Any) -> list[str]:
    """The pieces that are always whole: nothing beside them is merged with them."""
    return [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]


def proto_pre_tokenizers(proto: Any, legacy: bool) -> list[Any]:
    """What cuts a text before the model does: a space before it, and the user-defined pieces."""
    steps: list[Any] = []
    if proto.normalizer_spec.add_dummy_prefix:
        scheme = prepend_scheme(True, legacy)
        steps.append(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False))
    user_defined = user_defined_pieces(proto)
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    return steps


def proto_decoders(proto: Any) -> list[Any]:
    """What turns pieces back into a text."""
    steps: list[Any] = [decoders.Replace("▁", " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return steps


def piece_texts(proto: Any, settings: Settings) -> list[str]:
    """The text of each piece. The folder's settings may rename a piece, for example a placeholder."""
    listed = settings.values.get("added_tokens_decoder") or {}
    names = {int(id): token["content"] for id, token in listed.items()}
    kept = {piece.piece for id, piece in enumerate(proto.pieces) if id not in names}
    texts = []
    for id, piece in enumerate(proto.pieces):
        text = piece.piece
        if id in names and names[id] not in kept:  # two pieces must not have the same text
            text = names[id]
        texts.append(text)
    return texts


def proto_model(proto: Any, settings: Settings) -> BPE | Unigram:
    """The pieces as a model of the library."""
    trainer = proto.trainer_spec
    texts = piece_texts(proto, settings)
    if trainer.model_type == trainer.UNIGRAM:
        scores = [piece.score for piece in proto.pieces]
        pieces = list(zip(texts, scores, strict=True))
        return Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    vocab = {text: id for id, text in enumerate(texts)}
    rank = {}
    for id, piece in enumerate(proto.pieces):
        if piece.type == NORMAL:
            rank[texts[id]] = (-piece.score, id)

    def order(merge: tuple[str, str]) -> tuple[float, int, str, str]:
        left, right = merge
        return (*rank[left + right], left, right)

    return BPE(
        vocab,
        sorted(halves(rank), key=order),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=bool(user_defined_pieces(proto)),
    )


def proto_normalizers(spec: Any, legacy: bool) -> list[normalizers.Normalizer]:
    """What sentencepiece does to a text before it cuts the text, in the same order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix and legacy:  # Metaspace adds no ▁ if there is one already
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    return steps


# Llama 3's tiktoken file.


class TiktokenTokenizer(Tokenizer):
    """Llama 3's tokenizer.model. It holds tiktoken's ranks only: the pattern and the special tokens are known here."""

    def __init__(self, folder: Path, settings: Settings):
        """Raises ValueError for a damaged file."""
        self.folder = folder
        ranks = read_ranks(folder / "tokenizer.model")
        self.added = llama3_special(len(ranks))
        named = settings.values.get("added_tokens_decoder") or {}
        if named:  # the versions of Llama 3 have different names; the folder's count
            self.added = {token["content"]: int(id) for id, token in named.items() if token["content"]}
        self.bos = settings.values.get("add_bos_token", True)
        self.eos = settings.values.get("add_eos_token", False)
        self.model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.added
        )
        self.ordinary = len(ranks)  # special tokens have the ids from here on
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

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode([id for id in ids if self.is_shown(id)])

    def is_shown(self, token: int) -> bool:
        return token < self.ordinary

    def table(self) -> dict[str, int]:
        ordinary = {token.decode("latin-1"): id for id, token in enumerate(self.model.token_byte_values())}
        return {**ordinary, **self.added}

    def _save(self, folder: Path) -> dict:
        tokens = {id: dict(content=text, special=True, normalized=False) for text, id in self.added.items()}
        return {"add_bos_token": self.bos, "add_eos_token": self.eos, "added_tokens_decoder": tokens}


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of a tiktoken file, whose lines are `base64 rank`. Raises ValueError for a damaged one."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    if set(ranks.values()) != set(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2 and so on")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"it has no token for the byte {byte}")
    return ranks


def llama3_special(first: int) -> dict[str, int]:
    """{text: id} of Llama 3's 256 special tokens. first: the first one's id."""
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(2, 256 - len(LLAMA3_SPECIAL) + 2)]
    return {text: first + i for i, text in enumerate(LLAMA3_SPECIAL + reserved)}
