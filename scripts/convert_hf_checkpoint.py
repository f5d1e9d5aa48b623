"""Convert a Hugging Face Llama folder (config.json, safetensors or .bin, tokenizer) to model.pth and model.json.

The folder's own files stay as they are; the two new ones appear beside them, whole or not at all.
"""
import argparse
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tqdm import tqdm

from checkpoint import saved
from command import InputError, check_memory, run_command
from model import ROPE_SCALING, ModelConfig
from tokenizer import Tokenizer, read_object

# Ours <- theirs, within a layer; several sources are stacked along the rows.
LAYER = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.wqkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.wo.weight": ["self_attn.o_proj.weight"],
    "ffn_norm.weight": ["post_attention_layernorm.weight"],
    "ffn.w13.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w2.weight": ["mlp.down_proj.weight"],
}


def tensor_names(config: ModelConfig):
    """Every tensor of the architecture with the Hugging Face tensors it is stacked from: {ours: [theirs, ...]}."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tied:
        names["head.weight"] = ["lm_head.weight"]
    for i in range(config.n_layer):
        names |= {f"layers.{i}.{ours}": [f"model.layers.{i}.{name}" for name in theirs] for ours, theirs in LAYER.items()}
    return names


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError if it is missing or something else."""
    if not path.is_file():
        raise InputError(f"{path}: not found")
    return read_object(path)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. Raises InputError for anything that isn't a Llama as this engine knows it."""
    path = folder / "config.json"
    hf = read_json(path)
    check_supported(hf, path)
    rope_theta, rope_scaling = read_rope(hf, path)
    generation = folder / "generation_config.json"
    special = read_json(generation) if generation.is_file() else hf  # where it is there, it decides alone
    eos = special.get("eos_token_id")
    try:
        config = ModelConfig(
            vocab_size=hf["vocab_size"],
            dim=hf["hidden_size"],
            n_layer=hf["num_hidden_layers"],
            n_head=hf["num_attention_heads"],
            n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"],
            context=hf.get("max_position_embeddings", 2048),  # the defaults are LlamaConfig's
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", False),
            bos_id=hf.get("bos_token_id"),
            eos_ids=() if eos is None else eos if isinstance(eos, list) else (eos,),
            source=hf.get("_name_or_path") or folder.resolve().name,
        )
    except KeyError as error:
        raise InputError(f"{path}: field {error} is missing") from None
    except (InputError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: {error}") from None
    Tokenizer.load(folder).check_model(config.vocab_size)
    return config


def check_supported(hf: dict, path: Path) -> None:
    """Raise InputError for a config.json that asks for what this engine doesn't compute."""
    if hf.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {hf.get('model_type')!r}; only 'llama' checkpoints can be converted")
    supported = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    for key, value in supported.items():
        if hf.get(key, value) != value:
            raise InputError(f"{path}: {key} is {hf[key]!r}; only {value!r} is supported")


def read_rope(hf: dict, path: Path) -> tuple[float, dict | None]:
    """RoPE's base, and its scaling as ModelConfig has it, from either spelling of config.json."""
    for spelling in ("rope_scaling", "rope_parameters"):  # the old one counts where both are there, as in transformers
        if not isinstance(hf.get(spelling) or {}, dict):
            raise InputError(f"{path}: {spelling} is {hf[spelling]!r}; a JSON object was expected")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and kind not in ROPE_SCALING:
        raise InputError(f"{path}: RoPE scaling {kind!r} is not supported; {', '.join(ROPE_SCALING)} and none are")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1:
        raise InputError(f"{path}: partial_rotary_factor is not supported; the whole head is rotated")
    theta = rope.get("rope_theta", hf.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    trained = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
    values = {**rope, "original_max_position_embeddings": hf.get("original_max_position_embeddings", trained)}
    return theta, {"rope_type": kind, **{name: values.get(name) for name in ROPE_SCALING[kind]}}


def weight_files(folder):
    """The files that hold the weights: safetensors before .bin, the index's shards before a single file."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
                raise InputError(f"{index}: has no weight_map from tensors to files")
            return [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        if single.is_file():
            return [single]
    raise InputError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of their shards")


def read_weights(files):
    """All tensors of the given files, mapped where the format allows it: {name: tensor}."""
    from safetensors.torch import load_file
    tensors = {}
    for file in tqdm(files, desc="reading", unit="file", disable=None):
        if not file.is_file():
            raise InputError(f"{file}: not found, though the index lists it; download the checkpoint again")
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                zipped = zipfile.is_zipfile(file)  # what torch.save writes since PyTorch 1.6; only that can be mapped
                check_memory(0 if zipped else file.stat().st_size, "cpu", f"reading {file}")
                tensors |= torch.load(file, mmap=zipped, weights_only=True, map_location="cpu")
        except InputError:
            raise
        except Exception as error:  # each format has errors of its own for a damaged file
            raise InputError(f"{file}: truncated or damaged ({(str(error).splitlines() or ['empty file'])[0]})") from None
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{files[0]}: holds more than tensors; a plain state dict was expected")
    return tensors


def plan(folder, config, theirs):
    """What model.pth will hold: {ours: (meta tensor, [theirs, ...])}. Raises InputError for what is missing, odd, or left over."""
    wanted, left = {}, set(theirs)
    for ours, names in tensor_names(config).items():
        for name in names:
            if name not in theirs:
                raise InputError(f"{folder}: the checkpoint has no tensor {name}")
            if theirs[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise InputError(f"{folder}: tensor {name} is {str(theirs[name].dtype)[6:]}; float32, bfloat16 or float16 was expected")
        parts = [theirs[name] for name in names]
        if len({part.shape[1:] for part in parts}) > 1:
            raise InputError(f"{folder}: {', '.join(names)} have shapes that don't fit together")
        wanted[ours] = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device="meta"), names
        left -= set(names)
    for name in sorted(left):  # some files list the head of a tied model too, or tables that follow from the configuration
        if not (name == "lm_head.weight" and config.tied or name.endswith("rotary_emb.inv_freq")):
            raise InputError(f"{folder}: tensor {name} is not part of the model that config.json describes")
    return wanted


def untie(config: ModelConfig, theirs: dict) -> ModelConfig:
    """The description of a model whose file has a head that is not its embedding, whatever config.json says: the file's
    counts, as in transformers 5."""
    head, embedding = theirs.get("lm_head.weight"), theirs.get("model.embed_tokens.weight")
    if not config.tied or head is None or embedding is None or same_values(head, embedding):
        return config
    print("note: config.json says that the head is the embedding, but the file has a head of its own, which is taken")
    return replace(config, tied=False)


# Settings of generation_config.json that change the distribution: transformers' generate() follows them, this engine doesn't.
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
    """Print a line about what generation_config.json asks for and this engine leaves out, if there is anything."""
    generation = read_object(folder / "generation_config.json")
    found = [name for name, off in CHANGES_LOGITS.items() if generation.get(name) not in (None, off)]
    if found:
        print(f"note: generation_config.json sets {', '.join(found)}, which this engine leaves out: it changes the distribution")


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(a.split(4096), b.split(4096)))


def convert(folder: str | Path) -> Path:
    """Write model.pth and model.json into a Hugging Face checkpoint folder, tensor by tensor; returns the path of model.pth."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--checkpoint_dir {folder}: no such folder")
    config, files = read_config(folder), weight_files(folder)
    theirs = read_weights(files)
    config = untie(config, theirs)
    if not config.eos_ids:
        print("note: the folder names no token that ends a text; see generate.py --stop and --stop_token_ids")
    note_what_is_left_out(folder)
    wanted, path = plan(folder, config, theirs), folder / "model.pth"
    with saved(path, {ours: t for ours, (t, _) in wanted.items()}, config) as result:
        for ours, (_, names) in tqdm(wanted.items(), desc="converting", unit="tensor", disable=None):
            parts = [theirs.pop(name) for name in names]
            for name, part, rows in zip(names, parts, result[ours].split([len(part) for part in parts])):
                if not all(extreme.isfinite() for extreme in part.aminmax()):
                    raise InputError(f"{folder}: tensor {name} holds values that are not finite: the file is damaged; download it again")
                rows.copy_(part)
    return path


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--checkpoint_dir", type=Path, required=True, help="folder with config.json, the weights and the tokenizer")
    print(f"wrote {convert(p.parse_args().checkpoint_dir)}")


if __name__ == "__main__":
    run_command(main)
