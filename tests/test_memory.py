"""Memory is flat, however often texts are written and models are loaded."""

import gc
import os
import resource

import pytest

from checkpoint import load_model
from generate import Decoder
from processes import end, fork

SLACK = 1 << 20  # bytes: what Python's allocator may keep


def resident():
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def growth(step, before, after):
    """By how many bytes the process grew from call number `before` of step() to call number `after`."""
    for _ in range(before):
        step()
    start = resident()
    for _ in range(after - before):
        step()
    return resident() - start


def check(make_step, before, after, most):
    """In a process of its own, where nothing else comes and goes."""

    def run():
        grown = growth(make_step(), before, after)
        assert grown <= most, f"grew by {grown} bytes"

    code, text = end(*fork(run))
    assert code == 0, text


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system doesn't tell")


@needs_proc
@pytest.mark.parametrize("how", [dict(), dict(exit_layer=2, k=3, ngram_k=3)])
@pytest.mark.slow
def test_two_thousand_texts(how, checkpoint):
    def make():
        decoder = Decoder(load_model(checkpoint("llama2")), rows=64, **how)
        return lambda: list(decoder.generate([1, 2, 3], 5))

    check(make, 200, 2000, SLACK)


@needs_proc
@pytest.mark.slow
def test_twenty_loads(checkpoint):
    """Each is freed by its last reference; 20 of them would take at least 20 times the file's size."""
    path = checkpoint("llama2")

    def make():
        return lambda: list(Decoder(load_model(path), rows=64, exit_layer=2, k=3).generate([1, 2, 3], 5))

    check(make, 5, 25, SLACK + path.stat().st_size)
