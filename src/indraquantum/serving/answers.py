"""Turns the events of texts into what OpenAI's API answers: whole, or piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.inference.token_texts import UNFINISHED, TextStream, token_texts
from indraquantum.serving.engine import Event, Job, Prompt, PromptToken, Ranked, Token


class TokenNames:
    """The text of single tokens, as the lists of the likeliest show it."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, str | None]()
        self._before = tokenizer.encode_text("a")  # decoders drop a blank at the beginning

    def __call__(self, token: int) -> str:
        """Return the token's text; for a control token, or a part of a character, its name in the vocabulary."""
        return self.text(token) or self.in_vocabulary(token)

    def in_vocabulary(self, token: int) -> str:
        """Return the token's name in the vocabulary, which no other token has."""
        return self._tokenizer.backend.id_to_token(token) or f"<{token}>"

    def text(self, token: int) -> str | None:
        """Return the token's text; None for a control token, or a part of a character."""
        if token not in self._known:
            whole = self._tokenizer.decode([*self._before, token])
            text = whole[len(self._tokenizer.decode(self._before)) :]
            self._known[token] = None if not text or UNFINISHED in text else text
        return self._known[token]


class WrittenToken(NamedTuple):
    """A token of an answer."""

    text: str  # its share of the answer
    token: Token


class Piece(NamedTuple):
    """What came since the last piece."""

    text: str
    tokens: list[WrittenToken]
    reason: str | None  # why the text ended; None if it goes on
    end: Token | None = None  # the EOS that ended it, if one did


class Failed(Exception):
    """The engine could not write the text."""


class Answer:
    """One text that is being written for a request: its events, up to a stop text.

    Args:
        tokenizer: the tokenizer.
        prompt_ids: the prompt.
        stops: texts that end the answer; they are not part of it.
        loop: where the events are waited for.
        options: of the Job.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        **options: Any,
    ) -> None:
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()

        def tell(events: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped without waiting, so nobody reads it
                loop.call_soon_threadsafe(self._events.put_nowait, events)

        self.prompt_ids, self.prompt_tokens = prompt_ids, list[PromptToken | None]()
        self.job = Job(prompt_ids, tell=tell, **options)
        self.written = 0  # tokens
        self._stream, self._stops = TextStream(tokenizer, prompt_ids), stops
        self._held = ""  # text that may be the beginning of a stop text
        self._pending: list[WrittenToken] = []  # tokens of that text

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the text as it comes; the last piece has a reason.

        Raises:
            Failed: the engine could not write it.
        """
        while True:
            for event in await self._events.get():
                if isinstance(event, Prompt):
                    self.prompt_tokens = event.tokens
                elif isinstance(event, Token):
                    self.written += 1
                    self._hold(self._stream.add(event.id), event)
                elif event.reason == "error":
                    raise Failed
                else:
                    self._hold(self._stream.finish(), None)
                    stopped = self._stopped()
                    yield stopped or Piece(self._held, self._pending, event.reason, event.token)
                    return
                if isinstance(event, Token):
                    if stopped := self._stopped():
                        self.job.cancelled = True
                        yield stopped
                        return
                    if piece := self._sure():
                        yield piece

    async def whole(self) -> Piece:
        """Return the complete text."""
        pieces = [piece async for piece in self.pieces()]
        tokens = list(itertools.chain.from_iterable(piece.tokens for piece in pieces))
        return Piece("".join(piece.text for piece in pieces), tokens, pieces[-1].reason, pieces[-1].end)

    def _hold(self, text: str, token: Token | None) -> None:
        self._held += text
        if token is not None:
            self._pending.append(WrittenToken(text, token))
        elif text and self._pending:
            last = self._pending[-1]
            self._pending[-1] = last._replace(text=last.text + text)

    def _stopped(self) -> Piece | None:
        """Return the last piece if the text holds a stop text."""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if not places:
            return None
        cut, kept, length = min(places), list[WrittenToken](), 0
        for written in self._pending:
            if length >= cut:
                break
            kept.append(written)
            length += len(written.text)
        return Piece(self._held[:cut], kept, "stop")

    def _sure(self) -> Piece | None:
        """Return the text that can't be the beginning of a stop text, with its tokens; None if there is none.

        Tokens without text wait for the text that follows: it may be the character which they begin.
        """
        longest = max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
        if longest or not self._held:
            return None
        piece = Piece(self._held, self._pending, None)
        self._held, self._pending = "", []
        return piece


