"""Convert a GGUF file of a Llama to a Hugging Face folder: config.json, the weights, the tokenizer, the chat template.

transformers reads the same model from the folder as from the file, because its own reader of GGUF files does the work.
The folder appears whole or not at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

from command import InputError, Parser, blaming, check_memory, run_command
from files import new_folder
from values import filled_path

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOATS = ("F32", "F16", "BF16")  # the kinds of tensors that aren't quantized
LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
KV_HEADS = "llama.attention.head_count_kv"
ROPE = "rope_freqs.weight"  # a factor for each of RoPE's wavelengths, which Llama 3 makes longer
DAMAGED = "truncated or damaged; download it again"
OPENED = ("is_local", "local_files_only")  # transformers writes into tokenizer_config.json how the file was opened


def read(file: Path) -> GGUFReader:
    """The gguf.GGUFReader of a file. Raises InputError if there is no such file, or it is no GGUF file, or damaged."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Its data is an array, because slices of a memory map are slow: a vocabulary takes hundreds of thousands."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    if not file.is_file():
        raise InputError(f"{file}: no such file; the name of a GGUF file was expected")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file}: not a GGUF file, which would begin with the letters GGUF")
    with blaming(f"{file}: {DAMAGED}"):
        return Reader(file, "c")  # copy on write, as PyTorch warns about read-only arrays


def field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a key in the file's header; `default` if the key isn't there."""
    if key not in reader.fields:
        return default
    return reader.fields[key].contents()


def check_kind(file: Path, reader: GGUFReader) -> None:
    """Raise InputError if the file is not a Llama, or only a part of one."""
    parts = field(reader, "split.count", 1)
    if named := re.search(r"-\d{5}-of-(\d{5})\.gguf$", file.name):
        parts = max(parts, int(named[1]))
    if parts > 1:
        raise InputError(
            f"{file}: one part of a split file; join the parts with "
            "`llama-gguf-split --merge FIRST WHOLE`, then convert that"
        )
    kind = field(reader, "general.architecture")
    if kind != "llama":
        raise InputError(f"{file}: its architecture is {kind!r}; only 'llama' can be converted")
    if field(reader, "general.name") == "mistral":
        raise InputError(
            f"{file}: its general.name is 'mistral', for transformers' reader an architecture; "
            "change it with `gguf-new-metadata --general-name NAME FILE NEW`"
        )


def tensor_names(layers: int) -> Iterator[str]:
    """Names of the tensors that every Llama with this many layers has."""
    yield from ("token_embd.weight", "output_norm.weight")
    for i in range(layers):
        for name in LAYER:
            yield f"blk.{i}.{name}.weight"


def check_tensors(file: Path, reader: GGUFReader) -> None:
    """Raise InputError if a tensor is missing, or if transformers' reader would leave one out without a word."""
    layers = field(reader, "llama.block_count", 0)
    names = {tensor.name for tensor in reader.tensors}
    for name in tensor_names(layers):
        if name not in names:
            raise InputError(f"{file}: has no tensor {name}, which a Llama of {layers} layers has")
    if left := names.difference(tensor_names(layers), ("output.weight", ROPE)):
        raise InputError(
            f"{file}: tensor {min(left)} is not part of a Llama as transformers knows it; "
            "such a model can't be converted"
        )


def note_rope(file: Path, reader: GGUFReader) -> None:
    """Print a note if the file stretches RoPE, because transformers' reader leaves that out."""
    kind = field(reader, "llama.rope.scaling.type", "none")
    if kind != "none" or any(tensor.name == ROPE for tensor in reader.tensors):
        print(
            f"note: {file} stretches RoPE for long texts; transformers' reader leaves that out, and so does "
            'config.json: copy "rope_scaling" from that of the original model',
            file=sys.stderr,
        )


def survey(file: Path, reader: GGUFReader) -> tuple[list[torch.dtype], float]:
    """(the 16-bit dtypes that hold every value of the matrices exactly, the largest absolute value of all tensors).

    Raises InputError if a tensor can't be read or has values that are not finite.
    """
    from gguf import dequantize

    exact = [torch.bfloat16, torch.float16]
    largest = 0.0
    for tensor in tqdm(reader.tensors, desc="reading", unit="tensor", disable=None):
        with blaming(f"{file}: tensor {tensor.name} can't be read"):
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        peak = values.abs().max().item()
        if not math.isfinite(peak):
            raise InputError(f"{file}: tensor {tensor.name} holds values that are not finite; download the file again")
        largest = max(largest, peak)
        if values.dim() > 1:
            exact = [dtype for dtype in exact if torch.equal(values.to(dtype).float(), values)]
    return exact, largest


