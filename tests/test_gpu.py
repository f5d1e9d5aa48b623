"""What only a GPU can show: the kernels run there and are right at the shapes that decoding has, a round is one real
CUDA graph, the host doesn't wait for it, and rows don't depend on their neighbours.

Without a GPU the tests of shapes run in Triton's interpreter, at shapes that it can take.
"""

import pytest
import torch

import kernels
from checkpoint import load_model
from generate import Decoder, Sampling
from kernels import cuda, formats
from test_adapters import adapted
from test_kernels import fill, fused_model

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here")
# Query heads, key/value heads, their width, FFN, dim (on a GPU those of llama3.2-1B), and the rows of the caches.
*SHAPE, CACHE = [32, 8, 64, 8192, 2048, 4096] if HAS_GPU else [4, 2, 16, 96, 64, 300]
HEADS, KV_HEADS, WIDTH, FFN, DIM = SHAPE
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of errors, relative to the result's norm
CAPABILITY = torch.cuda.get_device_capability() if HAS_GPU else None
# The interpreter has no bfloat16, as GPUs before Ampere; test_kernels.py has its float32.
DTYPES = [dtype for dtype in BOUNDS if dtype != torch.bfloat16 or CAPABILITY >= (8, 0)] if HAS_GPU else [torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PROMPT = list(range(3, 20))


def assert_close(y, exact):
    assert y.isfinite().all() and (y.double() - exact).norm() < BOUNDS[y.dtype] * exact.norm()


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@needs_gpu
@dtypes
def test_decoding_shapes_are_taken(dtype, capsys):
    x = randn(1, dtype=dtype)
    kernels.prepare(x, HEADS // KV_HEADS, WIDTH)
    assert kernels.available(x) == "cuda", capsys.readouterr().err


@dtypes
@pytest.mark.parametrize("quantization", ["full", "int8", "int4"])
@torch.inference_mode()
def test_decoding_shapes_products(quantization, dtype):
    for n, k in (((HEADS + 2 * KV_HEADS) * WIDTH, DIM), (DIM, FFN)):
        w = randn(n, k)
        weight = (w.to(dtype),) if quantization == "full" else formats.round_weight(w, quantization, 32)
        exact_weight = w.to(dtype).double()
        if quantization != "full":
            exact_weight = formats.dequantize(*weight, torch.float32).double()
        for m in (1, 5, 8):
            x = randn(1, m, k, dtype=dtype)
            assert_close(cuda.linear(x, *weight), x.double() @ exact_weight.T)


@dtypes
@torch.inference_mode()
def test_decoding_shapes_attention(dtype):
    k, v = randn(1, KV_HEADS, CACHE, WIDTH, dtype=dtype), randn(1, KV_HEADS, CACHE, WIDTH, dtype=dtype) + 1
    for m in (1, 5, 8):
        q = randn(1, m, HEADS, WIDTH, dtype=dtype)
        pos = torch.arange(CACHE - m - 3, CACHE - 3, device=DEVICE)
        assert_close(cuda.attend(q, k, v, pos), kernels.attend(q.double(), k.double(), v.double(), pos))


@dtypes
@torch.inference_mode()
def test_decoding_shapes_norm(dtype):
    x, w = randn(1, 5, DIM, dtype=dtype), randn(DIM, dtype=dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    assert_close(cuda.norm(x, w, 1e-5), exact)


@dtypes
@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
@torch.inference_mode()
def test_decoding_shapes_layers(fuse, dtype, monkeypatch):
    model, exact = fused_model(monkeypatch, SHAPE, dtype, None)
    monkeypatch.setattr(kernels, "fuse", fuse)
    x, pos = torch.randint(8, (1, 5)), torch.arange(295, 300)
    fill(model, 1, 310, 299), fill(exact, 1, 310, 299, 0)
    assert_close(model(x.to(DEVICE), pos.to(DEVICE)).cpu(), exact(x, pos))


@pytest.fixture(
    params=[("llama2", False), ("llama3.2", False), ("llama2", True), ("llama3.2", True)],
    ids=["llama2-separate", "llama3.2-separate", "llama2-fused", "llama3.2-fused"],
)
def model(request, checkpoint, monkeypatch):
    shape, fuse = request.param
    monkeypatch.setattr(kernels, "fuse", fuse)
    return load_model(checkpoint(shape), "cuda", torch.float32)


@needs_gpu
@pytest.mark.parametrize("e,k", [(1, 1), (2, 4), (3, 7)])
def test_graphed_self_speculation_is_graphed_plain_decoding(model, e, k):
    plain = list(Decoder(model, rows=100, compile=True).generate(PROMPT, 60))
    assert list(Decoder(model, exit_layer=e, k=k, rows=100, compile=True).generate(PROMPT, 60)) == plain
    assert list(Decoder(model, exit_layer=e, k=k, rows=100).generate(PROMPT, 60)) == plain  # and without a graph


@needs_gpu
@pytest.mark.parametrize("block", [False, True], ids=["norm", "block"])
def test_graphed_drafts_through_an_adapter(model, block):
    plain = list(Decoder(model, rows=100, compile=True).generate(PROMPT, 60))
    how = dict(exit_layer=2, k=3, rows=100, compile=True)
    adapted(model, block)
    assert list(Decoder(model, **how).generate(PROMPT, 60)) == plain
    assert list(Decoder(model, draft_precision="int8", ngram_k=4, **how).generate(PROMPT, 60)) == plain


@needs_gpu
def test_rows_are_bitwise_the_same_however_many_go_together(model):
    with torch.inference_mode():
        model.setup_caches(64)
        ids, pos = torch.tensor([PROMPT], device="cuda"), torch.arange(len(PROMPT), device="cuda")
        one_by_one = torch.cat([model(ids[:, i : i + 1], pos[i : i + 1]) for i in range(8)], dim=1)
        for count in (2, 4, 8):
            assert torch.equal(model(ids[:, :count], pos[:count]), one_by_one[:, :count])


@needs_gpu
@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=3)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=50)])
def test_the_host_does_not_wait_for_a_round_which_is_one_launch(model, how, sampling):
    decoder = Decoder(model, rows=100, compile=True, seed=5, sampling=sampling, **how)
    first = list(decoder.generate(PROMPT, 40))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            rounds = [decoder.launch(decoder.drafter) for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({tuple(r()) for r in rounds}) > 1 or sampling.temperature == 0  # each replay draws new numbers
    launches = {event.key: event.count for event in profile.key_averages()}
    assert launches["cudaGraphLaunch"] == 6
    assert launches.get("cudaLaunchKernel", 0) <= 6 * (
        2 if sampling.temperature else 0
    )  # a replay sets the generator's seed and offset
    decoder.random.manual_seed(5)
    assert list(decoder.generate(PROMPT, 40)) == first
