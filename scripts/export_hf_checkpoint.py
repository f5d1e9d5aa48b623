"""Write a checkpoint as a Hugging Face folder, so that transformers (and its assistant_early_exit) can run it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    from early import begin

    begin()

from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from checkpoint import check_finite, described_by, dtype_name, read_checkpoint, verified
from command import InputError, Parser, run_command
from convert_hf_checkpoint import tensor_shapes
from files import new_folder, write_json
from model import ModelConfig
from tokenizer import Tokenizer
from values import filled_path


def export(path: str | Path, out: str | Path) -> Path:
    """Write model.pth's weights, the configuration and the tokenizer into the new folder `out`; returns `out`.

    Raises InputError if the checkpoint is quantized or not finite, or the folder exists or can't be written.
    """
    path, out = Path(path), Path(out)
    description = described_by(path)
    with new_folder(out, "--out") as folder, verified(path, description):
        state, config = read_checkpoint(path)
        if config.quantization:
            raise InputError(
                f"--checkpoint_path {path}: is quantized ({config.quantization}); "
                "export the checkpoint that it was made from"
            )
        tokenizer = Tokenizer.load(path.parent)
        for name, t in state.items():
            check_finite(t, f"{path}: tensor {name}")
        save_torch_state_dict(unstack(state, config), folder)
        special = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None}
        dtype = dtype_name(state["embed.weight"].dtype)
        write_json(folder / "config.json", {**describe(config), "torch_dtype": dtype, **special}, indent=2)
        write_json(folder / "generation_config.json", special, indent=2)
        tokenizer.save(folder)
    return out


def unstack(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors as Hugging Face's, which has the matrices one by one that are stacked here."""
    theirs = {}
    for ours, shapes in tensor_shapes(config).items():
        parts = state[ours].split([shape[0] for shape in shapes.values()])
        for name, part in zip(shapes, parts, strict=True):
            theirs[name] = part.clone()
    return theirs


def describe(config: ModelConfig) -> dict[str, Any]:
    """The architecture as config.json has it."""
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
    )


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--checkpoint_path", type=filled_path, required=True, help="model.pth")
    p.add_argument("--out", type=filled_path, required=True, help="folder to write")
    args = p.parse_args()
    print(f"wrote {export(args.checkpoint_path, args.out)}")


if __name__ == "__main__":
    run_command(main)
