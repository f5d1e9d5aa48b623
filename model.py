"""A Llama with a static KV cache, one forward over any span of layers, and one head for every exit.

Shape letters: B sequences, T tokens in this call, S cache rows, V vocabulary, D model width,
H query heads, G key/value heads, C head width, F feed-forward width, L layers.
"""

import json
import math
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from command import InputError, check_memory
from kernels import cpu, formats, fused
from kernels.formats import GROUPSIZES
from values import FLAG, NOTHING, TEXT, list_of, one_of, real, shown, whole

# What a model may have at most of each. Far beyond any there is, but no product of two overflows.
SIZES = {
    "vocab_size": whole(1, 2**24),
    "dim": whole(1, 2**17),
    "n_layer": whole(1, 1000),
    "n_head": whole(1, 2**14),
    "n_kv_head": whole(1, 2**14),
    "head_dim": whole(1, 2**14),
    "intermediate_size": whole(1, 2**20),
    "context": whole(1, 2**30),
}
ROPE_THETA, NORM_EPS = real(1e-3, 1e15), real(1e-30, 1)
ROPE_FACTOR = real(1e-3, 1e6)

# The kinds of RoPE scaling, by the names that config.json has for them, and the numbers that each wants.
ROPE_SCALING = {
    "linear": dict(factor=ROPE_FACTOR),
    "llama3": dict(
        factor=ROPE_FACTOR,
        low_freq_factor=ROPE_FACTOR,
        high_freq_factor=ROPE_FACTOR,
        original_max_position_embeddings=SIZES["context"],
    ),
}


