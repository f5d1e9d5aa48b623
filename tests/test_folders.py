"""Whole checkpoint folders as they occur in the field: converted and run, with the same ids, tokens and text as
transformers.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import generate
from checkpoint import load_config, load_model
from conftest import ROOT, call, edit_json
from convert_hf_checkpoint import convert
from generate import Conversation, Decoder, Ending, run_sample
from test_tokenizer import CHATML, FAST, LLAMA, TOOLS, byte_level, spm, spm_decoder, spm_json
from tokenizer import Tokenizer

PROMPTS = ["def f(self):", " return  x\n"]
NEW_TOKENS = 24


def write_model(folder, seed=0, vocab=420, change=None, **config):
    """A random Llama for the folder's tokenizer. change: a function that is given the model before it is saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **{**shape, **config}))
    with torch.no_grad():
        if change:
            change(model)
    model.save_pretrained(folder)


def write_chain(folder, *pieces, vocab=420, **config):
    """A Llama that writes these tokens in a circle, the first of them after any other: {text of a token, or an id}."""
    tokenizer = Tokenizer.load(folder)
    ids = [tokenizer.table()[piece] if isinstance(piece, str) else piece for piece in pieces]

    def change(model):
        for layer in model.model.layers:  # they add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        head = model.lm_head.weight.zero_()
        head[ids[0]] = 1
        for now, then in zip(ids, ids[1:] + ids[:1], strict=False):
            head[:, now] = 0
            head[then, now] = 1

    write_model(folder, vocab=vocab, change=change, hidden_size=vocab, head_dim=16, num_hidden_layers=2, **config)


