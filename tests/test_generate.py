"""generate.py: text in, text out, the JSON lines others read, stop strings, standard input, mistakes."""

import io
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import generate
from cli import UserError
from generate import GenerateConfig, TextStream, end_tokens
from model import GPT, GPTConfig
from model_folder import write_model_folder
from tokenizer import ByteLevelBPE, Tokenizer, encode_chat
from tokenizer.bpe_training import PATTERNS, count_chunks, train_merges
from tokenizer.tokenizer_json import trained_spec

ROOT = Path(__file__).parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def small_tokenizer() -> Tokenizer:
    merges = train_merges(count_chunks(["the cat sat on the mat, the hat on the cat " * 3], PATTERNS["gpt2"], 256), 20)
    return ByteLevelBPE(trained_spec(merges, PATTERNS["gpt2"], SPECIAL), {"eos_token": SPECIAL[0]})


def write_folder(folder: Path, position: str = "learned", context: int = 64, extra_vocabulary: int = 0) -> Path:
    """A random model with its tokenizer; its texts are long and mixed, broken UTF-8 in them."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    vocabulary = tokenizer.vocab_size + extra_vocabulary
    model = GPT(GPTConfig(vocabulary, context, n_layer=2, n_head=2, n_embd=32, position=position))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_model_folder(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def stdin(monkeypatch):
    """A function that puts text on standard input, piped or as from a terminal."""

    def put(text: str | bytes, terminal: bool = False) -> None:
        stream = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text), encoding="utf-8")
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    return put


def completions(capsys, **flags) -> list[dict]:
    """The JSON lines that generate.py prints."""
    generate.main(GenerateConfig(json=True, **{"max_new_tokens": 12} | flags))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def command(*flags: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    line = [sys.executable, ROOT / "generate.py", *flags]
    return subprocess.run(line, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120)


def test_json_contract_of_the_command(folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "the cat", "id": 1}\n\n{"prompt": ""}\n{"prompt": "é the\\u2028mat"}\n', encoding="utf-8"
    )
    flags = ["--model", folder, "--prompts-file", file, "--temperature", "0", "--max-new-tokens", "9", "--json"]
    done = command(*flags, "--batch-size", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr  # the progress bar
    lines, tokenizer = [json.loads(line) for line in done.stdout.splitlines()], small_tokenizer()
    assert [line["prompt"] for line in lines] == ["the cat", "", "é the\u2028mat"]
    model = generate.read_model_folder(folder).eval()
    for line in lines:
        assert list(line) == ["prompt", "text", "tokens", "logprobs", "finish_reason"]
        assert line["finish_reason"] in ("stop", "length") and len(line["tokens"]) <= 9
        assert line["text"] == tokenizer.decode([t for t in line["tokens"] if t != tokenizer.end_of_text])
        start = tokenizer.encode(line["prompt"]) or [tokenizer.end_of_text]
        with torch.no_grad():
            logprobs = model(torch.tensor([start + line["tokens"]]))[0, len(start) - 1 : -1].log_softmax(-1)
        assert line["tokens"] == logprobs.argmax(-1).tolist()
        assert line["logprobs"] == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-4)


def test_a_single_prompt_streams_what_json_says(folder, capsys):
    for seed in range(6):
        flags = {"model": folder, "prompt": ("the cat",), "seed": seed, "max_new_tokens": 40}
        [line] = completions(capsys, **flags, stop=("t",))
        generate.main(GenerateConfig(**flags, stop=("t",)))
        assert capsys.readouterr().out == f"the cat{line['text']}\n"


def test_samples_seeds_and_batch_sizes(folder, capsys):
    flags = {"model": folder, "prompt": ("the cat", "a", "None"), "samples": 3}
    lines = completions(capsys, **flags, batch_size=8)
    assert [line["prompt"] for line in lines] == ["the cat"] * 3 + ["a"] * 3 + ["None"] * 3
    assert len({line["text"] for line in lines}) == 9
    texts = lambda **more: [line["text"] for line in completions(capsys, **flags, **more)]
    assert texts(batch_size=1) == texts(batch_size=4) == [line["text"] for line in lines]
    assert texts(seed=1) != texts(seed=0)
    generate.main(GenerateConfig(**flags, max_new_tokens=12))
    assert capsys.readouterr().out == "".join(f"{line['prompt']}{line['text']}\n{'-' * 16}\n" for line in lines)


def test_a_stop_string_ends_the_text(folder, capsys):
    [free] = completions(capsys, model=folder, prompt=("the",), max_new_tokens=30)
    stop = free["text"][5:9]  # of several tokens
    [line] = completions(capsys, model=folder, prompt=("the",), max_new_tokens=30, stop=("never said", stop))
    assert line["text"] == free["text"][: free["text"].index(stop)]
    assert line["finish_reason"] == "stop"
    assert line["tokens"] == free["tokens"][: len(line["tokens"])] != free["tokens"]
    assert stop in small_tokenizer().decode(line["tokens"])  # the tokens that spelt it are among the tokens


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the stop string found first in it as it grows a character at a time."""
    for end in range(len(text) + 1):
        if starts := [text[:end].index(stop) for stop in stops if stop in text[:end]]:
            return text[: min(starts)]
    return text


