"""The Alpaca prompt: one function builds it for training documents, for `indra test --instruction` and for chats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from indraquantum.data.records import is_text
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError


def format_alpaca(instruction: str, input: str, output: str = "") -> str:
    """Return the Alpaca prompt, with the answer if it is given.

    Args:
        instruction: What to do.
        input: What to do it with. If it is empty, its block is left out.
        output: The answer. If it is empty, the prompt ends where a model continues.

    Returns:
        The text, without a preamble and without a space after the last line break.
    """
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n{output}"


def prompt_ids(field: str, prompt: str, tokenizer: TextTokenizer) -> list[int]:
    """Return the ids of a prompt that a model continues.

    Args:
        field: the option that gave it, for the error.
        prompt: the text.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: the prompt is not UTF-8, or it is empty and the tokenizer has no BOS token.
    """
    if not is_text(prompt):
        raise UserError(field, ascii(prompt), "must be UTF-8 text")
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        allowed = "must not be empty, because the model's documents begin without a BOS token"
        raise UserError(field, ascii(prompt), allowed)
    return ids


class Message(NamedTuple):
    """One message of a chat."""

    role: str  # system, user or assistant
    content: str


class Exchange(NamedTuple):
    """A question in Alpaca's form and its answer, or None where the model is to answer."""

    prompt: str
    answer: str | None


def exchanges(messages: Iterable[Message]) -> list[Exchange]:
    """Return a chat as documents in Alpaca's form, as the chat template of an exported model does.

    The system messages before a question, joined by blank lines, are its instruction, and its text is the input. Each
    question with its answer is a document of its own, as in training.

    Raises:
        ValueError: the messages are not questions and answers in turn, with a question at the end, or a system message
            comes between a question and its answer.
    """
    found: list[Exchange] = []
    system = ""
    for role, content in messages:
        is_open = bool(found) and found[-1].answer is None  # a question waits for its answer
        if role == "system" and not is_open:
            system = "\n\n".join(filter(None, (system, content)))
        elif role == "user" and not is_open:
            found.append(Exchange(format_alpaca(system, content) if system else format_alpaca(content, ""), None))
        elif role == "assistant" and is_open:
            found[-1] = Exchange(found[-1].prompt, content)
        elif role == "system":
            raise ValueError("must have each system message before a message of user")
        else:
            raise ValueError("must be messages of user and assistant in turn, beginning with user")
    if not found or found[-1].answer is not None:
        raise ValueError("must end with a message of user")
    return found


def chat_ids(tokenizer: TextTokenizer, chat: Iterable[Exchange]) -> list[int]:
    """Return the token ids of a chat: each exchange as a training document, the last one without its end."""
    ids: list[int] = []
    for prompt, answer in chat:
        ids += tokenizer.encode_prompt(prompt + (answer or ""))
        if answer is not None:
            ids.append(tokenizer.eos_id)
    return ids
