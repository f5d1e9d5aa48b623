"""Convert a Hugging Face Llama folder (config.json, safetensors or .bin, tokenizer) to model.pth and model.json.

The folder's own files stay as they are; the two new ones appear beside them, whole or not at all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

import os
import pickle
import zipfile
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_finite, dtype_name, plain, saved
from command import InputError, Parser, blaming, check_memory, run_command
from files import check_fields, check_regular, read_object
from model import NORM_EPS, ROPE_SCALING, ROPE_THETA, SIZES, ModelConfig
from tokenizer import Tokenizer
from values import FLAG, NOTHING, OBJECT, TEXT, filled_path, list_of, shown, whole

AGAIN = "download the checkpoint again"

ID = whole()  # of a token; the model's description knows how many there are
CONFIG = {  # the fields of config.json that are read
    "vocab_size": SIZES["vocab_size"],
    "hidden_size": SIZES["dim"],
    "num_hidden_layers": SIZES["n_layer"],
    "num_attention_heads": SIZES["n_head"],
    "num_key_value_heads": SIZES["n_kv_head"] | NOTHING,
    "head_dim": SIZES["head_dim"] | NOTHING,
    "intermediate_size": SIZES["intermediate_size"],
    "max_position_embeddings": SIZES["context"] | NOTHING,
    "rope_theta": ROPE_THETA | NOTHING,
    "rope_scaling": OBJECT | NOTHING,
    "rope_parameters": OBJECT | NOTHING,
    "rms_norm_eps": NORM_EPS | NOTHING,
    "tie_word_embeddings": FLAG | NOTHING,
    "bos_token_id": ID | NOTHING,
    "_name_or_path": TEXT | NOTHING,
}


Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """{our tensor: {their tensor: its shape}} of the whole model. Ours is theirs stacked along the rows."""
    embedding, norm = (config.vocab_size, config.dim), (config.dim,)
    shapes: dict[str, dict[str, Shape]] = {
        "embed.weight": {"model.embed_tokens.weight": embedding},
        "norm.weight": {"model.norm.weight": norm},
    }
    if not config.tied:
        shapes["head.weight"] = {"lm_head.weight": embedding}
    for i in range(config.n_layer):
        for ours, parts in layer_shapes(config).items():
            shapes[f"layers.{i}.{ours}"] = {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    return shapes


def layer_shapes(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """The same of one layer."""
    norm = (config.dim,)
    query, key = (config.n_head * config.head_dim, config.dim), (config.n_kv_head * config.head_dim, config.dim)
    gate = (config.intermediate_size, config.dim)
    return {
        "attention_norm.weight": {"input_layernorm.weight": norm},
        "attention.wqkv.weight": {
            "self_attn.q_proj.weight": query,
            "self_attn.k_proj.weight": key,
            "self_attn.v_proj.weight": key,
        },
        "attention.wo.weight": {"self_attn.o_proj.weight": query[::-1]},
        "ffn_norm.weight": {"post_attention_layernorm.weight": norm},
        "ffn.w13.weight": {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": gate},
        "ffn.w2.weight": {"mlp.down_proj.weight": gate[::-1]},
    }


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError if the file is missing or holds something else."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: not found")
    return read_object(path)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. Raises InputError for a model that this engine doesn't know."""
    path = folder / "config.json"
    hf = read_json(path)
    check_supported(hf, path)
    check_fields(hf, CONFIG, path)
    rope_theta, rope_scaling = read_rope(hf, path)
    special, source = hf, path
    if os.path.lexists(folder / "generation_config.json"):
        source = folder / "generation_config.json"
        special = read_json(source)  # if it is there, only it decides what ends a text
    check_fields(special, {"eos_token_id": ID | list_of(ID) | NOTHING}, source)
    try:
        config = ModelConfig(
            vocab_size=hf["vocab_size"],
            dim=hf["hidden_size"],
            n_layer=hf["num_hidden_layers"],
            n_head=hf["num_attention_heads"],
            n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"],
            context=hf.get("max_position_embeddings") or 2048,  # the defaults are LlamaConfig's
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=hf.get("rms_norm_eps") or 1e-6,
            tied=hf.get("tie_word_embeddings") or False,
            bos_id=hf.get("bos_token_id"),
            eos_ids=as_ids(special.get("eos_token_id")),
            source=hf.get("_name_or_path") or folder.resolve().name,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    Tokenizer.load(folder).check_model(config.vocab_size)
    return config


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids in a field that holds none, one, or a list of them."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(value)
    return (value,)


def check_supported(hf: dict, path: Path) -> None:
    """Raise InputError if config.json (hf) asks for something that this engine doesn't compute."""
    if hf.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {hf.get('model_type')!r}; only 'llama' checkpoints can be converted")
    supported = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    for key, value in supported.items():
        if hf.get(key, value) != value:
            raise InputError(f"{path}: {key} is {hf[key]!r}; only {value!r} is supported")


def read_rope(hf: dict, path: Path) -> tuple[float, dict | None]:
    """(RoPE's base, its scaling as in ModelConfig), from either spelling of config.json (hf).

    Raises InputError for a scaling that this engine doesn't know.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # as in transformers
    check_fields(rope, {"rope_type": TEXT | NOTHING, "type": TEXT | NOTHING, "rope_theta": ROPE_THETA | NOTHING}, path)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and kind not in ROPE_SCALING:
        raise InputError(
            f"{path}: RoPE scaling {kind!r} is not supported; only {', '.join(ROPE_SCALING)} and 'default' are"
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1:
        raise InputError(f"{path}: partial_rotary_factor is not supported; the whole head is rotated")
    theta = rope.get("rope_theta", hf.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    trained = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
    values = {**rope, "original_max_position_embeddings": hf.get("original_max_position_embeddings", trained)}
    return theta, {"rope_type": kind, **{name: values.get(name) for name in ROPE_SCALING[kind]}}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors rather than .bin, an index's shards rather than a single file.

    Raises InputError if there are none.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        if os.path.lexists(index):
            return [folder / name for name in shard_names(index)]
        if os.path.lexists(single):
            return [single]
    raise InputError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of their shards")


def shard_names(index: Path) -> list[str]:
    """The file names that an index lists, sorted. Raises InputError if it lists none, or one outside its own folder."""
    values = read_json(index)
    check_fields(values, {"weight_map": OBJECT}, index)
    weight_map = values["weight_map"]
    check_fields(weight_map, dict.fromkeys(weight_map, TEXT), index)
    if not weight_map:
        raise InputError(f"{index}: its weight_map lists no tensors")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise InputError(f"{index}: weight_map names {name!r}; the name of a file beside it was expected")
    return names


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """{name: tensor} of all the files, memory-mapped if the format allows it.

    Raises InputError if a file is missing or damaged, holds something else than tensors, or has one that another has.
    """
    tensors: dict[str, Tensor] = {}
    for file in tqdm(files, desc="reading", unit="file", disable=None):
        check_regular(file)
        if not file.exists():
            raise InputError(f"{file}: not found; {AGAIN}")
        with blaming(f"{file}: truncated or damaged; {AGAIN}"):
            found = read_tensors(file)
        for name in found.keys() & tensors.keys():
            raise InputError(f"{file}: tensor {name} is in another file too; {AGAIN}")
        tensors |= found
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """{name: tensor} of one file, of either format. Raises InputError if it holds something else."""
    if file.suffix == ".safetensors":
        return load_file(file)
    zipped = zipfile.is_zipfile(file)  # as torch.save writes it since PyTorch 1.6; only this can be mapped
    if not zipped:
        check_memory(file.stat().st_size, "cpu", f"reading {file}")
    try:
        found = torch.load(file, mmap=zipped, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # its message tells how to load the file without this safety
        raise InputError(f"{file}: truncated or damaged, or holds more than tensors") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{file}: holds no names and tensors; a plain state dict was expected")
    return {name: plain(value, f"{file}: {shown(name)}") for name, value in found.items()}


def plan(folder: Path, config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What model.pth will hold: {our name: meta tensor}. theirs: {their name: tensor}.

    Raises InputError for a tensor that is missing, doesn't fit, or has no place in the model.
    """
    wanted = {}
    left = set(theirs)
    for ours, shapes in tensor_shapes(config).items():
        for name, shape in shapes.items():
            check_tensor(folder, name, theirs, shape)
        parts = [theirs[name] for name in shapes]
        rows = sum(map(len, parts))
        wanted[ours] = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, device="meta")
        left -= shapes.keys()
    for name in sorted(left):
        if not is_redundant(name, config):
            raise InputError(f"{folder}: tensor {name} is not part of the model that config.json describes")
    return wanted


