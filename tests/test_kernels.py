"""The kernels against float64, and their promise that a row never depends on its neighbours."""

import os
import platform
import subprocess
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch

import kernels
from conftest import ROOT
from kernels import cpu, cuda, formats, fused
from model import Linear, ModelConfig, Transformer, rounded

ROWS = [*range(1, 10), 16]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def built(two_threads):
    assert cpu.prepare(), "the C++ kernels must build where the tests run"
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k", [(1, 1), (7, 5), (64, 48), (33, 100), (130, 320), (1000, 257), (21, 1100)])
@pytest.mark.parametrize("m", ROWS)
def test_linear(m, n, k, dtype):
    g = torch.Generator().manual_seed(m * n + k)
    x, w = torch.randn(2, m, k, generator=g)[:1].to(dtype), torch.randn(n, k, generator=g).to(dtype)
    y, exact = torch.ops.layerskip.linear(x, w), x.double() @ w.double().T
    bound = x.double().abs() @ w.double().abs().T * k * 2**-24 + exact.abs() * torch.finfo(dtype).eps
    assert y.shape == (1, m, n) and y.dtype == dtype and ((y.double() - exact).abs() <= bound + 1e-30).all()
    for i in range(m):
        assert torch.equal(torch.ops.layerskip.linear(x[:, i : i + 1], w)[:, 0], y[:, i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k", [(1, 1), (7, 5), (64, 48), (33, 100), (130, 320)])
@pytest.mark.parametrize("m", ROWS)
def test_int8_linear(m, n, k, dtype):
    g = torch.Generator().manual_seed(m * n + k)
    x, w = torch.randn(1, m, k, generator=g).to(dtype), torch.randn(n, k, generator=g)
    q, scale = formats.int8_rows(w)
    assert (
        q.dtype == torch.int8
        and ((q.double() * scale[:, None].double() - w.double()).abs() <= scale[:, None] * 0.5001).all()
    )
    panels, own_scale, _ = formats.panels(q, scale, None)
    y = torch.ops.layerskip.linear(x, panels, own_scale)[..., :n]
    dequantized = q.double() * scale.double()[:, None]
    exact = x.double() @ dequantized.T
    bound = x.double().abs() @ dequantized.abs().T * (k + 1) * 2**-24 + exact.abs() * torch.finfo(dtype).eps
    assert y.shape == (1, m, n) and y.dtype == dtype and ((y.double() - exact).abs() <= bound + 1e-30).all()
    for i in range(m):
        assert torch.equal(torch.ops.layerskip.linear(x[:, i : i + 1], panels, own_scale)[:, 0, :n], y[:, i])


@pytest.mark.parametrize("n,k,groupsize", [(1, 32, 32), (33, 96, 32), (130, 320, 64)])
def test_panels_hold_the_same_weights(n, k, groupsize):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k))
    for quantization in ("int8", "int4"):
        weight, scale, zero = formats.round_weight(w, quantization, groupsize)
        panels, own_scale, own_zero = formats.panels(weight, scale, zero)
        wide = formats.dequantize(panels, own_scale, own_zero, torch.float32)[:n]
        assert torch.equal(wide, formats.dequantize(weight, scale, zero, torch.float32))
        assert panels.shape[0] == -(-n // 16) and panels.shape[2] == 16
        output, column = n - 1, k - 1  # by the definition in `panels`
        if zero is None:
            assert panels[output // 16, column, output % 16] == weight[output, column]
        else:
            lane = panels[output // 16, column // 8, output % 16].item() >> 4 * (column % 8) & 15
            number = weight[output, column // 32 * 16 + column % 16].item() >> 4 * (column % 32 >= 16) & 15
            assert lane ^ 8 == number


def layers_model(heads, kv_heads, c, ffn, dtype, dim=None):
    """Two layers with weights large enough for sharp attention and saturated gates."""
    torch.manual_seed(heads * c)
    config = ModelConfig(
        vocab_size=8,
        dim=dim or heads * 10 + 3,
        n_layer=2,
        n_head=heads,
        n_kv_head=kv_heads,
        head_dim=c,
        intermediate_size=ffn,
        context=100,
    )
    model = Transformer(config).requires_grad_(False)
    for w in model.parameters():
        torch.nn.init.normal_(w, std=2 / w.shape[-1] ** 0.5) if w.dim() == 2 else torch.nn.init.normal_(
            w, mean=1, std=0.3
        )
    inv_freq = model.inv_freq
    model.to(dtype).inv_freq = inv_freq
    return model


def fill(model, batch, rows, last, garbage=torch.nan):
    """Caches of random keys and values up to row `last`; beyond, garbage that must not be read."""
    g = torch.Generator().manual_seed(rows)
    model.setup_caches(rows, batch)
    for layer in model.layers:
        for cache in (layer.attention.k_cache, layer.attention.v_cache):
            cache.copy_(torch.randn(cache.shape, generator=g)), cache[:, :, last + 1 :].fill_(garbage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,c,ffn", [(1, 1, 8, 5), (4, 4, 64, 96), (8, 2, 12, 33), (6, 1, 34, 130)])
@pytest.mark.parametrize("t,last", [(1, 0), (1, 70), (3, 2), (5, 31), (8, 63), (16, 79)])
def test_layers(t, last, heads, kv_heads, c, ffn, dtype):
    """One operation for all layers, against the layers one by one in PyTorch and in float64."""
    model, exact = (layers_model(heads, kv_heads, c, ffn, dtype) for _ in range(2))
    exact.double().inv_freq = model.inv_freq.double()
    batch, pos = 16 // t if t > 8 else 2, torch.arange(last - t + 1, last + 1)
    x = torch.randint(8, (batch, t), generator=torch.Generator().manual_seed(last))
    (
        fill(model, batch, 100, last),
        fill(exact, batch, 100, last, 0),
    )  # PyTorch's attention multiplies what is masked by 0
    y, z = model(x, pos), exact.embed(x)
    positions = exact.positions(t, pos)
    for layer in exact.layers:
        z = layer(z, *positions)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (y.double() - z).norm() < bound * z.norm()
    for a, b in zip(model.layers, exact.layers, strict=False):
        for name in ("k_cache", "v_cache"):
            ours, wanted = getattr(a.attention, name).double().nan_to_num(0), getattr(b.attention, name)
            assert (ours - wanted).norm() < bound * wanted.norm()
    fill(model, batch, 100, last)
    for i in range(t):
        assert torch.equal(model(x[:, i : i + 1], pos[i : i + 1])[:, 0], y[:, i]), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 5, 320, generator=g).to(dtype), torch.randn(1000, 320, generator=g)
    model, pos = layers_model(8, 2, 12, 33, dtype), torch.arange(66, 71)

    def compute():
        fill(model, 1, 100, 70)
        quantized = [formats.panels(*formats.round_weight(w, kind, 32)) for kind in ("int8", "int4")]
        weights = [(w.to(dtype),), *quantized]
        products = [torch.ops.layerskip.linear(x, *weight) for weight in weights]
        return [*products, model(torch.arange(5)[None], pos)]

    several = compute()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(several, compute(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m,n", [(1, 1), (2, 7), (5, 48), (16, 1030)])
def test_norm(m, n, dtype):
    g = torch.Generator().manual_seed(m + n)
    x, w = (torch.randn(1, m, n, generator=g) * 4).to(dtype), torch.randn(n, generator=g).to(dtype)
    y, d = torch.ops.layerskip.norm(x, w, 1e-5), x.double()
    bound = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(y.double(), d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double(), **bound)
    for i in range(m):
        assert torch.equal(torch.ops.layerskip.norm(x[:, i : i + 1], w, 1e-5)[:, 0], y[:, i])


def test_extreme_gates():
    """silu far from 0, where its exponential over- or underflows if taken carelessly."""
    gates = [-1e4, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 1e4]
    model = layers_model(1, 1, 2, len(gates), torch.float32)
    model.setup_caches(1)
    for layer in model.layers:
        (
            layer.attention.wo.weight.zero_(),
            layer.ffn.w2.weight.fill_(1),
            layer.ffn.w13.weight.zero_(),
            layer.ffn_norm.weight.fill_(1),
        )
    first = model.layers[0].ffn.w13.weight
    first[: len(gates), 0], first[len(gates) :, 0] = torch.tensor(gates), 1.0
    model.embed.weight.zero_()[3, 0] = 1
    hidden = torch.tensor(1.0).double() * (1 / model.config.dim + 1e-5) ** -0.5  # what the norm makes of the 1
    gate = torch.tensor(gates, dtype=torch.float64) * hidden
    exact = (gate * gate.sigmoid() * hidden).sum() + model.embed.weight[3].double()
    y = model(torch.tensor([[3]]), torch.zeros(1, dtype=torch.long), 0, 1)
    torch.testing.assert_close(y[0, 0].double(), exact, rtol=1e-5, atol=1e-5)


def test_the_whole_model_keeps_rows_apart():
    """A pass over K + 1 rows gives each row bit for bit what a pass over that row alone gives."""
    from test_generate import tiny_model

    for dtype in (torch.float32, torch.bfloat16):
        model, tokens = tiny_model(dtype=dtype), torch.randint(0, 64, (1, 40))
        model.inv_freq = tiny_model().inv_freq
        model.setup_caches(40)
        model(tokens[:, :20])
        together = torch.cat(
            [model.logits(model(tokens[:, i : i + 5], torch.arange(i, i + 5))) for i in range(20, 40, 5)], 1
        )
        for layer in model.layers:
            layer.attention.k_cache.zero_(), layer.attention.v_cache.zero_()
        model(tokens[:, :20])
        alone = torch.cat([model.logits(model(tokens[:, i : i + 1], torch.arange(i, i + 1))) for i in range(20, 40)], 1)
        assert torch.equal(together, alone)


# The Triton kernels: on a GPU, or without one in Triton's interpreter, which shows what they compute but not in which
# order.

GPU, HALF = (
    ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
)  # the interpreter has no bfloat16


@pytest.fixture
def triton():
    assert cuda.triton, "Triton must be installed where the tests run"


def on_gpu(x, weight, factor, rows):
    return cuda.linear(x[:, rows].to(GPU), weight.to(GPU), None if factor is None else factor.to(GPU))


def fewer(i):
    """Row i by itself where the arithmetic is the GPU's own, else the rows up to it."""
    return slice(i, i + 1) if GPU == "cuda" else slice(0, i + 1)


def alone(f, m):
    """Compare f(rows) of all m rows with f of fewer."""
    y = f(slice(0, m))
    for part in map(fewer, range(m)):
        assert torch.equal(f(part), y[:, part])
    return y.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("m,n,k", [(1, 7, 5), (3, 70, 100), (8, 33, 600), pytest.param(16, 130, 320, marks=SLOW)])
def test_gpu_linear(m, n, k, dtype, triton):
    g = torch.Generator().manual_seed(m * n + k)
    x, w = torch.randn(1, m, k, generator=g).to(dtype), torch.randn(n, k, generator=g).to(dtype)
    q, scale = formats.int8_rows(w)
    for weight, factor, exact_weight in ((w, None, w.double()), (q, scale, q.double() * scale.double()[:, None])):
        exact = x.double() @ exact_weight.T
        bound = x.double().abs() @ exact_weight.abs().T * (k + 1) * 2**-23 + exact.abs() * torch.finfo(dtype).eps
        y = alone(partial(on_gpu, x, weight, factor), m)
        assert y.shape == (1, m, n) and y.dtype == dtype and ((y.double() - exact).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    "heads,kv_heads,c,t,last",
    [
        pytest.param(4, 4, 64, 3, 300, marks=SLOW),
        (8, 2, 12, 5, 31),
        (6, 1, 33, 2, 520),
        (1, 1, 8, 1, 0),
        (2, 1, 16, 4, 257),
    ],
)
def test_gpu_attend(heads, kv_heads, c, t, last, dtype, triton):
    g = torch.Generator().manual_seed(t * last + c)
    q = torch.randn(2, t, heads, c, generator=g).to(dtype) * 3
    k, v = (torch.randn(2, kv_heads, 600, c, generator=g).to(dtype) for _ in "kv")
    k[:, :, last + 1 :], v[:, :, last + 1 :] = torch.nan, torch.nan  # garbage that must not be read
    pos = torch.arange(last - t + 1, last + 1)
    y = alone(lambda rows: cuda.attend(q[:, rows].to(GPU), k.to(GPU), v.to(GPU), pos[rows].to(GPU)), t)
    for i in range(t):
        keys, values = (x[:, :, : pos[i] + 1].double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        probs = (torch.einsum("bhc,bhsc->bhs", q[:, i].double(), keys) / c**0.5).softmax(-1)
        exact = torch.einsum("bhs,bhsc->bhc", probs, values)
        torch.testing.assert_close(
            y[:, i].double(), exact, atol=3e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2 if dtype == HALF else 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gpu_norm(dtype, triton):
    x, w = torch.randn(1, 5, 100).to(dtype), torch.randn(100).to(dtype)
    y = alone(lambda rows: cuda.norm(x[:, rows].to(GPU), w.to(GPU), 1e-5), 5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-march=x86-64"])
def test_narrower_vectors(without, tmp_path):
    """The tests above, where the processor has no AVX-512, or no vectors that the source knows by name."""
    chosen = "not gpu and not fused and ((linear and 130-320) or layers or panels or gates or threads)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", chosen, __file__],
        env={**os.environ, "CXXFLAGS": without, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]


# The fused layers, beside the same layers one by one on the other Triton kernels.

LAUNCHES = {None: 5, "int8": 5, "int4": 7}  # of a layer


def fused_model(monkeypatch, shape, dtype, quantization):
    """(model on Triton's kernels, the same in float64). shape: heads, kv_heads, c, ffn, dim."""
    monkeypatch.setattr(cpu, "ready", False)  # weights stay as in the file
    model = layers_model(*shape[:4], dtype, dim=shape[4])
    for layer in model.layers:
        layer.attention_norm.weight.normal_(1, 0.3), layer.ffn_norm.weight.normal_(1, 0.3)
    if quantization:
        model.layers = torch.nn.ModuleList(rounded(layer, quantization) for layer in model.layers)
    exact = deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, Linear) and module.scale is not None:
            module.weight = formats.dequantize(module.weight, module.scale, module.zero, torch.float64)
            module.scale = module.zero = None
    exact.inv_freq = model.inv_freq.double()
    monkeypatch.setattr(kernels, "backend", lambda x, rows: "cuda" if x.dtype == dtype else None)
    return model.to(GPU), exact


@pytest.mark.parametrize(
    "shape,t,last,batch,dtype,quantization",
    [
        ((4, 2, 12, 33, 43), 3, 5, 2, torch.float32, None),
        # products and cache in several parts
        pytest.param((2, 1, 34, 70, 140), 3, 258, 1, torch.float32, None, marks=SLOW),
        ((4, 4, 16, 33, 43), 16, 20, 1, HALF, None),
        pytest.param((2, 1, 16, 80, 260), 4, 513, 1, HALF, None, marks=SLOW),
        ((4, 2, 12, 35, 70), 5, 31, 1, HALF, "int8"),
        ((2, 1, 16, 32, 288), 2, 31, 1, HALF, "int4"),
        ((2, 1, 16, 32, 64), 3, 31, 1, torch.float32, "int4"),
    ],
)
def test_fused_layers(shape, t, last, batch, dtype, quantization, triton, monkeypatch):
    model, exact = fused_model(monkeypatch, shape, dtype, quantization)
    pos, x = torch.arange(last - t + 1, last + 1), torch.randint(8, (batch, t))

    def run(fuse, rows=slice(0, t), cuts=(0, 2)):
        monkeypatch.setattr(kernels, "fuse", fuse)
        fill(model, batch, 600, last)
        y, own_pos = model.embed(x[:, rows].to(GPU)), pos[rows].to(GPU)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            y = model.run(model.layers[start:stop], y, own_pos)
        return y

    def caches(of):
        return torch.stack([c for layer in of.layers for c in (layer.attention.k_cache, layer.attention.v_cache)])

    y, ours = run(True), caches(model)
    fill(exact, batch, 600, last, 0)
    z, bound = exact(x, pos), {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert (y.cpu().double() - z).norm() < bound * z.norm()
    assert (ours.cpu().double().nan_to_num(0) - caches(exact)).norm() < bound * caches(exact).norm()
    assert torch.equal(run(True, fewer(0)), y[:, fewer(0)])
    assert torch.equal(run(True, fewer(t // 2), cuts=(0, 1, 2)), y[:, fewer(t // 2)]), "also with a cut between layers"
    unfused, theirs = run(False), caches(model)
    if HALF == torch.float16 == dtype:  # where the interpreter adds in one order, and rounding hides its silu
        assert torch.equal(y, unfused) and torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))
    assert (y - unfused).norm() < bound * unfused.norm()


@pytest.mark.parametrize("quantization", LAUNCHES)
def test_launches_of_a_layer(quantization, triton, monkeypatch):
    """Fused, five, in int4 seven; else eight, and those that the compiler of PyTorch makes of what lies between."""
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    for module in (cuda, fused):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    model, _ = fused_model(monkeypatch, (2, 1, 16, 32, 32), HALF, quantization)
    fill(model, 1, 20, 19)
    x, pos = torch.zeros(1, 3, 32, dtype=HALF, device=GPU), torch.arange(3, device=GPU)
    counts = []
    for fuse, shard in ((True, None), (False, None), (True, "of several processes")):
        monkeypatch.setattr(kernels, "fuse", fuse), setattr(model, "shard", shard)
        for count in (1, 2):
            launched.clear()
            model.run(model.layers[:count], x, pos)
            counts.append(len(launched) / count)
    assert counts == [LAUNCHES[quantization]] * 2 + [8] * 4


def test_compiler_takes_fused_layers(triton, monkeypatch):
    model, _ = fused_model(monkeypatch, (2, 1, 16, 32, 32), HALF, None)
    monkeypatch.setattr(kernels, "fuse", True)
    x, pos = torch.zeros(1, 3, dtype=torch.long, device=GPU), torch.arange(3, device=GPU)
    fill(model, 1, 20, 19)
    y, caches = model(x, pos), [layer.attention.k_cache for layer in model.layers]
    written = [cache.clone() for cache in caches]
    fill(model, 1, 20, 19)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x, pos), y)
    assert all(torch.equal(a, b) for a, b in zip(caches, written, strict=True)), "caches are not written in place"


def test_says_so_without_a_compiler(tmp_path):
    """No compiler: a warning, once, and the same numbers from plain PyTorch."""
    code = (
        "import torch, kernels\nfrom kernels import cpu, formats\n"
        "with torch.inference_mode():\n"
        "    assert not cpu.prepare() and not cpu.prepare()\n"
        "    x, w = torch.ones(1, 2, 8), torch.ones(3, 8)\n"
        "    assert kernels.linear(x, w).eq(8).all() and kernels.linear(x, w).shape == (1, 2, 3)\n"
        "    assert kernels.linear(x, *formats.int8_rows(w)).allclose(torch.tensor(8.))\n"
        "    q, cache = torch.ones(1, 2, 4, 8), torch.arange(6.)[:, None].expand(1, 2, 6, 8)\n"
        "    wanted = torch.tensor([1., 2.])[:, None, None]\n"
        "    assert kernels.attend(q, 0 * cache, cache, torch.tensor([2, 4])).allclose(wanted)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"CXX": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stderr.count("\n") == 1 and "slower" in result.stderr, result.stderr
