"""The kernels against float64, and their promise that a row never depends on its neighbours."""

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch

from conftest import ROOT
from kernels import cpu, cuda, formats
from model import ModelConfig, Transformer

ROWS = [*range(1, 10), 16]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def built(two_threads):
    assert cpu.prepare(), "the C++ kernels must build where the tests run"
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k", [(1, 1), (7, 5), (64, 48), (33, 100), (130, 320), (1000, 257)])
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


def layers_model(heads, kv_heads, c, ffn, dtype):
    """Two layers with weights large enough for sharp attention and saturated gates."""
    torch.manual_seed(heads * c)
    config = ModelConfig(
        vocab_size=8,
        dim=heads * 10 + 3,
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


def alone(f, m):
    """Compare f(rows) of all m rows with f of fewer: of each by itself where the arithmetic is the GPU's own."""
    y = f(slice(0, m))
    for i in range(m):
        part = slice(i, i + 1) if GPU == "cuda" else slice(0, i + 1)
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
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx -mno-fma"])
def test_narrower_vectors(without, tmp_path):
    """The tests above, where the processor has no AVX-512, or no vectors that the source knows by name."""
    chosen = "not gpu and ((linear and 130-320) or layers or panels or gates or threads)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", chosen, __file__],
        env={**os.environ, "CXX": f"g++ {without}", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]


def test_says_so_without_a_compiler(tmp_path):
    """No compiler: a warning, once, and the same numbers from plain PyTorch."""
    code = (
        "import torch, kernels, warnings\nfrom kernels import cpu, formats\n"
        "with torch.inference_mode(), warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert not cpu.prepare() and not cpu.prepare()\n"
        "    assert len(seen) == 1 and 'slower' in str(seen[0].message), seen\n"
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
    assert result.returncode == 0, result.stderr
