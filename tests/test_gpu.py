"""What only a GPU can show: a round is one real CUDA graph, the host doesn't wait for it, and rows don't depend on
their neighbours.
"""

import pytest
import torch

import kernels
from checkpoint import load_model
from generate import Decoder, Sampling

if not torch.cuda.is_available():
    pytest.skip("no GPU here: the real CUDA graph of a round is not tested", allow_module_level=True)

PROMPT = list(range(3, 20))


@pytest.fixture(params=[("llama2", False), ("llama3.2", False), ("llama2", True), ("llama3.2", True)])
def model(request, checkpoint, monkeypatch):
    shape, fuse = request.param
    monkeypatch.setattr(kernels, "fuse", fuse)
    return load_model(checkpoint(shape), "cuda", torch.float32)


@pytest.mark.parametrize("e,k", [(1, 1), (2, 4), (3, 7)])
def test_graphed_self_speculation_is_graphed_plain_decoding(model, e, k):
    plain = list(Decoder(model, rows=100, compile=True).generate(PROMPT, 60))
    assert list(Decoder(model, exit_layer=e, k=k, rows=100, compile=True).generate(PROMPT, 60)) == plain
    assert list(Decoder(model, exit_layer=e, k=k, rows=100).generate(PROMPT, 60)) == plain  # and without a graph


def test_rows_are_bitwise_the_same_however_many_go_together(model):
    with torch.inference_mode():
        model.setup_caches(64)
        ids, pos = torch.tensor([PROMPT], device="cuda"), torch.arange(len(PROMPT), device="cuda")
        one_by_one = torch.cat([model(ids[:, i : i + 1], pos[i : i + 1]) for i in range(8)], dim=1)
        for count in (2, 4, 8):
            assert torch.equal(model(ids[:, :count], pos[:count]), one_by_one[:, :count])


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
