import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the GPU's kernels run in its interpreter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

LONGEST = [
    "test_tp",
    "test_faults",
    "test_smollm2",
    "test_generate",
    "test_train",
    "test_torchrun",
    "test_measure",
    "test_scripts",
    "test_hub",
    "test_drafters",
    "test_folders",
    "test_architectures",
    "test_quantize",
    "test_kernels",
]


def pytest_collection_modifyitems(items):
    """What takes longest first, so that the workers end together: each is given file after file."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


# The four shapes of the family, tiny: what differs between Llama 2, CodeLlama, Llama 3 and Llama 3.2.
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
FAMILY = {
    "llama2": dict(vocab_size=320, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False),
    "codellama": dict(
        vocab_size=336,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        rms_norm_eps=1e-5,
    ),
    "llama3": dict(
        vocab_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        head_dim=24,
        rope_parameters=dict(rope_type="default", rope_theta=5e5),
        eos_token_id=[5, 7],
    ),
    "llama3.2": dict(
        vocab_size=384,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters=dict(LLAMA3_ROPE, rope_theta=5e5),
        eos_token_id=[5, 7],
    ),
}


def make_hf_model(shape, seed=0, **overrides):
    """A tiny random transformers model of one of the family's shapes, its weights large enough to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **dict(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=4,
                max_position_embeddings=128,
                initializer_range=0.15,
                bos_token_id=1,
                eos_token_id=2,
            ),
            **FAMILY[shape],
            **overrides,
        }
    )
    return LlamaForCausalLM(config).eval()


def write_tokenizer(folder, vocab_size=300):
    """A tiny sentencepiece tokenizer with byte fallback."""
    import sentencepiece

    words = [f"def f{i}(x): return x * {i} + value" for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(Path(folder) / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """Function: shape -> (folder in Hugging Face's layout with model.safetensors, the transformers model)."""
    made = {}

    def make(shape):
        if shape not in made:
            folder = tmp_path_factory.mktemp(shape)
            model = make_hf_model(shape)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[shape] = folder, model
        return made[shape]

    return make


@pytest.fixture(scope="session")
def checkpoint(hf_folder):
    """Function: shape -> path of the converted model.pth."""
    from convert_hf_checkpoint import convert

    return lambda shape: convert(hf_folder(shape)[0])


@pytest.fixture
def two_threads():
    """The tests run with one thread each (scripts/test.sh); these are of what several threads share."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_pytorch(monkeypatch):
    """No kernels: what a GPU's compiler is given, which on the CPU has nothing to compile otherwise."""
    import kernels

    monkeypatch.setattr(kernels, "enabled", False)


@pytest.fixture
def traced(plain_pytorch, monkeypatch):
    """The same, and torch.compile makes graphs and runs them as they are: generating code for them takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def call(main, *args, input=""):
    """Run a command's `main` in this process, which saves a start-up of seconds; the result as of subprocess.run."""
    from command import run_command

    code, before = None, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, args)])
        for name, text in dict(stdin=input, stdout="", stderr="").items():
            data = io.BytesIO(text if isinstance(text, bytes) else text.encode())
            patch.setattr(sys, name, io.TextIOWrapper(data, encoding="utf-8", write_through=True))
        try:
            run_command(main)
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        stdout, stderr = (stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr))
    if isinstance(code, str):  # as Python ends then
        code, stderr = 1, f"{stderr}{code}\n"
    return SimpleNamespace(returncode=code or 0, stdout=stdout, stderr=stderr)


def torchrun(n, *command, threads=1, **how):
    """`torchrun --nproc_per_node=n command`, as a Popen with pipes.

    Its processes are not forked (--start-method=fork), though that would save each a start-up of seconds: torchrun has
    threads, which a copy of it lacks, and one such rank ended with a corrupted heap.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    modules = f"{ROOT}:{ROOT / 'scripts'}"  # for scripts that a test writes
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env={**os.environ, **settings, "PYTHONPATH": modules},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def edit_json(path, **changes):
    """Set fields of a JSON file; a value of None removes the field."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