def choose_dtype(file: Path, reader: GGUFReader, name: str) -> torch.dtype:
    """The dtype of the folder's weights. name: a key of DTYPES, or "auto" (see `convert`).

    Raises InputError if `name` can't hold the values.
    """
    exact, largest = survey(file, reader)
    small = largest <= torch.finfo(torch.float16).max
    if name == "float16" and not small:
        raise InputError(
            f"--dtype float16: {file} has values up to {largest:.3g}, float16 ends at 65504; take bfloat16 or float32"
        )
    if name != "auto":
        return DTYPES[name]
    if exact:
        return exact[0]
    if all(tensor.tensor_type.name in FLOATS for tensor in reader.tensors):
        return torch.float32
    if small:
        return torch.float16
    return torch.bfloat16


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing warnings and progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # one of its bars can't be turned off
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def lent(reader: GGUFReader) -> Iterator[None]:
    """Have transformers take this reader of the file, or else it reads the header three times more; and make the table
    of names once, not for each module of the model.
    """
    import gguf

    with (
        patch.object(gguf, "GGUFReader", lambda path: reader),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def load(file: Path, reader: GGUFReader, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """transformers' model and tokenizer of the file. The file's name and its neighbours make no difference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (
        blaming(f"{file}: transformers can't read it"),
        quiet(),
        lent(reader),
        tempfile.TemporaryDirectory() as alone,
    ):
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        model = AutoModelForCausalLM.from_pretrained(alone, gguf_file="model.gguf", dtype=dtype)
    return model, tokenizer


def restore_row_order(model: PreTrainedModel) -> None:
    """Undo llama.cpp's row order of q and k. transformers' reader does so only if the file has KV_HEADS."""
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            pairs = part.weight.data.unflatten(0, (-1, model.config.head_dim // 2, 2))
            part.weight.data = pairs.transpose(1, 2).reshape(part.weight.shape)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON object in a file with a function that edits it in place."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write the tokenizer's files, so that readers get the same tokenizer back."""

    def keep_known(values: dict[str, Any]) -> None:  # transformers adds <|endoftext|>, a token the model doesn't have
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < vocab_size]

    def describe(values: dict[str, Any]) -> None:
        for key in OPENED:
            values.pop(key, None)
        values["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes change parts of tokenizer.json
        values["add_bos_token"] = tokenizer.add_bos_token  # for other readers: transformers looks into tokenizer.json
        values["add_eos_token"] = tokenizer.add_eos_token

    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer.json", keep_known)
    edit_json(folder / "tokenizer_config.json", describe)


def write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the files of a Hugging Face folder."""
    from huggingface_hub import save_torch_state_dict

    config, state = model.config, model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    vars(config).pop("quantization_config", None)  # the weights are no longer quantized
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    write_tokenizer(folder, tokenizer, config.vocab_size)


def convert(file: Path | str, out: Path | str, dtype: str = "auto") -> Path:
    """Write the new Hugging Face folder `out` from a GGUF file; returns `out`. Raises InputError if that can't be done.

    dtype: a key of DTYPES, or "auto". That is bfloat16 or float16 if one of them holds the matrices exactly. If not, it
    is float32 for a file of floats. For a quantized file it is float16, or bfloat16 if float16 can't hold a value.
    """
    file, out = Path(file), Path(out)
    reader = read(file)
    with blaming(f"{file}: {DAMAGED}"):
        check_kind(file, reader)
        check_tensors(file, reader)
    with new_folder(out, "--out") as folder:
        chosen = choose_dtype(file, reader, dtype)
        values = sum(int(tensor.n_elements) for tensor in reader.tensors)
        check_memory(values * chosen.itemsize, "cpu", f"converting {file}")
        model, tokenizer = load(file, reader, chosen)
        if KV_HEADS not in reader.fields:
            restore_row_order(model)
        with quiet():
            write(folder, model, tokenizer)
    note_rope(file, reader)
    return out


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("file", type=filled_path, help="GGUF file of a Llama, quantized or not")
    p.add_argument("--out", type=filled_path, required=True, help="folder to write")
    p.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights (default: auto, the smallest that loses nothing, or float16 for quantized files)",
    )
    args = p.parse_args()
    print(f"wrote {convert(args.file, args.out, args.dtype)}")


if __name__ == "__main__":
    run_command(main)
