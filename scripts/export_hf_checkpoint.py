"""Write a checkpoint as a Hugging Face folder, so that transformers (and its assistant_early_exit) can run it."""
import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from huggingface_hub import save_torch_state_dict

from convert_hf_checkpoint import tensor_names
from checkpoint import load_config, check_state, read_state
from command import InputError, run_command
from tokenizer import Tokenizer


def export(path, out):
    """Write model.pth's weights, config.json, generation_config.json and the tokenizer into the new folder `out`."""
    path, out = Path(path), Path(out)
    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new folder")
    state, config = read_state(path), load_config(path.with_suffix(".json"))
    if config.quantization:
        raise InputError(f"--checkpoint_path {path}: is quantized ({config.quantization}); export the checkpoint that it was made from")
    check_state(state, config, path)
    tokenizer = Tokenizer.load(path.parent)
    query, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {3: (query, kv, kv), 2: (config.intermediate_size,) * 2}  # how the stacked matrices come apart
    theirs = {}
    for ours, names in tensor_names(config).items():
        parts = state[ours].split(rows[len(names)]) if len(names) > 1 else (state[ours],)
        theirs |= {name: part.clone() for name, part in zip(names, parts)}

    special = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None}
    hf = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=config.vocab_size, hidden_size=config.dim,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim, intermediate_size=config.intermediate_size, max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied, hidden_act="silu", attention_bias=False,
        mlp_bias=False, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling,
        torch_dtype=str(state["embed.weight"].dtype).removeprefix("torch."), **special)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name) as partial:
        partial = Path(partial)
        save_torch_state_dict(theirs, partial)
        (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        (partial / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        tokenizer.save(partial)
        partial.chmod(0o755)
        partial.rename(out)
        partial.mkdir()  # for the clean-up
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="model.pth")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    args = p.parse_args()
    print(f"wrote {export(args.checkpoint_path, args.out)}")


if __name__ == "__main__":
    run_command(main)