def test_streams_show_no_part_of_a_stop_string_and_no_part_of_a_character():
    tokenizer, draw, stopped = small_tokenizer(), random.Random(0), 0
    for _ in range(400):
        text = "".join(draw.choice(["a", "b", "ab", "é", "🙂", "the cat"]) for _ in range(draw.randint(0, 12)))
        stops = ["".join(draw.choices("abé🙂t", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 3))]
        stream, shown = TextStream(tokenizer, stops), ""
        for byte in text.encode():  # a token a byte, so that every string crosses tokens
            shown += stream.push(byte_token(tokenizer, byte))
            assert cut(text, stops).startswith(shown)
            if stream.stopped:
                break
        shown += stream.close()
        stopped += stream.stopped
        assert shown == stream.text == cut(text, stops)
    assert 100 < stopped < 300


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    return tokenizer.token_bytes().index(bytes([byte]))


def test_a_stream_ends_in_a_broken_character():
    tokenizer = small_tokenizer()
    stream = TextStream(tokenizer, ["ax"])
    shown = [stream.push(byte_token(tokenizer, byte)) for byte in b"ba\xf0\x9f"]
    assert shown == ["b", "", "", ""]  # "a" may begin the stop string
    assert (stream.close(), stream.text, stream.stopped) == ("a�", "ba�", False)


