"""The quantized formats against their definition in float64, the kernels against dequantized products, whole models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import export_hf_checkpoint
import generate
import kernels
import quantize as q
import train
from checkpoint import load_config, load_model, save_checkpoint
from command import InputError
from conftest import ROOT, call, make_hf_model, write_tokenizer
from generate import Decoder, Sampling
from kernels import cpu, cuda, formats
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    """A random model whose feed-forward width 96 takes groups of 32 but not of 64, with a text to calibrate on."""
    from convert_hf_checkpoint import convert

    folder = tmp_path_factory.mktemp("quantize")
    make_hf_model("llama3", head_dim=16).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "text.txt").write_text("".join(f"def f{i}(x): return x * {i} + value\n" for i in range(300)))
    return convert(folder)


def command(path, *args):
    return call(q.main, "--checkpoint_path", path, *args)


@pytest.fixture(scope="module")
def quantized(checkpoint_path):
    """Function: mode -> path of the checkpoint that the command wrote."""
    made = {}

    def make(mode):
        if mode not in made:
            calibration = (
                ["--calibration", checkpoint_path.with_name("text.txt"), "--calibration_length", 64]
                if mode == "int4-gptq"
                else []
            )
            result = command(checkpoint_path, "--mode", mode, "--groupsize", 32, *calibration)
            assert result.returncode == 0, result.stderr
            made[mode] = checkpoint_path.with_name("model_int8.pth" if mode == "int8" else f"model_{mode}.g32.pth")
        return made[mode]

    return make


def exact_int4(weight, scale, zero):
    """What the format stands for, nibble by nibble, in float64."""
    N, K = weight.shape[0], weight.shape[1] * 2
    w = torch.empty(N, K, dtype=torch.float64)
    for k in range(K):
        byte = weight[:, k // 32 * 16 + k % 16].int()
        value = byte % 16 if k % 32 < 16 else byte // 16
        g = k * scale.shape[1] // K
        w[:, k] = (value - 8) * scale[:, g].double() + zero[:, g].double()
    return w


@pytest.mark.parametrize("groupsize", [32, 64])
def test_int4_round_trip(groupsize):
    w = torch.randn(7, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 7)[:, None] + 0.01
    weight, scale, zero = formats.int4_groups(w, groupsize)
    assert (weight.shape, weight.dtype, scale.shape, scale.dtype, zero.shape) == (
        (7, 96),
        torch.uint8,
        (7, 192 // groupsize),
        torch.bfloat16,
        scale.shape,
    )
    exact = exact_int4(weight, scale, zero)
    step = scale.double().repeat_interleave(groupsize, 1)
    # half a step, and what the rounding of scale and zero to 8 bits cuts off at the ends of the range
    assert (
        (exact - w.double()).abs()
        <= step * 0.5 + 2**-8 * (8 * step + zero.double().abs().repeat_interleave(groupsize, 1))
    ).all()
    assert (
        formats.dequantize(weight, scale, zero, torch.float32).double() - exact
    ).abs().max() <= 1e-6 * exact.abs().max()


def test_constant_groups_survive():
    w = torch.tensor([[0.0] * 32 + [3.0] * 32])
    assert torch.allclose(formats.dequantize(*formats.int4_groups(w, 32), torch.float32), w, atol=1e-6)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,k,groupsize", [(1, 32, 32), (33, 96, 32), (130, 320, 64), (40, 512, 256)])
@pytest.mark.parametrize("m", [*range(1, 10), 16, 20])
def test_int4_linear(m, n, k, groupsize, dtype):
    assert cpu.prepare()
    g = torch.Generator().manual_seed(m * n + k)
    x, tensors = (
        torch.randn(1, m, k, generator=g).to(dtype),
        formats.int4_groups(torch.randn(n, k, generator=g), groupsize),
    )
    w = exact_int4(*tensors)
    with torch.inference_mode():
        y = kernels.linear(x, *formats.panels(*tensors))[..., :n]
        exact = x.double() @ w.T
        terms = (
            k if m <= kernels.MAX_ROWS or dtype == torch.float32 else 2**16
        )  # beyond, PyTorch multiplies weights rounded to dtype
        bound = x.double().abs() @ w.abs().T * (terms + 8) * 2**-24 + exact.abs() * torch.finfo(dtype).eps
        assert y.shape == (1, m, n) and y.dtype == dtype and ((y.double() - exact).abs() <= bound + 1e-30).all()
        for i in range(m if m <= kernels.MAX_ROWS else 0):
            assert torch.equal(kernels.linear(x[:, i : i + 1], *formats.panels(*tensors))[:, 0, :n], y[:, i])


@pytest.mark.parametrize("m,n,k,groupsize", [(1, 7, 64, 32), (5, 40, 320, 64), (16, 33, 512, 256)])
def test_gpu_int4_linear(m, n, k, groupsize):
    assert cuda.triton, "Triton must be installed where the tests run"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(k)
    x, tensors = torch.randn(1, m, k, generator=g), formats.int4_groups(torch.randn(n, k, generator=g), groupsize)
    w = exact_int4(*tensors)
    with torch.inference_mode():
        y = cuda.linear(x.to(device), *(t.to(device) for t in tensors)).cpu()
    assert ((y.double() - x.double() @ w.T).abs() <= x.double().abs() @ w.abs().T * (k + 8) * 2**-23).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding(act_order):
    """On correlated inputs the error of the outputs falls, and each weight stays on its group's grid."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 128, generator=g), torch.randn(600, 128, generator=g) @ torch.randn(128, 128, generator=g)

    def error(tensors):
        return ((exact_int4(*tensors) - w.double()) @ x.double().T).norm()

    assert error(q.gptq(w, x.T @ x, 32, act_order)) < 0.8 * error(formats.int4_groups(w, 32))


