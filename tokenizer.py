"""One small interface over sentencepiece, tiktoken and tokenizer.json files."""
import base64
import json
from pathlib import Path

from model import InputError

# Llama 3's tokenizer.model is a tiktoken rank file without its split pattern or special tokens; both belong to the
# published format. The pattern is data of that format, as printed in Llama 3's tokenizer.json.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                  "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                  "<|eot_id|>", "<|python_tag|>"]


class Tokenizer:
    """Text to ids and back. `encode` adds no special tokens; `decode` drops them, and ids that a padded model has beyond the vocabulary.

    Attributes: vocab_size, and bos_id / eos_id where the file itself names them (else None).
    """

    @staticmethod
    def load(folder):
        """The tokenizer in a checkpoint folder. Raises InputError if there is none or it can't be read."""
        folder = Path(folder)
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        try:
            if model.is_file():
                return TiktokenTokenizer(model) if is_tiktoken(model) else SentencePieceTokenizer(model)
            if fast.is_file():
                return FastTokenizer(fast)
        except InputError:
            raise
        except Exception as error:  # each library has errors of its own for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{model if model.is_file() else fast}: not a readable tokenizer ({reason})") from None
        raise InputError(f"{folder}: has neither tokenizer.model nor tokenizer.json")


def is_tiktoken(path):
    """Whether a tokenizer.model holds tiktoken's lines of `base64 rank` rather than a sentencepiece protobuf."""
    with open(path, "rb") as file:
        line = file.readline(4096).split()
    try:
        return len(line) == 2 and line[1].isdigit() and bool(base64.b64decode(line[0], validate=True))
    except ValueError:
        return False


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor
        self.model = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.model.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id()))

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.vocab_size])


class TiktokenTokenizer(Tokenizer):
    def __init__(self, path):
        import tiktoken
        lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(LLAMA3_SPECIAL) + 2)]
        self.special = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL + reserved)}
        self.model = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special)
        self.vocab_size = len(ranks) + len(self.special)
        self.bos_id, self.eos_id = self.special["<|begin_of_text|>"], self.special["<|end_of_text|>"]

    def encode(self, text):
        return self.model.encode_ordinary(text)

    def decode(self, ids):
        ordinary = self.vocab_size - len(self.special)
        return self.model.decode([i for i in ids if i < ordinary])


class FastTokenizer(Tokenizer):
    """tokenizer.json, the format of the `tokenizers` library. BOS and EOS are named by the tokenizer_config.json beside it, if it is there."""

    def __init__(self, path):
        from tokenizers import Tokenizer as Backend
        self.model = Backend.from_file(str(path))
        self.vocab_size = self.model.get_vocab_size()
        naming = Path(path).with_name("tokenizer_config.json")
        roles = json.loads(naming.read_text()) if naming.is_file() else {}
        names = (roles.get("bos_token"), roles.get("eos_token"))
        self.bos_id, self.eos_id = (self.model.token_to_id(n["content"] if isinstance(n, dict) else n) if n else None for n in names)

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=True)