def theirs(folder, prompt, new_tokens=NEW_TOKENS):
    """transformers' (prompt ids, new greedy tokens, text of these)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = prompt if isinstance(prompt, list) else tokenizer(prompt).input_ids
    tokens = torch.tensor([ids])
    how = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    new = model.generate(tokens, **how)[0, len(ids) :].tolist()
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + new))
    return ids, new, whole[len(before) :]


def ours(path, prompt, new_tokens=NEW_TOKENS, **how):
    """The same of the converted checkpoint."""
    model, tokenizer = generate.load(path, "cpu", "float32")
    decoder = Decoder(model, **how)
    ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
    text = run_sample(decoder, tokenizer, ids, Ending.of(model, tokenizer, new_tokens))
    return ids, decoder.stats.tokens, text


def tied_with_a_head(folder):
    spm(folder, **LLAMA, add_bos_token=True)
    write_model(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)


def linear_rope(folder, old):
    spm(folder, **LLAMA, add_bos_token=True)
    scaling = dict(rope_type="linear", factor=4.0)
    write_model(folder, rope_parameters=dict(scaling, rope_theta=20000.0))
    if old:
        old_spelling = dict(type="linear", factor=4.0)
        edit_json(folder / "config.json", rope_parameters=None, rope_theta=20000.0, rope_scaling=old_spelling)


def both_spellings(folder):
    """The old one counts where the two contradict each other."""
    linear_rope(folder, old=True)
    edit_json(folder / "config.json", rope_parameters=dict(rope_type="default", rope_theta=500.0))


def llama3_rope(folder):
    """Without the length that it was trained for, which is then the context."""
    spm(folder, **LLAMA, add_bos_token=True)
    write_model(folder)
    scaling = dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)


def eos(folder, config=2, generation=None):
    """The model writes two words and <|im_end|>, id 2. generation: what generation_config.json is; None: not there."""
    byte_level(folder, **FAST)
    write_chain(folder, "Ġself", "Ġthe", "<|im_end|>", bos_token_id=0)
    edit_json(folder / "config.json", eos_token_id=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def hidden_token(folder, sort):
    """A word behind a token without text keeps its space."""
    sort(folder)
    write_chain(folder, "▁self", "<s>", "▁the")


def shown_and_hidden(folder):
    spm_decoder(folder)
    write_chain(folder, "▁self", "<tool>", "▁the", "</tool>", "<|im_start|>")


def half_characters(folder):
    spm(folder, **LLAMA, add_bos_token=True)
    write_chain(
        folder, "<0xE2>", "▁self", "<0xE2>", "<0x82>", "<0xAC>", "<0xAC>", "<s>", "<0xE2>", "<0x82>", "<0xAC>", "▁the"
    )


FOLDERS = {
    "a tied head that isn't": tied_with_a_head,
    "linear RoPE, old spelling": lambda f: linear_rope(f, old=True),
    "linear RoPE, new spelling": lambda f: linear_rope(f, old=False),
    "RoPE in both spellings": both_spellings,
    "Llama 3's RoPE without a length": llama3_rope,
    "EOS of config.json": eos,
    "EOS of generation_config.json": lambda f: eos(f, config=3, generation=dict(eos_token_id=[3, 2])),
    "generation_config.json has another EOS": lambda f: eos(f, generation=dict(eos_token_id=3)),
    "generation_config.json has no EOS": lambda f: eos(f, generation=dict(bos_token_id=0)),
    "no EOS": lambda f: eos(f, config=None),
    "no BOS before a text": lambda f: (
        byte_level(f, bos=False, tokenizer_class="GPT2Tokenizer"),
        write_model(f, bos_token_id=0),
    ),
    "BOS by the post-processor": lambda f: (byte_level(f, added=TOOLS, **FAST), write_model(f, bos_token_id=0)),
    "legacy sentencepiece": lambda f: (spm(f, **{**LLAMA, "legacy": True}, add_bos_token=True), write_model(f)),
    "Llama 2's tokenizer.json": lambda f: (spm_json(f, **LLAMA), write_model(f)),
    "hidden tokens, tokenizer.model": lambda f: hidden_token(f, lambda f: spm(f, **LLAMA, add_bos_token=True)),
    "hidden tokens, tokenizer.json": lambda f: hidden_token(f, lambda f: spm_json(f, **FAST)),
    "added tokens, some of them hidden": shown_and_hidden,
    "characters in halves": half_characters,
    "few fields in config.json": lambda f: (
        spm(f, **LLAMA, add_bos_token=True),
        write_model(f, num_key_value_heads=4, max_position_embeddings=2048),
        edit_json(
            f / "config.json", num_key_value_heads=None, max_position_embeddings=None, rms_norm_eps=None, head_dim=None
        ),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_give_transformers_answer(name, tmp_path):
    FOLDERS[name](tmp_path)
    path = convert(tmp_path)
    for prompt in PROMPTS:
        expected = theirs(tmp_path, prompt)
        assert ours(path, prompt) == expected
        assert ours(path, prompt, exit_layer=1, k=3) == expected


def test_a_head_of_its_own_is_said(tmp_path, capsys):
    tied_with_a_head(tmp_path)
    assert not load_config(convert(tmp_path).with_suffix(".json")).tied
    assert capsys.readouterr().out.count("the file has a head of its own, which is taken") == 1


def test_what_generation_config_asks_for_and_is_left_out_is_said(tmp_path, capsys):
    eos(tmp_path, generation=dict(eos_token_id=2, repetition_penalty=1.2, temperature=0.6, no_repeat_ngram_size=0))
    convert(tmp_path)
    assert (
        "note: generation_config.json sets repetition_penalty, which this engine leaves out" in capsys.readouterr().out
    )
    eos(tmp_path, generation=dict(eos_token_id=2, repetition_penalty=1.0))
    convert(tmp_path)
    assert "note" not in capsys.readouterr().out


def test_an_older_description_of_llama3s_rope_is_still_read(tmp_path):
    llama3_rope(tmp_path)
    path = convert(tmp_path)
    before = load_model(path).inv_freq
    values = json.loads(path.with_suffix(".json").read_text())
    del values["rope_scaling"]["rope_type"]
    path.with_suffix(".json").write_text(json.dumps(values))
    assert torch.equal(load_model(path).inv_freq, before)


# The command line on such folders.


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A folder with a chat template, whose model writes " self", " the", an end of turn, and so on."""
    folder = tmp_path_factory.mktemp("chat")
    byte_level(folder, bos=False, chat_template=CHATML, **FAST)
    write_chain(folder, "Ġself", "Ġthe", "<|im_end|>", bos_token_id=0, eos_token_id=2)
    convert(folder)
    return folder


def arguments(folder, *args):
    return ["--checkpoint_path", folder / "model.pth", "--temperature", 0, *args]


def command(folder, *args, **how):
    return call(generate.main, *arguments(folder, *args), **how)


def process(folder, *args, **how):
    """As a process of its own; output in bytes."""
    run = [sys.executable, ROOT / "generate.py", *arguments(folder, *args)]
    return subprocess.run([*map(str, run)], capture_output=True, **how)


def sample(folder, *args, **how):
    result = command(folder, "--num_samples", 1, "--max_new_tokens", 12, "--json", "-", *args, **how)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["samples"][0]


