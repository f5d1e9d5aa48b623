"""A Llama with a static KV cache, one forward over any span of layers, and one head for every exit.

Shape letters: B sequences, T tokens in this call, S cache rows, V vocabulary, D model width,
H query heads, G key/value heads, C head width, F feed-forward width, L layers.
"""
import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from command import InputError, check_memory
from kernels import cpu
from kernels.formats import GROUPSIZES

# The kinds of RoPE scaling, by the names that config.json has for them, and the numbers that each wants.
ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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
        def need(condition, name, what):
            if not condition:
                raise InputError(f"the model's description has {name} = {getattr(self, name)!r}: it must be {what}")

        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf
        whole = lambda x: isinstance(x, int) and number(x)
        for name in ("vocab_size", "dim", "n_layer", "n_head", "n_kv_head", "head_dim", "intermediate_size", "context"):
            need(whole(getattr(self, name)), name, "a positive whole number")
        need(self.n_layer <= 10_000, "n_layer", "at most 10000")
        need(isinstance(self.tied, bool), "tied", "true or false")
        for name in ("rope_theta", "norm_eps"):
            need(number(getattr(self, name)), name, "a positive number")
        need(self.head_dim % 2 == 0, "head_dim", "even")
        if self.n_head % self.n_kv_head:
            raise InputError(f"{self.n_head} query heads can't share {self.n_kv_head} key/value heads evenly")
        if self.rope_scaling is not None:
            need(isinstance(self.rope_scaling, dict), "rope_scaling", "None or an object")
            self.rope_scaling.setdefault("rope_type", "llama3")  # the only kind that older descriptions have
            numbers = ROPE_SCALING.get(self.rope_scaling["rope_type"])
            need(numbers, "rope_scaling", f"None, or of rope_type {' or '.join(ROPE_SCALING)}")
            need(all(number(self.rope_scaling.get(name)) for name in numbers), "rope_scaling", f"with positive {', '.join(numbers)}")
        token = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < self.vocab_size
        need(self.bos_id is None or token(self.bos_id), "bos_id", "a token id, or None")
        need(isinstance(self.eos_ids, (list, tuple)) and all(map(token, self.eos_ids)), "eos_ids", "token ids")
        need(self.quantization in (None, "int8", "int4"), "quantization", "None, int8 or int4")
        need(self.groupsize in GROUPSIZES if self.quantization == "int4" else self.groupsize is None, "groupsize", "one of " + ", ".join(map(str, GROUPSIZES)) + " with int4, else None")
        self.eos_ids = tuple(self.eos_ids)

    @property
    def default_exit(self):
        """The exit taken where none is named: a quarter of the way up."""
        return max(1, self.n_layer // 4)

    def to_json(self):
        return json.dumps(asdict(self), indent=2) + "\n"


def rope_frequencies(config: ModelConfig):
    """Inverse wavelengths (C/2,) in radians per position, float32; RoFormer (2104.09864), stretched as LongChat (linear) or
    Llama 3.1 (llama3) do."""
    inv = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim)
    s = config.rope_scaling
    if s and s["rope_type"] == "linear":
        inv = inv / s["factor"]
    if s and s["rope_type"] == "llama3":
        turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)  # full turns within the original context
        # Many turns: kept as trained. Few turns: slowed by `factor`. Between: blended.
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        inv = keep * inv + (1 - keep) * inv / s["factor"]
    return inv


def rotate(x: Tensor, cos: Tensor, sin: Tensor):
    """Apply RoPE to x (B, T, heads, C), pairing component i with i + C/2; cos and sin are (T, 1, C/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Linear(nn.Module):
    """A product without bias, on the kernels that suit the number of rows. quantization: None, "int8" or "int4"; the latter
    falls back to int8 where groupsize doesn't divide `inputs`.

    `keep` makes it one process's part of the matrix. Its format stays the whole matrix's."""

    def __init__(self, inputs, outputs, quantization=None, groupsize=None):
        super().__init__()
        self.inputs = inputs  # of the whole matrix
        self.rows, self.columns = [(0, outputs)], (0, inputs)  # what of it is here
        self.combine = lambda y: y  # makes the processes' products the whole one
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)
        if quantization is None:
            self.weight = nn.Parameter(torch.empty(outputs, inputs))
            nn.init.normal_(self.weight, std=inputs ** -0.5)
        elif quantization == "int8" or inputs % groupsize:
            self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
            self.scale = torch.empty(outputs)
        else:
            self.register_buffer("weight", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
            self.scale, self.zero = (torch.empty(outputs, inputs // groupsize, dtype=torch.bfloat16) for _ in range(2))

    @property
    def unit(self):
        """Columns that can't be parted: int4's groups."""
        return 1 if self.zero is None else self.inputs // self.zero.shape[1]

    def keep(self, rows=None, columns=None, combine=None):
        """Become the part that has these rows [(begin, end), ...] and columns (begin, end), whole units; None: all. Weights are set afterwards.
        combine: function of the product with this part (..., N) that returns the whole matrix's, or what of it is wanted here."""
        self.rows, self.columns, self.combine = rows or self.rows, columns or self.columns, combine or self.combine
        for name, whole in self.state_dict().items():
            part = torch.cat(self.pieces(whole))
            setattr(self, name, nn.Parameter(part, requires_grad=False) if name in self._parameters else part)

    def pieces(self, whole):
        """Of a tensor of the whole matrix (weight, scale or zero) views that one below the other are this part's."""
        if whole.dim() == 2:
            width = self.inputs // whole.shape[1]  # columns that an element stands for: 2 in int4's bytes, a group in its scales
            whole = whole[:, self.columns[0] // width:self.columns[1] // width]
        return [whole[begin:end] for begin, end in self.rows]

    def forward(self, x):
        return self.combine(kernels.linear(x, self.weight, self.scale, self.zero))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return kernels.norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.wqkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, config.quantization, config.groupsize)
        self.wo = Linear(self.heads * self.head_dim, config.dim, config.quantization, config.groupsize)
        self.register_buffer("k_cache", None, persistent=False)  # (B, G, S, C)
        self.register_buffer("v_cache", None, persistent=False)  # (B, G, S, C)

    def forward(self, x, pos, rope, cached):
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
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads > self.kv_heads).transpose(1, 2)
        return self.wo(y.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, gate and up projection in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.intermediate_size, config.quantization, config.groupsize)
        self.w2 = Linear(config.intermediate_size, config.dim, config.quantization, config.groupsize)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, pos, rope, cached):
        x = x + self.attention(self.attention_norm(x), pos, rope, cached)
        return x + self.ffn(self.ffn_norm(x))


