"""Talks with a trained model in the terminal: the command `indra chat`.

Each question is put into Alpaca's form. Earlier questions and answers come before it, each as a document of its own
with its end, which is how the chat template of an exported model writes them. What does not fit the model's context is
left out, the oldest first. In a terminal, the colour of each token shows the confidence of the state it was drawn from.
Through a pipe, the whole input is one question, and the answer alone is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from indraquantum.config import ChatSettings
from indraquantum.data.prompt import Exchange, chat_ids, format_alpaca
from indraquantum.data.records import is_text
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.inference.generate import choose
from indraquantum.inference.load import Loaded, load
from indraquantum.inference.token_texts import TextStream
from indraquantum.model.decoder import Decoder, PackedModel

# Colours of 256-colour terminals that can be read on black and on white, from the least confident fifth to the most.
SHADES = (161, 166, 136, 71, 32)
RESET = "\x1b[0m"
HELP = "/reset forgets the chat, /quit ends it, /help prints this line."


class Piece(NamedTuple):
    """What one token adds to the answer."""

    text: str
    confidence: float  # |c| of the state that the token was drawn from


class Chat:
    """A chat with a model.

    Attributes:
        forgotten: how many of the remembered exchanges did not fit the context at the last question.
    """

    def __init__(self, loaded: Loaded, settings: ChatSettings) -> None:
        self._loaded, self._settings = loaded, settings
        self._decoder = Decoder(PackedModel(loaded.inference_model, gather=True), slots=1)
        self._past: list[Exchange] = []
        self.forgotten = 0
        torch.manual_seed(settings.seed)

    @property
    def context(self) -> int:
        """The most tokens of question, answer and history together."""
        return self._decoder.packed.context

    def reset(self) -> None:
        """Forget the chat."""
        self._past.clear()

    def ask(self, question: str) -> Generator[Piece]:
        """Yield the answer piece by piece. It is remembered, also if the caller stops in the middle.

        Raises:
            UserError: the question alone is too long for the model, or is not UTF-8 text.
        """
        if not is_text(question):
            raise UserError("question", ascii(question)[:80], "must be UTF-8 text")
        prompt = format_alpaca(question, "")
        ids = self._fitting(prompt)
        answer = ""
        try:
            for piece in self._written(ids):
                answer += piece.text
                yield piece
        finally:
            self._past.append(Exchange(prompt, answer))

    def _fitting(self, prompt: str) -> list[int]:
        """Return the ids of the chat so far and `prompt`, without the oldest exchanges if there is no room for them."""
        context, tokenizer = self.context, self._loaded.tokenizer
        own = chat_ids(tokenizer, [Exchange(prompt, None)])
        if len(own) >= context:
            raise UserError("question", f"{len(own)} tokens", f"must be at most {context - 1} tokens for this model")
        room = context - len(own) - min(self._settings.max_new_tokens, context - len(own))
        past = self._past[-self._settings.history :] if self._settings.history else []
        kept: list[int] = []
        for count, exchange in enumerate(reversed(past)):
            ids = chat_ids(tokenizer, [exchange])
            if len(kept) + len(ids) > room:
                self.forgotten = len(past) - count
                return kept + own
            kept = ids + kept
        self.forgotten = 0
        return kept + own

    @torch.no_grad()
    def _written(self, ids: list[int]) -> Generator[Piece]:
        model, packed, tokenizer = self._loaded.inference_model, self._decoder.packed, self._loaded.tokenizer
        stream = TextStream(tokenizer, ids)
        states = self._decoder.begin([ids])[:, -1]
        confidence = 0.0
        try:
            for _ in range(min(self._settings.max_new_tokens, packed.context - len(ids))):
                token = choose(packed.logits(states).float(), self._settings)[0]
                if token.item() == tokenizer.eos_id:
                    break
                confidence = model.amplitude(states).abs().item()
                yield Piece(stream.add(int(token.item())), confidence)
                if self._decoder.lengths[0] < packed.context:
                    states = self._decoder.step(token)
            if rest := stream.finish():
                yield Piece(rest, confidence)
        finally:
            self._decoder.release(0)


def shaded(piece: Piece) -> str:
    """Return the text in the colour of its confidence."""
    if not piece.text:
        return ""
    shade = SHADES[min(len(SHADES) - 1, int(piece.confidence * len(SHADES)))]
    # Not across lines: some terminals would colour the rest of the line.
    return "\n".join(f"\x1b[38;5;{shade}m{line}{RESET}" if line else "" for line in piece.text.split("\n"))


def legend() -> str:
    """Return a line that shows the colours."""
    names = ("below 0.2", "0.4", "0.6", "0.8", "1")
    return "Confidence: " + " ".join(
        f"\x1b[38;5;{shade}m{name}{RESET}" for shade, name in zip(SHADES, names, strict=True)
    )


def colours(loaded: Loaded, output: TextIO) -> bool:
    """Return whether to colour tokens: in a terminal without NO_COLOR, if training aligned the magnitude."""
    wanted = output.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and (loaded.aligned is None or "magnitude" in loaded.aligned)


def run_chat(path: Path, settings: ChatSettings) -> None:
    """Load the checkpoint or the exported folder at `path`, and talk with it."""
    loaded = load(path, choose_device(settings), settings.weights)
    chat = Chat(loaded, settings)
    if sys.stdin.isatty():
        _talk(chat, loaded)
        return
    question = _read_all()
    show(chat.ask(question), colours(loaded, sys.stdout))


def _read_all() -> str:
    """Return what comes through the pipe, without the line break at its end.

    Raises:
        UserError: there is nothing, or it is not UTF-8 text.
    """
    raw = sys.stdin.buffer.read()
    try:
        question = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _not_text(error) from None
    if not question.strip():
        raise UserError("question", "nothing", "must be a question on stdin")
    return question


def _not_text(error: UnicodeDecodeError) -> UserError:
    return UserError("question", f"byte {error.object[error.start]:#04x} at {error.start}", "must be UTF-8 text")


def show(pieces: Iterable[Piece], coloured: bool) -> None:
    """Print an answer as it comes, and a line break."""
    for piece in pieces:
        sys.stdout.write(shaded(piece) if coloured else piece.text)
        sys.stdout.flush()
    print()


def _talk(chat: Chat, loaded: Loaded) -> None:
    """Ask for questions until /quit or the end of the input."""
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401 - input() then knows arrow keys and earlier lines

    coloured = colours(loaded, sys.stdout)
    print(f"Chat with {loaded.path}. {HELP}")
    if coloured:
        print(legend())
    elif loaded.aligned is not None and "magnitude" not in loaded.aligned:
        print("This run never aligned the magnitude with a teacher, so no confidence is shown.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"indra: error: {_not_text(error)}", file=sys.stderr)
            continue
        if question in ("/quit", "/exit"):
            return
        if question == "/reset":
            chat.reset()
            print("The chat is forgotten.")
        elif question.startswith("/"):
            print(HELP if question == "/help" else f"There is no command {question}. {HELP}")
        elif question:
            _answer(chat, question, coloured)


def _answer(chat: Chat, question: str, coloured: bool) -> None:
    """Print the answer to one question. Ctrl-C ends the answer, and an error the question; the chat goes on."""
    pieces = chat.ask(question)
    try:
        show(pieces, coloured)
    except KeyboardInterrupt:
        pieces.close()
        print(f"{RESET if coloured else ''}\n(stopped)")
    except UserError as error:
        print(f"indra: error: {error}", file=sys.stderr)
        return
    if chat.forgotten:
        count = f"{chat.forgotten} earlier exchange{'s' if chat.forgotten > 1 else ''}"
        print(f"({count} did not fit the model's context of {chat.context} tokens.)")