class Form:
    """How an answer is written for one kind of request."""

    def __init__(self, names: TokenNames, model: str, identity: str, created: int) -> None:
        self.names, self.head = names, {"id": identity, "created": created, "model": model}

    def top(self, text: str, token: int, logprob: float, ranked: Sequence[Ranked]) -> dict[str, float]:
        """Return the likeliest tokens as completions list them, and the actual one, which is called `text` there.

        Another token whose text is taken is listed under its name in the vocabulary, or its number.
        """
        found: dict[str, float] = {}
        for other, value in dict([*ranked, (token, logprob)]).items():
            names = (self.names(other), self.names.in_vocabulary(other), f"<{other}>")
            free = (name for name in names if name != text and name not in found)
            found[text if other == token else next(free, names[-1])] = value
        return found

    def completion_logprobs(self, tokens: Sequence[WrittenToken], offset: int) -> dict[str, Any]:
        """Return the log-probabilities of a completion's tokens, whose text begins at `offset`."""
        lengths = itertools.accumulate((len(written.text) for written in tokens), initial=offset)
        return {
            "tokens": [written.text for written in tokens],
            "token_logprobs": [written.token.logprob for written in tokens],
            "top_logprobs": [self.top(text, *token) for text, token in tokens],
            "text_offset": list(lengths)[:-1],
        }

    def end_logprobs(self, end: Token, offset: int) -> dict[str, Any]:
        """Return the log-probabilities of the EOS that ended a completion at `offset`. It has a name but no text."""
        name = self.names(end.id)
        return {
            "tokens": [name],
            "token_logprobs": [end.logprob],
            "top_logprobs": [self.top(name, *end)],
            "text_offset": [offset],
        }

    def chat_logprobs(self, tokens: Sequence[WrittenToken]) -> dict[str, Any]:
        """Return the log-probabilities of a chat answer's tokens. A written token has the same entry in its list."""

        def entry(token: int, value: float, written: WrittenToken) -> dict[str, Any]:
            if token == written.token.id:
                return self._entry(written.text, value, written.text)
            return self._entry(self.names(token), value, self.names.text(token))

        return {
            "content": [
                entry(*written.token[:2], written)
                | {"top_logprobs": [entry(*ranked, written) for ranked in written.token.top]}
                for written in tokens
            ],
            "refusal": None,
        }

    def prompt_logprobs(self, answer: Answer, most: int) -> list[dict[str, Any] | None]:
        """Return what the model thought of the prompt, in vLLM's form: a dict by token id for each but the first.

        Args:
            answer: an answer to the prompt.
            most: how many of the likeliest tokens to list with the actual one.
        """
        return [
            None if about is None else self._about(token, about, most)
            for token, about in zip(answer.prompt_ids, answer.prompt_tokens, strict=True)
        ]

    def _about(self, actual: int, about: PromptToken, most: int) -> dict[str, Any]:
        entries = [(actual, about.logprob, about.rank)]
        ranked = enumerate(about.top[:most], 1)
        entries += [(token, value, rank) for rank, (token, value) in ranked if token != actual]
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self.names(token)}
            for token, value, rank in entries
        }

    @staticmethod
    def _entry(token: str, logprob: float, text: str | None) -> dict[str, Any]:
        """Return a token of a chat's lists. It has no bytes where it has no text of whole characters."""
        known = None if text is None or UNFINISHED in text else list(text.encode())
        return {"token": token, "logprob": logprob, "bytes": known}


def echoed(form: Form, tokenizer: TextTokenizer, answer: Answer, text: str, most: int) -> dict[str, Any]:
    """Return the log-probabilities of the prompt's tokens, as completions list them with `echo`.

    Args:
        form: how to write them.
        tokenizer: the tokenizer.
        answer: an answer to the prompt.
        text: the prompt's text.
        most: how many of the likeliest tokens to list with the actual one.
    """
    shares = token_texts(tokenizer, [], answer.prompt_ids)
    offsets = list(itertools.accumulate(map(len, shares), initial=0))[:-1]
    names = [share or form.names(token) for share, token in zip(shares, answer.prompt_ids, strict=True)]
    told = list(zip(names, answer.prompt_ids, answer.prompt_tokens, strict=True))
    return {
        "tokens": names,
        "token_logprobs": [about and about.logprob for _, _, about in told],
        "top_logprobs": [
            about and form.top(name, token, about.logprob, about.top[:most]) for name, token, about in told
        ],
        "text_offset": [min(offset, len(text)) for offset in offsets],
    }


def joined(*parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the lists of both parts, one after the other."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several answers as they come, with the number of the answer.

    Raises:
        Failed: the engine could not write one of them.
    """
    arrived: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def forward(number: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                arrived.put_nowait((number, piece))
        except Failed:
            arrived.put_nowait((number, None))

    tasks = [asyncio.create_task(forward(number, answer)) for number, answer in enumerate(answers)]
    left = len(tasks)
    try:
        while left:
            number, piece = await arrived.get()
            if piece is None:
                raise Failed
            left -= piece.reason is not None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()