def test_end_tokens(folder, tmp_path):
    tokenizer = small_tokenizer()
    end, message_end = (tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>"))
    assert end_tokens(folder, tokenizer, chat=False) == {end}
    assert end_tokens(folder, tokenizer, chat=True) == {end, message_end}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_tokens(tmp_path, tokenizer, chat=False) == {end, 7, 8}


def test_piped_prompts(folder, capsys, stdin):
    stdin("the cat\r\n\n  a mat \n")
    assert [line["prompt"] for line in completions(capsys, model=folder)] == ["the cat", "  a mat "]


def test_lines_typed_at_the_terminal(folder, capsys, stdin):
    stdin("the cat\n\na mat\n", terminal=True)
    generate.main(GenerateConfig(model=folder, max_new_tokens=8))
    said = capsys.readouterr().out
    lines = completions(capsys, model=folder, prompt=("the cat", "a mat"), max_new_tokens=8)
    assert said == f"> {lines[0]['text']}\n> > {lines[1]['text']}\n> "


@pytest.fixture
def prompts_read(monkeypatch):
    """Every prompt that reaches the model, as ids."""
    read, engine = [], generate.generate

    def spy(model, prompts, *rest):
        read.extend(prompts)
        return engine(model, prompts, *rest)

    monkeypatch.setattr(generate, "generate", spy)
    return read


def test_a_chat_remembers_until_the_context_is_full(tmp_path, capsys, stdin, prompts_read):
    question = "h" * 60
    stdin(f"hi\n{question}\n" * 4)
    lines = completions(capsys, model=write_folder(tmp_path, context=256), chat=True, max_new_tokens=9)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": lines[0]["text"]}]
    messages += [{"role": "user", "content": question}]
    assert prompts_read[1] == encode_chat(small_tokenizer(), messages, True)[0]
    assert len(lines) == 8 and 150 < max(map(len, prompts_read)) <= 256 - 9
    opening = encode_chat(small_tokenizer(), messages[:1])[0][:5]
    assert all(prompt[:5] == opening for prompt in prompts_read)  # a question and its answer are forgotten together


def test_a_chat_says_once_that_it_forgets(folder, capsys, stdin):
    stdin("hi\nwho\n" * 4)
    generate.main(GenerateConfig(model=folder, chat=True, max_new_tokens=9))
    assert capsys.readouterr().err.count("forgotten") == 1


def test_a_chat_answers_a_prompt(folder, capsys, prompts_read):
    generate.main(GenerateConfig(model=folder, chat=True, prompt=("hi <|im_end|>",), max_new_tokens=6))
    assert "hi" not in capsys.readouterr().out
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    assert prompts_read == [encode_chat(small_tokenizer(), messages, True)[0]]


def test_beyond_the_context_is_said_once(tmp_path, capsys):
    model = write_folder(tmp_path, position="rope")
    generate.main(GenerateConfig(model=model, prompt=("a", "b"), temperature=0, max_new_tokens=70))
    assert capsys.readouterr().err == "note: went beyond the 64 tokens of context the model is made for\n"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(folder, dtype, expected, capsys):
    config = GenerateConfig(model=folder, prompt=("the",), dtype=dtype, device="cpu", max_new_tokens=4)
    assert generate.Writer(config).model.embed_tokens.weight.dtype == expected
    generate.main(config)
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "a", "--top-p", "1.5"], "error: --top-p must be above 0 and at most 1, not 1.5\n"),
        (["--prompt", "a", "--temprature", "0"], "--temperature"),
        ([], "error: standard input holds no prompt: give one a line\n"),
    ],
)
def test_mistakes_end_in_one_line(folder, flags, said):
    done = command("--model", folder, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and said in done.stderr


def mistake(**flags) -> str:
    with pytest.raises(UserError) as caught:
        generate.main(GenerateConfig(**flags))
    return str(caught.value)


def test_mistaken_flags(folder, tmp_path):
    both = {"prompt": ("a",), "prompts_file": tmp_path / "x"}
    assert "give one of the two" in mistake(model=folder, **both)
    assert "--samples must be positive" in mistake(model=folder, samples=0)
    assert "--batch-size must be positive" in mistake(model=folder, batch_size=-1)
    assert "--stop" in mistake(model=folder, stop=("a", ""))
    assert "not a model folder" in mistake(model=tmp_path, prompt=("a",))
    with pytest.raises(FileNotFoundError):  # cli.run names the file
        generate.main(GenerateConfig(model=folder, prompts_file=tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", " holds no prompt"),
        (b" \n\n", " holds no prompt"),
        (b'{"prompt": "a"}\n\n{"prompt": \n', ":3: not JSON"),
        (b'{"prompt": "a"}\n["prompt"]', ':2: no "prompt"'),
        (b'{"prompt": 3}', ':1: no "prompt"'),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', ":2: not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', ":2: the text holds a lone surrogate"),
        (b'{"prompt": "a"}\n{"prompt": "' + b"x" * 64 + b'"}', ":2: its 64 tokens leave no room in the context of 64"),
    ],
)
def test_mistaken_prompt_files(folder, tmp_path, capsys, content, said):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert mistake(model=folder, prompts_file=file).startswith(f"{file}{said}")
    assert capsys.readouterr().out == ""  # nothing half-written


def test_mistaken_model_folders(folder, tmp_path, stdin):
    stdin(b"\xff\n", terminal=True)
    assert "not UTF-8" in mistake(model=folder)
    model = write_folder(tmp_path / "wide", extra_vocabulary=400)
    assert "a token that its tokenizer lacks" in mistake(model=model, prompt=("a",))
    model = write_folder(tmp_path / "narrow", extra_vocabulary=-1)
    assert "do not belong together" in mistake(model=model, prompt=("a",))
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in mistake(model=model, prompt=("a",))
