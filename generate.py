"""Sampling from a model with a KV cache: a prompt, a file of prompts, a conversation.

    python generate.py --model runs/base --prompt "Once upon a time"
    python generate.py --model runs/base --prompts-file prompts.jsonl --samples 4 --json > completions.jsonl
    python generate.py --model runs/sft --chat

A prompt is encoded as it stands, nothing put before it, as transformers' `generate` takes ids; the empty prompt alone
becomes the end-of-text token, after which the model has learned to begin a document. sampling.py draws the tokens; here
they become text, end at stop strings and reach the terminal.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

import cli
from cli import UserError
from distributed import Device, choose_device
from model_folder import read_config, read_model_folder
from sampling import Sampling, generate, room
from tokenizer import Tokenizer, encode_chat, load_tokenizer, read_json


class TextStream:
    """The text of a completion as its tokens come: whole characters alone, up to the first stop string.

    An end that may be the beginning of a stop string is held back until the next tokens tell.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder, self.stop = tokenizer.stream_decoder(), stop
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """The text that `token` makes certain. UserError for an id that the tokenizer does not know."""
        try:
            return self.release(self.decoder.push(token))
        except ValueError as error:
            raise UserError(f"the model wrote a token that its tokenizer lacks: {error}") from None

    def close(self) -> str:
        """What was held back when no more tokens come: text after all."""
        piece = "" if self.stopped else self.release(self.decoder.flush()) + self.held
        self.text += self.held
        self.held = ""
        return piece

    def release(self, new: str) -> str:
        self.held += new
        starts = [self.held.find(stop) for stop in self.stop if stop in self.held]
        self.stopped = bool(starts)
        sure = min(starts) if starts else len(self.held) - open_suffix(self.held, self.stop)
        piece, self.held = self.held[:sure], "" if starts else self.held[sure:]
        self.text += piece
        return piece