def run_layers(layers, x, pos, rope, shard):
    """The same as calling the layers one after the other, as one operation of the CPU's kernels."""
    group = (shard.group, shard.size) if shard else ()
    matrices = [m for l in layers for m in (l.attention.wqkv, l.attention.wo, l.ffn.w13, l.ffn.w2)]
    norms = [n.weight for l in layers for n in (l.attention_norm, l.ffn_norm)]
    k_caches, v_caches = [l.attention.k_cache for l in layers], [l.attention.v_cache for l in layers]
    weights, scales, zeros = ([getattr(m, part) for m in matrices] for part in ("weight", "scale", "zero"))
    return torch.ops.layerskip.layers(x, pos, *rope, norms, weights, scales, zeros, k_caches, v_caches, layers[0].attention_norm.eps, *group)


class Transformer(nn.Module):
    """The whole model: `logits(forward(tokens))`.

    With `setup_caches`, every call writes its keys and values at its own positions' rows. A query sees the rows up to
    its position and none beyond, so a rejected draft needs no cleaning up: move the position back, and the rows are
    written again before anything sees them.

    It may be one process's part of a model (tp.py), which all processes run alike: every one gets the same hidden states and logits.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config  # of the whole model
        self.shard = None  # which part of it this is
        self.cached_ids = []  # of the text whose rows the caches hold, as far as a Decoder knows
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, config.quantization and "int8")
        self.tie()
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)  # (C/2,), stays float32

    def tie(self):
        """Make the head the embedding, where the architecture has it so; quantized, the head is a copy of its own."""
        if self.config.tied and not self.config.quantization:
            self.head.weight = nn.Parameter(*self.head.pieces(self.embed.weight), requires_grad=False) if self.shard else self.embed.weight

    def setup_caches(self, rows, batch=1):
        """See to KV caches of at least `rows` positions in every layer, in the weights' dtype and on their device."""
        weight, attention = self.embed.weight, self.layers[0].attention
        cache = attention.k_cache
        if weight.device.type == "cpu":
            cpu.prepare()
        if cache is not None and cache.shape[0] == batch and cache.shape[2] >= rows:
            return
        shape = (batch, attention.kv_heads, rows, attention.head_dim)
        self.cached_ids = []
        check_memory(2 * self.config.n_layer * math.prod(shape) * weight.itemsize, weight.device, f"a KV cache of {rows} positions")
        for layer in self.layers:
            layer.attention.k_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            layer.attention.v_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def drop_caches(self):
        """Let go of the caches: whole texts, in batches or longer than the caches, are then scored without filling them."""
        self.cached_ids = []
        for layer in self.layers:
            layer.attention.k_cache = layer.attention.v_cache = None

    def positions(self, T, pos):
        """What every layer needs to know of them: (pos (T,), (cos, sin) each (T, 1, C/2), whether to attend to the caches)."""
        cached = pos is not None
        if not cached:
            pos = torch.arange(T, device=self.inv_freq.device)
        angle = pos[:, None, None] * self.inv_freq
        return pos, (angle.cos(), angle.sin()), cached

    def forward(self, x, pos=None, start=0, stop=None):
        """Run layers [start, stop) over T tokens at once.

        x: (B, T) token ids if start == 0, else (B, T, D) hidden states that came out of layer start - 1.
        pos: (T,) their positions, attending to the caches; or None for a whole text from position 0 (prefill,
        training, scoring), which attends to itself and needs no caches, but fills them where there are any.
        Returns the hidden states (B, T, D) after layer stop - 1.
        """
        if start == 0:
            x = self.embed(x)
        pos, rope, cached = self.positions(x.shape[1], pos)
        layers = self.layers[start:stop]
        if cached and kernels.backend(x, x.shape[0] * x.shape[1]) == "cpu":
            return run_layers(layers, x, pos, rope, self.shard)
        for layer in layers:
            x = layer(x, pos, rope, cached)
        return x

    def logits(self, h):
        """Final norm and output head on hidden states h (..., D) of any layer: (..., V)."""
        return self.head(self.norm(h))
