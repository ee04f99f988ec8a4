"""The HTTP application: OpenAI's addresses over one engine.

    GET /health, GET /v1/models, GET /v1/models/NAME, POST /v1/completions, POST /v1/chat/completions

Errors have OpenAI's form, `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from indraquantum.data.prompt import Message, chat_ids, exchanges
from indraquantum.data.records import is_text
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import first_problem
from indraquantum.serving.answers import Answer, Failed, Form, Piece, TokenNames, echoed, joined, merged
from indraquantum.serving.bodies import Body, ChatBody, CompletionBody
from indraquantum.serving.engine import Engine, Full

B = TypeVar("B", bound=Body)

EITHER = {  # fields of several types, for which pydantic would only name the first
    "prompt": "must be a text, a list of token ids, or a list of several such prompts, and none empty",
    "stop": "must be a text or a list of texts",
    "content": "must be a text or a list of parts with text",
}
MOST_SKIPPED = 16 << 20  # bytes of a too large body that are read, so that the client reads the answer


class Refused(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)

    def response(self) -> Response:
        """Return the answer."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status in (408, 413):  # the rest of the body is not read
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """What a server serves."""

    engine: Engine
    tokenizer: TextTokenizer
    name: str
    context: int  # tokens of prompt and answer together
    largest_body: int  # bytes
    started: int  # seconds since 1970
    body_seconds: float = 60.0  # in which the body of a request must arrive