def test_gptq_with_uncorrelated_inputs_is_rounding():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    ours, plain = q.gptq(w, torch.eye(64), 32), formats.int4_groups(w, 32)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=False))


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_the_file_holds_what_the_format_says(quantized, checkpoint_path, mode):
    """Logits of the quantized model equal those of the unquantized one with every matrix replaced by its dequantized
    self.
    """
    path = quantized(mode)
    config = load_config(path.with_suffix(".json"))
    assert (config.quantization, config.groupsize) == (mode.split("-")[0], None if mode == "int8" else 32)
    state, model, plain = torch.load(path, weights_only=True), load_model(path), load_model(checkpoint_path)
    for name, weight in plain.named_parameters():
        scale, zero = (state.get(name.removesuffix("weight") + part) for part in ("scale", "zero"))
        exact = (
            state[name].double()
            if scale is None
            else exact_int4(state[name], scale, zero)
            if zero is not None
            else state[name].double() * scale.double()[:, None]
        )
        error = (exact - weight.double()).norm() / weight.double().norm()
        assert error == 0 if scale is None else error < (0.02 if zero is None else 0.2), name
        weight.copy_(exact)
    with torch.inference_mode():
        tokens = torch.randint(3, 300, (1, 40))
        torch.testing.assert_close(model.logits(model(tokens)), plain.logits(plain(tokens)), atol=1e-4, rtol=1e-4)
        for m in (model, plain):
            m.setup_caches(40), m(tokens[:, :30])
        pos = torch.arange(30, 34)
        torch.testing.assert_close(
            model.logits(model(tokens[:, 30:34], pos)), plain.logits(plain(tokens[:, 30:34], pos)), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("width", [64, 40])
def test_layers_whose_width_no_panel_divides(width):
    """The gate's outputs end, and the other half's begin, within a panel of 16."""
    torch.manual_seed(width)
    shape = dict(vocab_size=50, dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=width)
    plain = Transformer(ModelConfig(**shape, context=64)).requires_grad_(False)
    model = Transformer(ModelConfig(**shape, context=64, quantization="int8")).requires_grad_(False)
    for name, weight in plain.named_parameters():
        own = model.get_parameter(name) if "norm" in name or "embed" in name else None
        if own is not None:
            own.copy_(weight)
            continue
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.weight, linear.scale = formats.int8_rows(weight)
        weight.copy_(linear.weight * linear.scale[:, None])
    ids, pos = torch.randint(50, (1, 5)), torch.arange(5)
    with torch.inference_mode():
        for m in (model, plain):
            m.setup_caches(20)
        assert model.layers[0].ffn.w13.weight.dim() == 3
        torch.testing.assert_close(model.logits(model(ids, pos)), plain.logits(plain(ids, pos)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow
def test_speculation_is_exact_on_quantized_models(quantized, checkpoint_path, mode):
    model, draft = load_model(quantized(mode)), load_model(checkpoint_path)
    grid = [dict(exit_layer=e, k=k) for e in (1, 3) for k in (1, 4)] + [dict(draft_model=draft, k=3)]
    plain = list(Decoder(model).generate([1, 5, 9], 60))
    for how in grid:
        assert list(Decoder(model, **how).generate([1, 5, 9], 60)) == plain
    sampled = Decoder(model, exit_layer=2, k=3, sampling=Sampling(0.8, 50), seed=1)
    assert len(list(sampled.generate([1, 5, 9], 40))) == 40


def test_bytes_are_those_of_the_file(quantized, checkpoint_path):
    state = torch.load(quantized("int4"), weights_only=True)
    read = sum(t.nbytes for name, t in state.items() if name != "embed.weight")
    norms = sum(t.nbytes for name, t in state.items() if "norm" in name)
    assert Decoder(load_model(quantized("int4"))).full_bytes() == read + norms * (
        4 // state["norm.weight"].itemsize - 1
    )


def test_what_does_not_fit_stays_int8(checkpoint_path, tmp_path):
    for name in ("model.pth", "model.json", "tokenizer.model"):
        shutil.copy(checkpoint_path.with_name(name), tmp_path)
    result = command(tmp_path / "model.pth", "--mode", "int4", "--groupsize", 64)
    assert result.returncode == 0 and "doesn't divide the width of ffn.w2.weight: left in int8" in result.stdout
    state = torch.load(tmp_path / "model_int4.g64.pth", weights_only=True)
    assert state["layers.0.ffn.w2.weight"].dtype == torch.int8 and state["layers.0.ffn.w13.weight"].dtype == torch.uint8


@pytest.mark.parametrize("mode", [[], ["--mode", "int4", "--groupsize", 32]])
def test_the_first_layers_alone_draft_for_the_whole_model(mode, checkpoint_path, tmp_path):
    for name in ("model.pth", "model.json", "tokenizer.model"):
        shutil.copy(checkpoint_path.with_name(name), tmp_path)
    result = command(tmp_path / "model.pth", "--early_exit", 2, *mode)
    assert result.returncode == 0, result.stderr
    model, draft, prompt = (
        load_model(tmp_path / "model.pth"),
        load_model(*tmp_path.glob("model_*.e2.pth")),
        list(range(3, 12)),
    )
    assert draft.config.n_layer == 2 and draft.config.quantization
    with torch.inference_mode():  # it is the model cut there, but for rounding
        cut, own = (m.logits(m(torch.tensor([prompt]), None, 0, 2)) for m in (model, draft))
    assert torch.nn.functional.cosine_similarity(cut.flatten(), own.flatten(), dim=0) > 0.95 and not torch.equal(
        cut, own
    )
    plain = list(Decoder(model, rows=80).generate(prompt, 50))
    assert list(Decoder(model, draft_model=draft, k=3, rows=80).generate(prompt, 50)) == plain


def test_prompts_calibrate_as_the_text_they_are(checkpoint_path, tmp_path):
    from quantize import calibration_windows
    from tokenizer import Tokenizer

    tokenizer, config = Tokenizer.load(checkpoint_path.parent), load_model(checkpoint_path).config
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "def f1(x):", "reference": " return x * 1"}\n\n{"prompt": "value + \u2028 value"}\n' * 20
    )
    (tmp_path / "p.txt").write_text(
        "\n".join(["def f1(x): return x * 1", "value + \u2028 value"] * 20), encoding="utf-8"
    )
    jsonl, text = (calibration_windows(tmp_path / name, tokenizer, config, 32, 5) for name in ("p.jsonl", "p.txt"))
    assert len(jsonl) == 5 and all(torch.equal(a, b) for a, b in zip(jsonl, text, strict=True))


def test_bad_input_ends_in_one_line(quantized, checkpoint_path, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x")
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text("[1]")
    for path, args, message in [
        (quantized("int8"), [], "is quantized already (int8)"),
        (checkpoint_path, ["--mode", "int4", "--groupsize", 256], "--groupsize 256: divides the width of no matrix"),
        (checkpoint_path, ["--mode", "int4-gptq", "--groupsize", 32], "needs --calibration"),
        (checkpoint_path, ["--mode", "int4-gptq", "--groupsize", 32, "--calibration", short], "at least"),
        (
            checkpoint_path,
            ["--mode", "int4-gptq", "--groupsize", 32, "--calibration", jsonl],
            "t.jsonl, line 1: not a JSON object",
        ),
        (
            checkpoint_path,
            ["--mode", "int4-gptq", "--groupsize", 32, "--calibration", tmp_path / "none"],
            "No such file",
        ),
        (checkpoint_path, ["--early_exit", "4"], "--early_exit 4: the model has 4 layers"),
        (tmp_path / "none.pth", [], "not found"),
    ]:
        before = sorted(p.name for p in path.parent.glob("model*"))
        result = command(path, *args)
        lines = [line for line in result.stderr.splitlines() if "Warning" not in line]
        assert result.returncode == 1 and len(lines) == 1 and message in lines[0], result.stderr
        assert sorted(p.name for p in path.parent.glob("model*")) == before


def test_quantized_checkpoints_are_neither_exported_nor_trained(quantized, tmp_path):
    for args in (
        [export_hf_checkpoint.main, "--out", tmp_path / "out"],
        [train.main, "--out", tmp_path / "out", "--data", ROOT / "README.md"],
    ):
        result = call(*args, "--checkpoint_path", quantized("int8"))
        assert (
            result.returncode == 1
            and "is quantized (int8)" in result.stderr
            and "Traceback" not in result.stderr
            and not (tmp_path / "out").exists()
        )


def test_says_when_quantized_weights_are_slower(quantized, tmp_path):
    for precision, slow in (("float32", False), ("float16", True)):  # the CPU's kernels know no float16
        args = ("--checkpoint_path", quantized("int8"), "--num_samples", 1, "--max_new_tokens", 3, "--device", "cpu")
        result = call(generate.main, *args, "--precision", precision)
        assert result.returncode == 0 and ("slower than float weights" in result.stdout) == slow, result.stderr


@pytest.mark.slow
def test_prepare_converts_and_quantizes(checkpoint_path, tmp_path):
    folder = shutil.copytree(
        checkpoint_path.parent, tmp_path / "hf", ignore=shutil.ignore_patterns("model*.pth", "model*.json")
    )
    env = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "prepare.sh", folder, "int8"], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0 and load_model(folder / "model_int8.pth").config.quantization == "int8", result.stderr
    assert (
        subprocess.run(
            ["bash", ROOT / "scripts" / "prepare.sh", folder, "int3"], env=env, capture_output=True
        ).returncode
        == 2
    )


MEMORY = """
import sys
import torch
from generate import Decoder, load_model
status = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
load = lambda path: load_model(path, dtype=torch.bfloat16)
decode = lambda path: list(Decoder(load(path), exit_layer=3, k=3, rows=64).generate([1, 2, 3], 20))
decode(sys.argv[1])  # what PyTorch loads and sets up for itself
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
decode(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere mapped files are counted differently")
@pytest.mark.slow
def test_memory_is_that_of_the_file(quantized, tmp_path):
    """Loading and decoding take the file's size, the caches and a tenth, in the file's precision."""
    from benchmark import random_model

    model = random_model("100M", "int8", 6, 128, "cpu", torch.bfloat16)
    save_checkpoint(tmp_path / "model.pth", {name: t for name, t in model.state_dict().items()}, model.config)
    size = (tmp_path / "model.pth").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, quantized("int8"), tmp_path / "model.pth"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    caches = 2 * 12 * 12 * 64 * (64 + 8) * 2
    assert 0.9 * size < int(result.stdout) < 1.1 * size + caches, result.stderr


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_leaves_nothing_half_written(number, code, tmp_path):
    names = {"model.pth", "model.json", "tokenizer.model", "prompts.jsonl"}
    for name in names:
        shutil.copy(ROOT / "checkpoints" / "demo" / name, tmp_path)
    args = [
        "--checkpoint_path",
        tmp_path / "model.pth",
        "--mode",
        "int4-gptq",
        "--groupsize",
        "32",
        "--calibration",
        tmp_path / "prompts.jsonl",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "quantize.py", *args],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(".partial-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == code
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_description_of_another_mode_is_refused(quantized, checkpoint_path, tmp_path):
    shutil.copy(quantized("int8"), tmp_path / "model.pth")
    for source, message in (
        (checkpoint_path, "scale is not part of this architecture"),
        (quantized("int4"), "zero is missing"),
    ):
        shutil.copy(source.with_suffix(".json"), tmp_path / "model.json")
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "model.pth")
    values = json.loads(checkpoint_path.with_suffix(".json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, "quantization": "int3"}))
    with pytest.raises(InputError, match="quantization = 'int3'"):
        load_model(tmp_path / "model.pth")