@dataclass
class ModelConfig:
    """The architecture and special tokens of a checkpoint: what `model.json` holds."""

    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    context: int  # positions the model was trained for
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or a rope_type of ROPE_SCALING and its numbers
    norm_eps: float = 1e-5
    tied: bool = False  # the output head is the embedding
    bos_id: int | None = None  # as config.json has it; whether a text begins with it is the tokenizer's to say
    eos_ids: tuple[int, ...] = ()
    quantization: str | None = None  # of the layers' matrices and the head: None, "int8" or "int4" (quantize.py)
    groupsize: int | None = None  # of int4
    source: str = ""  # where the weights came from, for people

    def __post_init__(self):
        """Raises InputError for a field that can't be right: the values come from files."""
        token = whole(0, self.vocab_size - 1) if SIZES["vocab_size"].allows(self.vocab_size) else whole()
        kinds = {
            **SIZES,
            "rope_theta": ROPE_THETA,
            "norm_eps": NORM_EPS,
            "tied": FLAG,
            "bos_id": token | NOTHING,
            "eos_ids": list_of(token),
            "quantization": one_of("int8", "int4") | NOTHING,
            "source": TEXT,
        }
        for name, kind in kinds.items():
            self.need(kind.allows(getattr(self, name)), name, kind)
        self.need(self.head_dim % 2 == 0, "head_dim", "even")
        if self.n_head % self.n_kv_head:
            raise InputError(f"{self.n_head} query heads can't share {self.n_kv_head} key/value heads evenly")
        if self.rope_scaling is not None:
            self.check_rope_scaling(self.rope_scaling)
        self.eos_ids = tuple(self.eos_ids)
        self.check_groupsize()

    def need(self, condition: object, name: str, right: object) -> None:
        if not condition:
            value = shown(getattr(self, name))
            raise InputError(f"the model's description has {name} = {value}: it must be {right}")

    def check_rope_scaling(self, scaling: dict) -> None:
        self.need(isinstance(scaling, dict), "rope_scaling", "None or an object")
        scaling.setdefault("rope_type", "llama3")  # the only kind that older descriptions have
        kind = scaling["rope_type"]
        is_known = isinstance(kind, str) and kind in ROPE_SCALING
        self.need(is_known, "rope_scaling", f"None, or of rope_type {' or '.join(ROPE_SCALING)}")
        for name, number in ROPE_SCALING[kind].items():
            self.need(number.allows(scaling.get(name)), "rope_scaling", f"with {name} {number}")
        if kind == "llama3":
            slow, fast = scaling["low_freq_factor"], scaling["high_freq_factor"]
            self.need(slow < fast, "rope_scaling", "with low_freq_factor below high_freq_factor")

    def check_groupsize(self) -> None:
        if self.quantization == "int4":
            sizes = ", ".join(map(str, GROUPSIZES))
            self.need(whole().allows(self.groupsize) and self.groupsize in GROUPSIZES, "groupsize", f"one of {sizes}")
        else:
            self.need(self.groupsize is None, "groupsize", "None, as only int4 has groups")

    @property
    def default_exit(self) -> int:
        """The exit taken where none is named: a quarter of the way up."""
        return max(1, self.n_layer // 4)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def rope_frequencies(config: ModelConfig) -> Tensor:
    """How far each pair of components turns from one position to the next: (C/2,) radians, float32.

    RoFormer (2104.09864); slowed down for longer contexts as LongChat (linear) or Llama 3.1 (llama3) do.
    """
    inv = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    s = config.rope_scaling
    if s and s["rope_type"] == "linear":
        inv = inv / s["factor"]
    if s and s["rope_type"] == "llama3":
        turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)  # full turns within the original context
        # Many turns: kept as trained. Few turns: slowed by `factor`. Between: blended.
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        inv = keep * inv + (1 - keep) * inv / s["factor"]
    return inv


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x (B, T, heads, C), pairing component i with i + C/2; cos and sin are (T, 1, C/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def unchanged(y: Tensor) -> Tensor:
    return y


class Linear(nn.Module):
    """A product without bias, on the kernels that suit the number of rows.

    quantization: None, "int8" or "int4"; the latter falls back to int8 where groupsize doesn't divide `inputs`. `keep`
    makes it one process's part of the matrix, whose format stays that of the whole.
    """

    weight: Any  # a parameter, or quantized a buffer
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, inputs: int, outputs: int, quantization: str | None = None, groupsize: int | None = None):
        super().__init__()
        self.inputs = inputs  # of the whole matrix
        self.rows, self.columns = [(0, outputs)], (0, inputs)  # the part of it that is here
        self.combine: Callable[[Tensor], Tensor] = unchanged  # makes the processes' products the whole one
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        if quantization is None:
            self.weight = nn.Parameter(torch.empty(outputs, inputs))
            nn.init.normal_(self.weight, std=inputs**-0.5)
        elif quantization == "int8" or groupsize is None or inputs % groupsize:
            self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
            self.scale = torch.empty(outputs)
        else:
            self.register_buffer("weight", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
            self.scale = torch.empty(outputs, inputs // groupsize, dtype=torch.bfloat16)
            self.zero = torch.empty_like(self.scale)

    @property
    def outputs(self) -> int:
        """Rows that are here."""
        return sum(end - begin for begin, end in self.rows)

    @property
    def unit(self) -> int:
        """Columns that can't be parted: int4's groups."""
        return 1 if self.zero is None else self.inputs // self.zero.shape[1]

    def keep(
        self,
        rows: list[tuple[int, int]] | None = None,
        columns: tuple[int, int] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Become the part with these rows [(begin, end), ...] and columns (begin, end), in whole units; None: all of
        them. Weights are set afterwards. combine: function that makes the product (..., N) with this part the one that
        the caller wants, for instance the sum over all processes.
        """
        self.rows = rows or self.rows
        self.columns = columns or self.columns
        self.combine = combine or self.combine
        for name, tensor in self.state_dict().items():
            part = torch.cat(self.pieces(tensor))
            setattr(self, name, nn.Parameter(part, requires_grad=False) if name in self._parameters else part)

    def pieces(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor (weight, scale or zero) of the whole matrix; one below the other they are this part's."""
        if whole.dim() == 2:
            # An element stands for several columns: two in int4's bytes, a group in its scales.
            width = self.inputs // whole.shape[1]
            whole = whole[:, self.columns[0] // width : self.columns[1] // width]
        return [whole[begin:end] for begin, end in self.rows]

    def rounded(self, quantization: str) -> "Linear":
        """A copy whose weights are rounded to int8, or to int4 in groups of 64 (or 32, where 64 doesn't divide K)."""
        twin = Linear(self.inputs, self.outputs, "int8")
        twin.combine = self.combine
        weight = self.weight
        if self.scale is not None:
            weight = formats.dequantize(weight, self.scale, self.zero, torch.float32)[: self.outputs]
        groupsize = 32 if weight.shape[1] % 64 else 64
        twin.weight, twin.scale, twin.zero = formats.round_weight(weight, quantization, groupsize)
        twin.arrange()
        return twin

    def arrange(self) -> None:
        """Lay quantized weights out as the CPU's kernels read them, if these are there; once."""
        if self.scale is None or self.weight.dim() == 3 or self.weight.device.type != "cpu" or not cpu.prepare():
            return
        self.weight, self.scale, self.zero = formats.panels(self.weight, self.scale, self.zero, in_place=True)

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.linear(x, self.weight, self.scale, self.zero)
        return self.combine(y[..., : self.outputs])  # panels may have more


def rounded(module: nn.Module, quantization: str) -> Any:
    """A copy of a module whose products are rounded to int8 or int4.

    It shares all else with the module, its caches too: what the one writes there, the other reads.
    """
    if isinstance(module, Linear):
        return module.rounded(quantization)
    twin = copy(module)  # has the module's own dictionaries of parameters, buffers and modules
    twin._modules = {}
    for name, child in module.named_children():
        twin._modules[name] = rounded(child, quantization)
    return twin


@torch.no_grad()
def into_one_block(modules: list[nn.Module]) -> None:
    """Move the modules' products, if they are on the CPU, to memory in huge pages, as a checkpoint's weights have."""
    linears = [linear for module in modules for linear in module.modules() if isinstance(linear, Linear)]
    if not linears or linears[0].weight.device.type != "cpu":
        return
    sizes = [-(-linear.weight.nbytes // 64) * 64 for linear in linears]  # whole cache lines
    block = cpu.huge_pages(sum(sizes))
    for linear, memory in zip(linears, block.split(sizes), strict=True):
        weight = linear.weight
        own = memory[: weight.nbytes].view(weight.dtype).view(weight.shape)
        linear.weight.data = own.copy_(weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.norm(x, self.weight, self.eps)


class Attention(nn.Module):
    k_cache: Any  # (B, G, S, C), or None
    v_cache: Any  # (B, G, S, C), or None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.wqkv = Linear(config.dim, width + 2 * kv_width, config.quantization, config.groupsize)
        self.wo = Linear(width, config.dim, config.quantization, config.groupsize)
        self.register_buffer("k_cache", None, persistent=False)
        self.register_buffer("v_cache", None, persistent=False)

    def forward(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], cached: bool) -> Tensor:
        qkv = self.wqkv(x).unflatten(2, (-1, self.head_dim))  # (B, T, H + 2G, C)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.k_cache is not None:
            self.k_cache[:, :, pos] = k.transpose(1, 2)
            self.v_cache[:, :, pos] = v.transpose(1, 2)
        if cached:
            y = kernels.attend(q, self.k_cache, self.v_cache, pos)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads > self.kv_heads)
            y = y.transpose(1, 2)
        return self.wo(y.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, gate and up projection in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.intermediate_size, config.quantization, config.groupsize)
        self.w2 = Linear(config.intermediate_size, config.dim, config.quantization, config.groupsize)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm: Any = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm: Any = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.native: Any = None  # see `bind`

    def bind(self) -> None:
        """Tell the CPU's kernels, if they are there, of the weights and caches: they can run the whole layer."""
        attention, ffn = self.attention, self.ffn
        self.native = None
        if attention.k_cache is None or not cpu.takes(attention.k_cache):
            return
        matrices = [attention.wqkv, attention.wo, ffn.w13, ffn.w2]
        self.native = torch.classes.layerskip.Layer(
            self.attention_norm.weight,
            self.ffn_norm.weight,
            attention.k_cache,
            attention.v_cache,
            [matrix.weight for matrix in matrices],
            [matrix.scale for matrix in matrices],
            [matrix.zero for matrix in matrices],
        )

    def forward(self, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor], cached: bool) -> Tensor:
        x = x + self.attention(self.attention_norm(x), pos, rope, cached)
        return x + self.ffn(self.ffn_norm(x))


def natives(layers: Any) -> list[Any]:
    """The layers as the CPU's kernels take them, see `Block.bind`."""
    return [layer.native for layer in layers]


def run_fused(layers: Any, x: Tensor, pos: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The same as calling the layers one after the other, by the GPU's fused kernels."""
    norms, matrices, k_caches, v_caches = [], [], [], []
    for layer in layers:
        attention, ffn = layer.attention, layer.ffn
        norms += [layer.attention_norm.weight, layer.ffn_norm.weight]
        matrices += [attention.wqkv, attention.wo, ffn.w13, ffn.w2]
        k_caches.append(attention.k_cache)
        v_caches.append(attention.v_cache)
    weights = [matrix.weight for matrix in matrices]
    scales = [matrix.scale for matrix in matrices]
    zeros = [matrix.zero for matrix in matrices]
    eps = layers[0].attention_norm.eps
    return fused.layers(x, pos, *rope, norms, weights, scales, zeros, k_caches, v_caches, eps)


class Cached:
    """Layers that keep keys and values of a text. For modules that have `config`, `layers` and `norm`."""

    config: ModelConfig
    layers: Any  # nn.ModuleList of Block, which type checkers take for plain modules
    norm: RMSNorm
    cached_ids: list[int]  # of the text whose rows the caches hold, as far as a Decoder knows

    def blocks(self) -> list[Any]:
        """All layers that are bound to the caches."""
        return list(self.layers)

    def setup_caches(self, rows: int, batch: int = 1) -> None:
        """See to KV caches of at least `rows` positions in every layer, in the weights' dtype and on their device."""
        kernels.prepare(self.norm.weight, self.config.n_head // self.config.n_kv_head, self.config.head_dim)
        for module in cast(nn.Module, self).modules():
            if isinstance(module, Linear):
                module.arrange()
        cache = self.layers[0].attention.k_cache
        if cache is None or cache.shape[0] != batch or cache.shape[2] < rows:
            self.allocate_caches(rows, batch)
        self.bind()

    def allocate_caches(self, rows: int, batch: int) -> None:
        weight, attention = self.norm.weight, self.layers[0].attention
        shape = (batch, attention.kv_heads, rows, attention.head_dim)
        self.cached_ids = []
        check_memory(
            2 * len(self.layers) * math.prod(shape) * weight.itemsize,
            weight.device,
            f"a KV cache of {rows} positions",
        )
        for layer in self.layers:
            layer.attention.k_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            layer.attention.v_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def drop_caches(self) -> None:
        """Let go of the caches: whole texts, in batches or longer than the caches, are then scored without filling
        them.
        """
        self.cached_ids = []
        for layer in self.layers:
            layer.attention.k_cache = layer.attention.v_cache = None
        self.bind()

    def bind(self) -> None:
        for layer in self.blocks():
            layer.bind()


class ExitAdapter(Cached, nn.Module):
    """What makes an exit of a model predict better while the model stays as it is: a norm in place of the final one,
    and before it, if there is one, a block more (Balcony, arXiv 2503.05005).
    """

    def __init__(self, config: ModelConfig, block: bool):
        """config: the model's own. The adapter isn't quantized, whatever the model is."""
        super().__init__()
        self.config = replace(config, quantization=None, groupsize=None)
        self.cached_ids = []
        self.copies: dict[str, Any] = {}  # what `rounded_block` has made
        self.layers = nn.ModuleList([Block(self.config)] if block else [])
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def blocks(self) -> list[Any]:
        return [*self.layers, *self.copies.values()]

    @torch.no_grad()
    def rounded_block(self, quantization: str) -> Any:
        """A copy of the block, see `rounded`; made once and kept."""
        if quantization not in self.copies:
            block = rounded(self.layers[0], quantization)
            into_one_block([block])
            block.bind()
            self.copies[quantization] = block
        return self.copies[quantization]


class Transformer(Cached, nn.Module):
    """The whole model: `logits(forward(tokens))`.

    With `setup_caches`, every call writes its keys and values at its own positions' rows. A query sees the rows up to
    its position and none beyond, so a rejected draft needs no cleaning up: move the position back, and the rows are
    written again before anything sees them.

    It may be one process's part of a model (tp.py), which all processes run alike: every one gets the same hidden
    states and logits.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config  # of the whole model
        self.shard: Any = None  # the ranks.Shard whose part of it this is
        self.copies: dict[str, list[Any]] = {"int8": [], "int4": []}  # what `rounded_layers` has made
        self.adapters: dict[int, ExitAdapter] = {}  # of exits that have one; no part of the checkpoint
        self.cached_ids = []
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, config.quantization and "int8")
        self.tie()
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)  # (C/2,), stays float32

    @property
    def default_exit(self) -> int:
        """The exit to draft from where none is named: the lowest with an adapter, else a quarter of the way up."""
        return min(self.adapters, default=self.config.default_exit)

    def tie(self) -> None:
        """Make the head the embedding, where the architecture has it so; quantized, the head is a copy of its own."""
        if not self.config.tied or self.config.quantization:
            return
        self.head.weight = self.embed.weight
        if self.shard:
            (own,) = self.head.pieces(self.embed.weight)  # a view: no memory of its own
            self.head.weight = nn.Parameter(own, requires_grad=False)

    def blocks(self) -> list[Any]:
        return [*self.layers, *self.copies["int8"], *self.copies["int4"]]

    def drop_caches(self) -> None:
        super().drop_caches()
        for adapter in self.adapters.values():
            adapter.drop_caches()

    @torch.no_grad()
    def rounded_layers(self, count: int, quantization: str) -> list[Any]:
        """Copies of the first `count` layers, see `rounded`; made once and kept."""
        made = self.copies[quantization]
        numbers = 0
        for layer in self.layers[len(made) : count]:
            numbers += sum(linear.weight.numel() for linear in layer.modules() if isinstance(linear, Linear))
        nbytes = numbers if quantization == "int8" else numbers // 2
        check_memory(nbytes, self.embed.weight.device, f"a copy of the layers in {quantization}")
        new = [rounded(layer, quantization) for layer in self.layers[len(made) : count]]
        into_one_block(new)
        for layer in new:
            layer.bind()
        made += new
        return made[:count]

    @cached_property
    @torch.no_grad()
    def rounded_head(self) -> Linear:
        """A copy of the head in int8; made once and kept."""
        head = self.head.rounded("int8")
        into_one_block([head])
        return head

    def positions(self, T: int, pos: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor], bool]:
        """What every layer needs to know of them: (pos (T,), (cos, sin) each (T, 1, C/2), whether to attend to the
        caches).
        """
        own = torch.arange(T, device=self.inv_freq.device) if pos is None else pos
        angle = own[:, None, None] * self.inv_freq
        return own, (angle.cos(), angle.sin()), pos is not None

    def forward(self, x: Tensor, pos: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Run layers [start, stop) over T tokens at once.

        x: (B, T) token ids if start == 0, else (B, T, D) hidden states that came out of layer start - 1.
        pos: (T,) their positions, attending to the caches; or None for a whole text from position 0 (prefill,
        training, scoring), which attends to itself and needs no caches, but fills them where there are any.
        Returns the hidden states (B, T, D) after layer stop - 1.
        """
        return self.run(list(self.layers)[start:stop], x, pos)

    def run(self, layers: Any, x: Tensor, pos: Tensor | None) -> Tensor:
        """Run these layers, the model's own or copies of them, on token ids (B, T) or hidden states (B, T, D) x, as
        `forward` does.
        """
        kind = kernels.backend(self.embed.weight, x.shape[0] * x.shape[1])
        own = natives(layers)
        if kind == "cpu" and own and all(native is not None for native in own):
            pos = torch.arange(x.shape[1]) if pos is None else pos
            group = (self.shard.group, self.shard.size) if self.shard else ()
            return torch.ops.layerskip.layers(
                x, pos, self.inv_freq, self.embed.weight, own, self.config.norm_eps, *group
            )
        pos, rope, cached = self.positions(x.shape[1], pos)
        if not x.is_floating_point():
            x = self.embed(x)
        if kind == "cuda" and cached and kernels.fuse and not self.shard:
            return run_fused(layers, x, pos, rope)
        for layer in layers:
            x = layer(x, pos, rope, cached)
        return x

    def logits(self, h: Tensor) -> Tensor:
        """Final norm and output head on hidden states h (..., D) of any layer: (..., V)."""
        return self.head(self.norm(h))

    def exit_states(self, h: Tensor, exit_layer: int) -> Tensor:
        """Hidden states h (B, T, D) of whole texts at an exit, as the head takes them there: through the exit's adapter
        if it has one, else through the final norm.
        """
        adapter = self.adapters.get(exit_layer)
        if adapter is None:
            return self.norm(h)
        return adapter.norm(self.run(adapter.layers, h, None))
