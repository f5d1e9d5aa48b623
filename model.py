"""A Llama with a static KV cache, one forward over any span of layers, and one head for every exit.

Shape letters: B sequences, T tokens in this call, S cache rows, V vocabulary, D model width,
H query heads, G key/value heads, C head width, F feed-forward width, L layers.
"""
import ctypes
import json
import math
import mmap
import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from quantize import GROUPSIZES, Linear


# The kinds of RoPE scaling, by the names that config.json has for them, and the numbers that each wants.
ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class InputError(ValueError):
    """Something the user gave is wrong; the message is the one line to show them."""


def run_command(main):
    """Run a command's `main()`; bad input ends in one line on stderr and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clears away what is half-written
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            sys.exit("error: out of memory: take a smaller model, fewer --max_new_tokens, or a lower --precision")
        raise
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is missing: pip install -r requirements.txt, and for scripts/ -r scripts/requirements.txt")
    except KeyboardInterrupt:
        sys.exit(130)


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

    @classmethod
    def load(cls, path):
        """Read `model.json`. Raises InputError if it is missing, not JSON, or lacks a field."""
        try:
            values = json.loads(Path(path).read_text())
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except FileNotFoundError:
            raise InputError(f"{path}: not found; scripts/convert_hf_checkpoint.py writes it beside model.pth") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not a readable model description ({error})") from None
        except KeyError as error:
            raise InputError(f"{path}: field {error} is missing; convert the checkpoint again") from None

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
            kernels.prepare()
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


def expected_tensors(config: ModelConfig):
    """Name and meta tensor of everything in a checkpoint of this architecture; what is float32 here may have any floating type."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {name: t for name, t in state.items() if not (name == "head.weight" and config.tied and not config.quantization)}


def count_parameters(config: ModelConfig):
    """Numbers that the architecture has to learn, however they are stored."""
    return sum(t.numel() for t in expected_tensors(replace(config, quantization=None, groupsize=None)).values())


def check_state(state, config: ModelConfig, path):
    """Raise InputError, naming `path` and the first tensor at fault, unless `state` is exactly this architecture's."""
    wanted = expected_tensors(config)
    for name in sorted(wanted.keys() ^ state.keys()):
        raise InputError(f"{path}: tensor {name} is {'missing' if name in wanted else 'not part of this architecture'}")
    for name, t in wanted.items():
        if state[name].shape != t.shape:
            raise InputError(f"{path}: tensor {name} has shape {tuple(state[name].shape)}, the model's description wants {tuple(t.shape)}")
        if state[name].is_floating_point() != t.is_floating_point() or not t.is_floating_point() and state[name].dtype != t.dtype:
            raise InputError(f"{path}: tensor {name} is {str(state[name].dtype)[6:]}, the model's description wants {str(t.dtype)[6:]}")


@contextmanager
def saved(path, like, config: ModelConfig):
    """Write `model.pth` and the `model.json` beside it, both whole or neither, without having all of it in memory.

    like: {name: tensor} of the shapes and dtypes to come. Gives a dict of tensors to copy the values into, which are the file's.
    """
    path = Path(path)
    check_state(like, config, path)
    description = path.with_suffix(".json")
    partial = {target: target.with_name(target.name + ".partial") for target in (description, path)}
    try:
        try:
            partial[description].write_text(config.to_json())
            with torch.serialization.skip_data():
                torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}, partial[path])
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not as a fault of some page later
                with open(partial[path], "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial[path].stat().st_size)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise InputError(f"{path}: can't be written ({str(error).splitlines()[0]})") from None
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            result = torch.load(partial[path], mmap=True, weights_only=True)
        yield result
        for target, written in partial.items():
            written.replace(target)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


def save_checkpoint(path, state, config: ModelConfig):
    """Write the tensors of `state` as `model.pth`, and `model.json` beside it, both whole or neither."""
    with saved(path, state, config) as result:
        for name, t in state.items():
            result[name].copy_(t)


def read_state(path, device="cpu"):
    """What a checkpoint file holds, mapped rather than read on the CPU. Raises InputError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found; scripts/prepare.sh downloads and converts a checkpoint")
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location=device)
    except Exception as error:  # a damaged file surfaces as many kinds of error
        raise InputError(f"{path}: not a readable checkpoint ({(str(error).splitlines() or ['empty file'])[0]})") from None


def check_memory(nbytes, device, what):
    """Raise InputError if `nbytes` more, for `what`, are not free on the device, where the system tells."""
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").is_file():
        free = next((int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable")), nbytes)
    else:
        return
    if nbytes > free:
        raise InputError(f"{what} needs {nbytes / 1e9:.2f} GB, but {device} has only {free / 1e9:.2f} GB free")


def check_device(device):
    """Raise InputError unless tensors can be put on the device."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own
        raise InputError(f"--device {device}: not available here ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def check_writable(option, path):
    """Raise InputError unless a file can be written at `path`, which is left as it was. For results that come late."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: can't be written; name a file in an existing, writable folder")


def load_model(path, device="cpu", dtype=torch.float32, shard=None):
    """Load `model.pth` with the `model.json` beside it, in evaluation mode, without caches; with a tp.Shard, that part of it.

    The file is mapped, never unpickled as code, and its tensors go to the device one by one, of which only the part is read.
    Raises InputError if a file is missing or damaged, if names or shapes don't fit the description, or if it can't be split.
    """
    path = Path(path)
    state = read_state(path)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{path}: holds more than tensors; a checkpoint of scripts/convert_hf_checkpoint.py was expected")
    config = ModelConfig.load(path.with_suffix(".json"))
    check_state(state, config, path)
    model = empty_model(config, device, dtype, path, shard)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, t in model.state_dict().items():
        if name in state:
            linear = linears.get(name.rpartition(".")[0])
            pieces = linear.pieces(state[name]) if linear else [state[name]]
            for own, piece in zip(t.split([len(piece) for piece in pieces]), pieces):
                own.copy_(piece)
            release(state[name])
    return model


def release(mapped):
    """Let go of the memory behind a tensor of a mapped file: until the file is closed it would count as this process's, beside
    the copy that was made of it. Read again, it comes from the file."""
    first, last = -(-mapped.data_ptr() // mmap.PAGESIZE), (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE), mmap.MADV_DONTNEED)


def empty_model(config, device, dtype, what, shard=None):
    """A Transformer for inference, or a tp.Shard's part of it, whose weights are not set yet; dtype is theirs where they are not quantized.

    Raises InputError if `what` doesn't fit into memory or can't be split.
    """
    with torch.device("meta"):
        model = Transformer(config)
        if shard:
            shard.split(model)
    names = expected_tensors(config).keys()
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name in names}
    types = {name: dtype if isinstance(t, nn.Parameter) else t.dtype for name, t in tensors.items()}
    sizes = [-(-t.numel() * types[name].itemsize // 64) * 64 for name, t in tensors.items()]  # whole cache lines
    check_memory(sum(sizes), device, f"{what} in {str(dtype)[6:]}")
    on_cpu = torch.device(device).type == "cpu"
    memory = huge_pages(sum(sizes)) if on_cpu else torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    state = {name: part[:t.numel() * types[name].itemsize].view(types[name]).view(t.shape) for (name, t), part in zip(tensors.items(), memory.split(sizes))}
    model.load_state_dict(state, assign=True, strict=not config.tied)
    model.tie()
    model.inv_freq = rope_frequencies(config).to(device)
    return model.eval().requires_grad_(False)


def huge_pages(nbytes):
    """Memory (nbytes,) uint8 that the system may back by huge pages: streamed from 4 KB pages, weights come a fifth slower."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