def check_tensor(folder: Path, name: str, theirs: dict[str, Tensor], wanted: Shape) -> None:
    """Raise InputError if a tensor is missing, or has another shape, or is not float32, bfloat16 or float16."""
    if name not in theirs:
        raise InputError(f"{folder}: the checkpoint has no tensor {name}")
    shape = tuple(theirs[name].shape)
    if shape != wanted:
        raise InputError(f"{folder}: tensor {name} has the shape {shape}; config.json wants {wanted}")
    dtype = theirs[name].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{folder}: tensor {name} is {dtype_name(dtype)}; float32, bfloat16 or float16 was expected")


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a file may have this tensor though nothing needs it: a tied model's head, or tables of RoPE."""
    return (name == "lm_head.weight" and config.tied) or name.endswith("rotary_emb.inv_freq")


def untie(config: ModelConfig, theirs: dict[str, Tensor]) -> ModelConfig:
    """The config, not tied if the files have a head that differs from the embedding.

    The files count, whatever config.json says, as in transformers 5.
    """
    head, embedding = theirs.get("lm_head.weight"), theirs.get("model.embed_tokens.weight")
    if not config.tied or head is None or embedding is None or same_values(head, embedding):
        return config
    print("note: config.json says that the head is the embedding, but the file has a head of its own, which is taken")
    return replace(config, tied=False)