def open_suffix(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins, but does not complete, a stop string."""
    lengths = range(min(len(text), max(map(len, stop), default=0)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Write on from prompts; without any, from the lines of standard input."""

    model: Path
    """Model folder."""
    prompt: tuple[str, ...] = ()
    """One prompt or several; "" begins a new document."""
    prompts_file: Path | None = None
    """File of prompts: .jsonl with {"prompt": "..."} a line, any other with a prompt a line, blank lines skipped."""
    chat: bool = False
    """Prompts are a user's messages, answered in ChatML; at the terminal, a conversation that remembers."""
    samples: int = 1
    """Completions of each prompt."""
    batch_size: int = 8
    """Completions written at once."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are not part of its text."""
    json: bool = False
    """Print one JSON line a completion: prompt, text, tokens, logprobs, finish_reason."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and computation; auto: bf16 on a GPU that multiplies it, else fp32."""
    device: Device = "auto"
    """Device to compute on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt and self.prompts_file is not None:
            raise UserError("--prompt and --prompts-file: give one of the two")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if "" in self.stop:
            raise UserError("--stop: an empty string would stop before the first token")


class Prompt(NamedTuple):
    """A prompt as given and as the model reads it."""

    text: str
    tokens: list[int]


class Writer:
    """A model with what turns text into its tokens and back, and prints it."""

    def __init__(self, config: GenerateConfig) -> None:
        shape, self.tokenizer = read_config(config.model), load_tokenizer(config.model)
        if self.tokenizer.vocab_size > shape.vocab_size:
            have = f"{self.tokenizer.vocab_size:,} tokens, the model {shape.vocab_size:,}"
            raise UserError(f"{config.model}: its tokenizer knows {have}: they do not belong together")
        self.config, self.notes = config, set()
        self.end_tokens = end_tokens(config.model, self.tokenizer, config.chat)
        device = choose_device(config.device)
        self.model = read_model_folder(config.model, weights_dtype(config.dtype, device), device)

    def note(self, line: str) -> None:
        """Say something on stderr, once."""
        if line not in self.notes:
            self.notes.add(line)
            tqdm.write(f"note: {line}", file=sys.stderr)

    def prompt(self, text: str, where: str, history: list[dict[str, str]]) -> Prompt:
        """A prompt as tokens, in a chat after what fits of its `history`. UserError, with `where`, if it cannot be."""
        context = self.model.config.context_length
        tokens = self.encode(text, where, history)
        while history and len(tokens) + min(self.config.max_new_tokens, context // 4) > context:
            self.note(f"the conversation outgrows the context of {context} tokens: its oldest turns are forgotten")
            del history[:2]
            tokens = self.encode(text, where, history)
        if room(self.model.config, len(tokens)) < 1:
            raise UserError(f"{where}: its {len(tokens)} tokens leave no room in the context of {context}: shorten it")
        return Prompt(text, tokens)

    def encode(self, text: str, where: str, history: Sequence[dict[str, str]]) -> list[int]:
        try:
            if not self.config.chat:
                return self.tokenizer.encode(text) or [self.tokenizer.end_of_text]
            messages = [*history, {"role": "user", "content": text}]
            return encode_chat(self.tokenizer, messages, add_generation_prompt=True)[0]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None

    def complete(self, prompts: Sequence[Prompt], first_row: int, streaming: bool, echo: bool = False) -> list[str]:
        """Write on from a batch of prompts and print it, token by token if `streaming`; returns the texts."""
        streams = [TextStream(self.tokenizer, self.config.stop) for _ in prompts]

        def watch(row: int, token: int) -> bool:
            piece = streams[row].push(token)
            if streaming:
                print(piece, end="", flush=True)
            return streams[row].stopped

        if streaming and echo:
            print(prompts[0].text, end="", flush=True)
        tokens = [prompt.tokens for prompt in prompts]
        completions = generate(self.model, tokens, self.config, self.end_tokens, first_row, watch)
        for prompt, stream, completion in zip(prompts, streams, completions, strict=True):
            rest = stream.close()
            if streaming:
                print(rest)
            elif self.config.json:
                tqdm.write(json.dumps({"prompt": prompt.text, "text": stream.text} | asdict(completion)))
            else:
                tqdm.write(f"{prompt.text if echo else ''}{stream.text}\n{'-' * 16}")
            if len(prompt.tokens) + len(completion.tokens) > self.model.config.context_length:
                self.note(f"went beyond the {self.model.config.context_length} tokens of context the model is made for")
        sys.stdout.flush()
        return [stream.text for stream in streams]


def end_tokens(folder: Path, tokenizer: Tokenizer, chat: bool) -> frozenset[int]:
    """Ids that end a completion: end of text, those of generation_config.json, in a chat <|im_end|>."""
    path = folder / "generation_config.json"
    configured = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
    message_end = [tokenizer.special_tokens["<|im_end|>"]] if chat and "<|im_end|>" in tokenizer.special_tokens else []
    return frozenset([tokenizer.end_of_text, *ends, *message_end])


def weights_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision `dtype` asks for. On a CPU auto stays exact: there the cached text equals the recomputed one."""
    if dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def read_prompts(config: GenerateConfig) -> list[tuple[str, str]]:
    """Every prompt and where it stands, from --prompt, --prompts-file or standard input. UserError if there is none."""
    if config.prompt:
        return [(text, "--prompt") for text in config.prompt]
    file = config.prompts_file
    name, content = ("standard input", sys.stdin.buffer.read()) if file is None else (str(file), file.read_bytes())
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 ({error.reason}): convert it") from None
    found = [(line.removesuffix("\r"), f"{name}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{name} holds no prompt: give one a line")
    jsonl = file is not None and file.suffix == ".jsonl"
    return [(json_prompt(line, where), where) for line, where in found] if jsonl else found


def json_prompt(line: str, where: str) -> str:
    """The prompt in one JSON line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): mend or remove it") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(f'{where}: no "prompt": every line is a JSON object {{"prompt": "..."}}')
    return value["prompt"]


def complete_all(writer: Writer, given: Sequence[tuple[str, str]]) -> None:
    """Complete every prompt --samples times, --batch-size completions at once; a single one streams."""
    config = writer.config
    prompts = [writer.prompt(text, where, []) for text, where in given]  # the whole file, before any work
    rows = [prompt for prompt in prompts for _ in range(config.samples)]
    streaming = len(rows) == 1 and not config.json
    with tqdm(total=len(rows), unit="completion", disable=len(rows) <= config.batch_size) as bar:
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            writer.complete(batch, start, streaming, echo=not config.chat)
            bar.update(len(batch))


def typed_lines() -> Iterator[str]:
    """The lines of standard input as they come, blank ones left out, after a prompt sign if a person types them."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(sign)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8: convert it") from None
        if line.strip():
            yield line


def converse(writer: Writer) -> None:
    """Answer line after line of standard input; in a chat each answer knows the turns before it."""
    config, history = writer.config, []
    streaming = config.samples == 1 and not config.json
    for turn, line in enumerate(typed_lines()):
        prompt = writer.prompt(line, "this line", history)
        texts = writer.complete([prompt] * config.samples, turn * config.samples, streaming)
        if config.chat:
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": texts[0]}]


def main(config: GenerateConfig) -> None:
    given = bool(config.prompt) or config.prompts_file is not None
    if not given and (config.chat or sys.stdin.isatty()):
        converse(Writer(config))
    else:
        prompts = read_prompts(config)  # its mistakes show before a model is read
        complete_all(Writer(config), prompts)


if __name__ == "__main__":
    cli.run(main, GenerateConfig)