def test_chat_is_what_transformers_makes_of_it(chat_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    talk = [dict(role="system", content="be brief"), dict(role="user", content="hello")]
    for messages, args in ((talk[1:], []), (talk, ["--system", "be brief"])):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = sample(chat_folder, "--chat", "--prompt", "hello", *args)
        assert answer["prompt_tokens"] == len(ids)
        assert (answer["tokens"], answer["text"]) == theirs(chat_folder, ids)[1:]
        assert answer["text"] == " self the"


def test_what_ends_a_sample(chat_folder):
    self_id, the_id = (Tokenizer.load(chat_folder).table()[token] for token in ("Ġself", "Ġthe"))
    common = (chat_folder, "--prompt", "x")
    assert sample(*common)["tokens"] == [self_id, the_id, 2]
    assert sample(*common, "--stop_token_ids", self_id, 7)["tokens"] == [self_id]
    cut = sample(*common, "--stop", " th", "zz")
    assert (cut["text"], cut["tokens"]) == (" self", [self_id, the_id])
    description = chat_folder / "model.json"
    before = description.read_text()
    description.write_text(json.dumps({**json.loads(before), "eos_ids": []}))
    try:
        assert sample(*common)["tokens"] == [self_id, the_id, 2] * 4
        special = sample(*common, "--stop", "<|im_end|>")
        assert (special["text"], special["tokens"]) == (" self the", [self_id, the_id, 2])
    finally:
        description.write_text(before)


def test_prompts_from_files_are_taken_as_they_are(chat_folder, tmp_path):
    text = "\ufeff  two\r\n\n é\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    count = len(Tokenizer.load(chat_folder).encode(text))
    assert sample(chat_folder, "--prompt_file", tmp_path / "prompt.txt")["prompt_tokens"] == count
    assert sample(chat_folder, "--prompt_file", "-", input=text.encode())["prompt_tokens"] == count
    assert sample(chat_folder, "--prompt", text)["prompt_tokens"] == count
    for args, given, words in (
        (["--prompt_file", "-"], b"\xff", "standard input: is not valid UTF-8"),
        (["--prompt_file", "nowhere.txt"], b"", "nowhere.txt: can't be read (No such file or directory)"),
        (["--prompt_file", "-", "--prompt", "x"], b"", "both name a prompt"),
        (["--chat"], b"", "--chat: needs --prompt TEXT"),
        (["--system", "x", "--prompt", "x"], b"", "--system is for --chat"),
        (["--stop_token_ids", "-1"], b"", "--stop_token_ids -1: must be a whole number from 0"),
    ):
        result = command(chat_folder, *args, input=given)
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_terminal_without_the_characters_loses_nothing(chat_folder, tmp_path):
    args = ("--prompt", "é漢🙂", "--num_samples", 1, "--json", tmp_path / "out.json")
    for encoding in ("ascii", "cp1252"):
        result = process(chat_folder, *args, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert result.returncode == 0 and b"? self the" in result.stdout
        assert json.loads((tmp_path / "out.json").read_text())["samples"][0]["text"] == " self the"


@pytest.mark.slow
def test_interactive_chat_over_several_turns(chat_folder):
    lines = ["hello", "", "\udcff\udcfe", "x" * 6000, "and more"]
    given = "\n".join(lines).encode("utf-8", "surrogateescape") + b"\n"
    result = process(chat_folder, "--chat", "--interactive", "--system", "be brief", input=given)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b" self the\n") == 2 and result.stdout.count(b"error: ") == 2
    assert b"error: the line is not valid UTF-8" in result.stdout and b"there is room for 256" in result.stdout
    assert b"prefill of" in result.stdout.splitlines()[-2]


def test_interactive_without_chat_takes_long_lines_and_ends_with_the_input(chat_folder):
    result = command(chat_folder, "--interactive", input=b"x " * 100 + b"\n")
    assert result.returncode == 0 and result.stdout.count("tokens/sec") == 1


def test_a_folder_without_a_template_refuses_to_chat(checkpoint):
    result = command(checkpoint("llama2").parent, "--chat", "--prompt", "x")
    assert result.returncode == 1 and "has no chat template" in result.stderr and result.stderr.count("\n") == 1


# Conversations: the caches are kept from turn to turn.


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model with a chat template: what it says depends on every row of its caches."""
    folder = tmp_path_factory.mktemp("talker")
    byte_level(folder, bos=False, chat_template=CHATML, **FAST)
    write_model(folder, bos_token_id=0, eos_token_id=3, max_position_embeddings=512)
    return generate.load(convert(folder), "cpu", "float32")


@pytest.mark.parametrize("how", [dict(), dict(exit_layer=1, k=3), "draft"])
def test_a_turn_reads_only_what_is_new(how, talker):
    model, tokenizer = load_model_like(talker[0]), talker[1]
    how = dict(draft_model=load_model_like(model), k=3) if how == "draft" else how
    decoder, ending = Decoder(model, **how), Ending.of(model, tokenizer, 20)
    conversation = Conversation(decoder, tokenizer, ending, system="be brief")

    def turn(text):
        """Of one turn: the tokens fed for its prompt, and its length. What is said is what a decoder without caches
        says.
        """
        before = list(model.cached_ids)
        conversation.answer(text)
        prompt = tokenizer.chat(conversation.messages[:-1])
        expected = list(Decoder(load_model_like(model)).generate(prompt, 20, ending.ids))
        assert decoder.stats.tokens == expected
        common = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt))
        )
        assert decoder.stats.prefill_tokens == len(prompt) - min(common, len(prompt) - 1)
        return decoder.stats.prefill_tokens, len(prompt)

    fed, first = turn("hello")
    assert fed == first
    fed, second = turn("and then?")
    assert fed <= second - first + 1  # the first prompt's rows are kept, up to the header of its answer
    fed, third = turn("more")
    assert fed <= third - second + 1
    del conversation.messages[3:]  # back to after the first answer
    fed, whole = turn("something else")
    assert fed <= whole - first + 1
    system = len(tokenizer.encode(tokenizer.render(conversation.messages[:1], add_generation_prompt=False)))
    conversation.messages[1] = dict(role="user", content="hullo")  # an edited turn: back to the system message
    fed, whole = turn("again")
    assert whole - first < fed <= whole - system


def load_model_like(model):
    """Another model with the same weights, and no caches."""
    other = type(model)(model.config).requires_grad_(False).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def test_an_interrupted_answer_stays_in_the_conversation(talker):
    model, tokenizer = load_model_like(talker[0]), talker[1]
    conversation = Conversation(Decoder(model), tokenizer, Ending.of(model, tokenizer, 20))

    def interrupt(piece):
        if len(said.append(piece) or said) == 3:
            raise KeyboardInterrupt

    said = []
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("hello", interrupt)
    assert conversation.messages[-1] == dict(role="assistant", content="".join(said))
    before = list(conversation.messages)
    with pytest.raises(generate.InputError, match="there is room for"):
        conversation.answer("x " * 600)
    assert conversation.messages == before
    conversation.answer("go on")
    prompt = tokenizer.chat(conversation.messages[:-1])
    assert conversation.decoder.stats.tokens == list(Decoder(load_model_like(model)).generate(prompt, 20, (3,)))


def in_terminal(folder, keys, args=()):
    """What generate.py --interactive writes to a terminal on which the keys are typed, each when it asks for a line."""
    import pty
    import select
    import time

    run = [sys.executable, ROOT / "generate.py", "--checkpoint_path", folder / "model.pth", "--interactive", *args]
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, list(map(str, run)))
    written, asked, end = (
        b"",
        b"\x1b[?2004h",
        time.time() + 120,
    )  # what switches bracketed paste on comes before each line
    try:
        while time.time() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                new = os.read(terminal, 65536)
                written += new
                if b"\x1b[6n" in new:  # where is the cursor?
                    os.write(terminal, b"\x1b[1;1R")
            elif keys and written.count(asked) > 0:
                written = written.replace(asked, b"")
                os.write(terminal, keys.pop(0))
    except OSError:  # the process has ended
        pass
    return written, os.waitpid(process, 0)[1]


@pytest.mark.slow
def test_in_a_terminal_lines_are_of_any_length(chat_folder):
    """Longer than the 4095 characters of a terminal's own lines; several lines pasted at once; Ctrl-C, the line
    before, Ctrl-D.
    """
    pytest.importorskip("prompt_toolkit")
    paste = b"\x1b[200~one\ntwo\x1b[201~\r"
    written, status = in_terminal(chat_folder, [b"x" * 5000 + b"\r", paste, b"given up\x03", b"\x1b[A\r", b"\x04"])
    assert status == 0
    count = len(Tokenizer.load(chat_folder).encode("x" * 5000))
    assert f"the prompt has {count} tokens".encode() in written
    lines = len(Tokenizer.load(chat_folder).encode("one\ntwo"))
    assert written.count(f"prefill of {lines} tokens".encode()) == 2
