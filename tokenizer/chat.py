"""ChatML, the form in which a conversation becomes tokens (OpenAI 2023).

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Good day.<|im_end|>

Whitespace at both ends of a message is dropped, as Llama 3's template does: then no token can straddle the seam between
a header and its message, and so the ids of a prompt are the first ids of the whole conversation.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cli import UserError

from .base import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Segment(NamedTuple):
    """A stretch of a rendered conversation. `special`: a special token. `trained`: the model is to learn to say it."""

    text: str
    special: bool = False
    trained: bool = False


def render_chat(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[Segment]:
    """A conversation as segments in ChatML; trained are the assistant's words and the token that ends them.

    `messages`: {"role", "content"} each, the role one of ROLES. `add_generation_prompt` opens the assistant's turn.
    Raises UserError for a message of another shape.
    """
    segments = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is no object with the fields role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number} has the role {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {number} has no text in its field content")
        trained = role == "assistant"
        segments += [Segment("<|im_start|>", special=True), Segment(role + "\n")]
        segments += [Segment(content.strip(), trained=trained), Segment("<|im_end|>", special=True, trained=trained)]
        segments += [Segment("\n")]
    if add_generation_prompt:
        segments += [Segment("<|im_start|>", special=True), Segment("assistant\n")]
    return segments


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each whether it is trained; "<|im_end|>" in a message stays plain text.

    Raises UserError for messages that `render_chat` refuses, and for a tokenizer without ChatML's tokens.
    """
    ids, trained_mask = [], []
    for segment in render_chat(messages, add_generation_prompt):
        if segment.special and segment.text not in tokenizer.special_tokens:
            raise UserError(f"the tokenizer has no token {segment.text}: a chat needs <|im_start|> and <|im_end|>")
        new = [tokenizer.special_tokens[segment.text]] if segment.special else tokenizer.encode(segment.text)
        ids += new
        trained_mask += [segment.trained] * len(new)
    return ids, trained_mask
