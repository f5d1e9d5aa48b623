"""The model that a training run begins with: a new one, or one made from a checkpoint's layers."""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn

from checkpoint import count_parameters, load_model
from command import InputError, check_memory
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

STATE_BYTES = 16  # of a parameter in training: itself, its gradient, and AdamW's two averages


def initialize(model: Transformer) -> None:
    """Random weights, as GPT-2 has them. The matrices whose results are added to the hidden state start smaller."""
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        std = 0.02
        if name.endswith(("wo.weight", "w2.weight")):
            std /= math.sqrt(2 * model.config.n_layer)
        nn.init.normal_(weight, std=std)


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Transformer:
    """A model of the size that the options give, with random weights."""
    eos_ids: tuple[int, ...] = ()
    if tokenizer.eos_id is not None:
        eos_ids = (tokenizer.eos_id,)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=args.dim,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_kv_head=args.n_kv_head or args.n_head,
        head_dim=args.dim // args.n_head,
        intermediate_size=args.intermediate_size,
        context=args.context,
        tied=not args.untied,
        bos_id=tokenizer.bos_id,
        eos_ids=eos_ids,
    )
    check_memory(STATE_BYTES * count_parameters(config), "cpu", "a model of this size")
    model = Transformer(config)
    initialize(model)
    return model


def load_base(args: argparse.Namespace, device: torch.device) -> Transformer:
    """The checkpoint to train further, or a model made of --layers of it, as `restack` makes it.

    With --freeze it is not to be trained, and comes on the device and in --precision. Raises InputError if the
    checkpoint is quantized, or doesn't have one of the layers.
    """
    path = args.checkpoint_path
    if args.freeze:
        model = load_model(path, device, getattr(torch, args.precision))
    else:
        model = load_model(path).requires_grad_(True).train()
    if model.config.quantization:
        kind = model.config.quantization
        raise InputError(f"--checkpoint_path {path}: is quantized ({kind}); train the checkpoint that it was made from")
    if args.layers:
        model = restack(model, args.layers)
    return model


def restack(model: Transformer, order: list[int]) -> Transformer:
    """A new model made of a trained model's layers, in the given order. Layers count from 1.

    0 stands for a new layer, which at first changes nothing (block expansion, Wu et al., arXiv 2401.02415). Raises
    InputError for a layer that isn't there.
    """
    for number in order:
        if not 0 <= number <= model.config.n_layer:
            known = f"the checkpoint has layers 1 to {model.config.n_layer}; 0 is a new one"
            raise InputError(f"--layers {number}: {known}")
    new = Transformer(replace(model.config, n_layer=len(order)))
    initialize(new)
    for name in ("embed", "norm", "head"):
        getattr(new, name).load_state_dict(getattr(model, name).state_dict())
    for layer, number in zip(new.layers, order, strict=True):
        if number:
            layer.load_state_dict(model.layers[number - 1].state_dict())
        else:
            nn.init.zeros_(layer.get_parameter("attention.wo.weight"))
            nn.init.zeros_(layer.get_parameter("ffn.w2.weight"))
    return new