# Settings of generation_config.json that change the distribution of tokens, each with the value that changes nothing.
# transformers' generate() obeys them, this engine doesn't.
CHANGES_LOGITS = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
}


def note_what_is_left_out(folder: Path) -> None:
    """Print a line if generation_config.json asks for something that this engine leaves out."""
    generation = read_object(folder / "generation_config.json")
    found = [name for name, off in CHANGES_LOGITS.items() if generation.get(name) not in (None, off)]
    if found:
        print(
            f"note: generation_config.json sets {', '.join(found)}, which this engine leaves out: "
            "it changes the distribution"
        )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal. Compares a part of the rows at a time, which takes little memory."""
    if a.shape != b.shape:
        return False
    return all(map(torch.equal, a.split(4096), b.split(4096)))


def convert(folder: str | Path) -> Path:
    """Write model.pth and model.json into a Hugging Face folder. Returns the path of model.pth.

    Raises InputError for a folder that can't be converted. Goes tensor by tensor, so that memory holds little at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--checkpoint_dir {folder}: no such folder")
    config = read_config(folder)
    theirs = read_weights(weight_files(folder))
    config = untie(config, theirs)
    if not config.eos_ids:
        print("note: the folder names no token that ends a text; see generate.py --stop and --stop_token_ids")
    note_what_is_left_out(folder)
    path = folder / "model.pth"
    names = tensor_shapes(config)
    with saved(path, plan(folder, config, theirs), config) as result:
        for ours, tensor in tqdm(result.items(), desc="converting", unit="tensor", disable=None):
            stack(folder, list(names[ours]), theirs, tensor)
    return path


def stack(folder: Path, names: list[str], theirs: dict[str, Tensor], result: Tensor) -> None:
    """Move the named tensors out of `theirs` into the rows of result, one below the other.

    Raises InputError for values that are not finite.
    """
    start = 0
    for name in names:
        part = theirs.pop(name)
        check_finite(part, f"{folder}: tensor {name}")
        result[start : start + len(part)].copy_(part)
        start += len(part)


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument(
        "--checkpoint_dir",
        type=filled_path,
        required=True,
        help="folder with config.json, the weights and the tokenizer",
    )
    args = p.parse_args()
    print(f"wrote {convert(args.checkpoint_dir)}")


if __name__ == "__main__":
    run_command(main)