class Guard:
    """Lets only those requests pass that name this server as their host and have its key.

    A page of another site can make a browser send requests to a server on the same machine, under a name of its own
    that leads there. So a server on loopback answers only to the names of loopback.

    Args:
        app: what answers.
        hosts: the allowed names, in lower case; None allows all.
        key: the key; None if none is needed.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, key: str | None) -> None:
        self._app, self._hosts, self._key = app, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and (refused := self._refusal(scope)) is not None:
            await refused.response()(scope, receive, send)
            return
        # A server that stops at once cancels what still runs; uvicorn would print a trace of each.
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self._hosts is not None and host not in self._hosts:
            return Refused(400, f"Host: got {host!r:.100}; must be {', '.join(sorted(self._hosts))}", code="wrong_host")
        given = headers.get(b"authorization", b"")
        if self._key is None or scope["path"] == "/health":
            return None
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            return Refused(401, "this server needs its API key as the bearer token", code="invalid_api_key")
        return None


class Application:
    """Answers requests. `starlette` is the ASGI application."""

    def __init__(self, served: Served) -> None:
        self.served, self.names = served, TokenNames(served.tokenizer)
        self.starlette = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            exception_handlers={Refused: _refused, HTTPException: _http_error, ClientDisconnect: _gone},
        )

    async def health(self, _: Request) -> Response:
        """Say that the server is there, and how much it has to do."""
        running, waiting = self.served.engine.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def models(self, _: Request) -> Response:
        """List the model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self.served
        return {
            "id": served.name, "object": "model", "created": served.started, "owned_by": "indraquantum",
            "max_model_len": served.context,
        }  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"The model {name!r:.200} does not exist; this server has {self.served.name!r}."
            raise Refused(404, message, param="model", code="model_not_found")

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        body = await self._body(request, CompletionBody)
        if body.best_of not in (None, body.n):
            raise Refused(400, f"best_of: got {body.best_of}; must be n or left out", param="best_of")
        ids = [self._prompt_ids(prompt) for prompt in body.prompts]
        told = body.logprobs if body.echo else None
        room = body.max_tokens if "max_tokens" in body.model_fields_set else None
        answers = self._answers(body, ids, room, 16, top=body.logprobs, prompt_top=_largest(body.prompt_logprobs, told))
        form = self._form("cmpl")
        texts: list[str | None] = [  # what is echoed; it is echoed once
            (prompt if isinstance(prompt, str) else self.served.tokenizer.decode(prompt)) if body.echo else None
            for prompt in body.prompts
            for _ in range(body.n)
        ]
        offsets = [len(text or "") for text in texts]

        def choice(number: int, piece: Piece) -> dict[str, Any]:
            prompt, logprobs = texts[number], None
            end = offsets[number] + len(piece.text)
            if body.logprobs is not None:
                logprobs = form.completion_logprobs(piece.tokens, offsets[number])
                if prompt is not None:
                    before = echoed(form, self.served.tokenizer, answers[number], prompt, body.logprobs)
                    logprobs = joined(before, logprobs)
                # lm-eval asks for one token and leaves the last one of the list out, so it must be there.
                if body.echo and piece.end is not None:
                    logprobs = joined(logprobs, form.end_logprobs(piece.end, end))
            offsets[number], texts[number] = end, None
            text = (prompt or "") + piece.text
            return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": piece.reason}

        if body.stream:
            return self._stream(body, answers, form, "text_completion", [], lambda i, piece: [choice(i, piece)])
        pieces = await self._written(request, answers)
        choices = [choice(number, piece) for number, piece in enumerate(pieces)]
        if body.prompt_logprobs is not None:
            for each, answer in zip(choices, answers, strict=True):
                each["prompt_logprobs"] = form.prompt_logprobs(answer, body.prompt_logprobs)
        return JSONResponse(
            form.head | {"object": "text_completion", "choices": choices, "usage": _usage(answers, body.n)}
        )

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        body = await self._body(request, ChatBody)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        messages = [Message("system" if m.role == "developer" else m.role, m.text) for m in body.messages]
        try:
            documents = exchanges(messages)
        except ValueError as error:
            raise Refused(400, f"messages: {error}", param="messages") from None
        if not all(is_text(message.content) for message in messages):
            raise Refused(400, "messages: must be UTF-8 text", param="messages")
        ids = chat_ids(self.served.tokenizer, documents)
        room = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        answers = self._answers(body, [ids], room, None, top=top, prompt_top=body.prompt_logprobs)
        form = self._form("chatcmpl")

        def logprobs(piece: Piece) -> dict[str, Any] | None:
            return form.chat_logprobs(piece.tokens) if body.logprobs else None

        def chunks(number: int, piece: Piece) -> list[dict[str, Any]]:
            found = [
                {"index": number, "delta": {"content": piece.text}, "logprobs": logprobs(piece), "finish_reason": None}
            ]
            if piece.reason is not None:
                found = found if piece.text or piece.tokens else []
                found.append({"index": number, "delta": {}, "logprobs": None, "finish_reason": piece.reason})
            return found

        if body.stream:
            first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            opening = [{"index": number, **first} for number in range(body.n)]
            return self._stream(body, answers, form, "chat.completion.chunk", opening, chunks)
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": logprobs(piece),
                "finish_reason": piece.reason,
            }
            for number, piece in enumerate(await self._written(request, answers))
        ]
        answer = form.head | {"object": "chat.completion", "choices": choices, "usage": _usage(answers, body.n)}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = form.prompt_logprobs(answers[0], body.prompt_logprobs)
        return JSONResponse(answer)

    async def _body(self, request: Request, kind: type[B]) -> B:
        """Read and check the body."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # Also what keeps pages of other sites out: a browser asks first before it sends this kind of content.
            raise Refused(415, "Content-Type: must be application/json")
        limit, content, size = self.served.largest_body, bytearray(), 0
        too_large = Refused(413, f"the body must be at most {limit:,} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit + MOST_SKIPPED:
            raise too_large
        try:
            async with asyncio.timeout(self.served.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        content += part
                    elif size > limit + MOST_SKIPPED:
                        break
        except TimeoutError:
            raise Refused(408, f"the body must arrive within {self.served.body_seconds:g} seconds") from None
        if size > limit:
            raise too_large
        try:
            body = kind.model_validate_json(bytes(content))
        except ValidationError as error:
            raise _invalid(error) from None
        self._check_model(body.model)
        if body.stream and body.prompt_logprobs is not None:
            raise Refused(400, "prompt_logprobs: can't be streamed", param="prompt_logprobs")
        if body.stream_options is not None and not body.stream:
            raise Refused(400, "stream_options: needs stream to be true", param="stream_options")
        return body

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """Return the ids of one prompt."""
        if isinstance(prompt, str):
            if not is_text(prompt):
                raise Refused(400, "prompt: must be UTF-8 text", param="prompt")
            ids = self.served.tokenizer.encode_prompt(prompt)
            if not ids:
                raise Refused(400, "prompt: must not be empty for this model", param="prompt")
            return ids
        size = self.served.engine.packed.model.config.vocab_size
        if (largest := max(prompt)) >= size:
            raise Refused(400, f"prompt: got the token {largest}; must be below {size}", param="prompt")
        return prompt

    def _answers(
        self, body: Body, prompts: Sequence[list[int]], room: int | None, usual: int | None, **options: Any
    ) -> list[Answer]:
        """Begin to write `n` answers to each prompt.

        Args:
            body: the request.
            prompts: the ids of its prompts.
            room: the tokens to write, if the request says it.
            usual: the tokens to write if it does not; None: up to the end of the context.
            options: of the Job.
        """
        context, answers = self.served.context, list[Answer]()
        asked_in = "messages" if isinstance(body, ChatBody) else "prompt"
        wanted, most = len(prompts) * body.n, self.served.engine.longest_queue
        if wanted > most:
            name = asked_in if len(prompts) > 1 else "n"
            message = f"{name}: got {wanted} texts to write; must be at most {most}, the length of this server's queue"
            raise Refused(400, message, param=name)
        # Of a prompt that is only measured, the last token is not read, so it may lie just beyond the context. vLLM
        # always writes a token, so clients that want prompt_logprobs ask for one; it is left out if it does not fit.
        measured = room == 0 or body.prompt_logprobs is not None
        for ids in prompts:
            left = context - len(ids)
            if not measured and (room or 0) >= context:
                given = (
                    "max_tokens" if getattr(body, "max_completion_tokens", None) is None else "max_completion_tokens"
                )
                message = (
                    f"{given}: got {room}; must be below {context}, because the model's context is {context} tokens"
                )
                raise Refused(400, message, param=given, code="context_length_exceeded")
            if left < (-1 if measured else room or 1):
                asked = "" if measured or room is None else f" and {room} to write"
                most = context + 1 if measured else context - (room or 1)
                message = (
                    f"{asked_in}: got {len(ids)} tokens{asked}; must be at most {most} tokens, because the model's "
                    f"context is {context} tokens"
                )
                raise Refused(400, message, param=asked_in, code="context_length_exceeded")
            fitting = max(0, left if room is None else min(room, left))
            seed = secrets.randbits(63) if body.seed is None else body.seed
            for number in range(body.n):
                answers.append(
                    Answer(
                        self.served.tokenizer, ids, body.stops, asyncio.get_running_loop(),
                        room=fitting if usual is None or room is not None else min(usual, fitting),
                        temperature=body.temperature, top_p=body.top_p, seed=f"{seed}/{number}", **options,
                    )
                )  # fmt: skip
        try:
            self.served.engine.submit([answer.job for answer in answers])
        except Full:
            raise Refused(429, "too many texts are waiting; try again later", code="queue_full") from None
        return answers

    async def _written(self, request: Request, answers: Sequence[Answer]) -> list[Piece]:
        """Return the complete answers; if the client goes away, they are not written."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            raise ClientDisconnect

        watcher = asyncio.create_task(watch())
        writing = asyncio.gather(*(answer.whole() for answer in answers))
        try:
            await asyncio.wait({watcher, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientDisconnect
            return list(writing.result())
        except Failed:
            raise Refused(500, "the model failed; the server's log says why") from None
        finally:
            for answer in answers:
                answer.job.cancelled = True
            for task in (watcher, writing):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _stream(
        self,
        body: Body,
        answers: Sequence[Answer],
        form: Form,
        kind: str,
        opening: Sequence[dict[str, Any]],
        chunks: Callable[[int, Piece], list[dict[str, Any]]],
    ) -> Response:
        """Send the answers piece by piece, as server-sent events."""
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        head = form.head | {"object": kind} | ({"usage": None} if with_usage else {})

        async def events() -> AsyncIterator[str]:
            try:
                for choice in opening:
                    yield _event(head | {"choices": [choice]})
                async for number, piece in merged(answers):
                    for choice in chunks(number, piece):
                        yield _event(head | {"choices": [choice]})
                if with_usage:
                    yield _event(head | {"choices": [], "usage": _usage(answers, body.n)})
                yield "data: [DONE]\n\n"
            except Failed:
                yield _event(Refused(500, "the model failed; the server's log says why").body())
            finally:
                for answer in answers:
                    answer.job.cancelled = True

        return _Stream(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _form(self, prefix: str) -> Form:
        return Form(self.names, self.served.name, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))


class _Stream(StreamingResponse):
    """A stream that ends its generator at once when the client is gone."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self.body_iterator.aclose()


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _usage(answers: Sequence[Answer], n: int) -> dict[str, int]:
    prompt = sum(len(answer.prompt_ids) for answer in itertools.islice(answers, 0, None, n))
    written = sum(answer.written for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _invalid(error: ValidationError) -> Refused:
    """Return the first thing that is wrong with a body, in one line."""
    problem = first_problem(error)
    place, allowed = problem.place, problem.allowed
    if place[-1:] == ("str",) and place[-2] in EITHER:
        place, allowed = place[:-1], EITHER[str(place[-2])]
    name = ".".join(map(str, place))
    return Refused(400, f"{name or 'body'}: {allowed}"[:300], param=name or None)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return Refused(error.status_code, message).response()


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
