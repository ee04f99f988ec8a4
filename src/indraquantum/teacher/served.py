"""A teacher behind an OpenAI-compatible server that returns prompt log-probabilities, as vLLM does.

    indra capture --teacher http://127.0.0.1:8000/v1 --kind topk --top-k 20

Each piece of a document is one request of token ids, so that documents stay apart. Such a server gives the likeliest
tokens and the actual next one, all at temperature 1. It gives no draws, and no entropy, for which only bounds are
computed. Whether it serves the model that it names can't be checked from here.

Legend: N positions, T tokens of one piece, k tokens kept, V vocabulary, m probability that was not returned.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any

import numpy as np

from indraquantum.api_key import API_KEY, usable_key
from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError
from indraquantum.teacher.sampling import PositionSignals

if TYPE_CHECKING:
    import httpx2

    from indraquantum.data.prepared import PreparedDataset
    from indraquantum.teacher.shard_worker import Plan

ATTEMPTS = 8
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 60.0
_TIMEOUT_SECONDS = 300
_PASSING = {408, 409, 425, 429}  # statuses worth another attempt, besides all from 500 on
_MASS_TOLERANCE = 1e-3  # returned probabilities may exceed 1 by this much, because half-precision servers round


def is_served(teacher: str) -> bool:
    """Return whether `--teacher` names a server."""
    return teacher.startswith(("http://", "https://"))


def check_served(settings: CaptureSettings) -> None:
    """Refuse what a server can't give.

    Raises:
        UserError: the kind is not topk, the temperature is not 1, or there is more than one worker.
    """
    if settings.kind != "topk":
        raise UserError(
            "--kind", settings.kind, "must be topk, because a server gives its likeliest tokens and no draws"
        )
    if settings.temperature != 1.0:
        raise UserError(
            "--temperature",
            settings.temperature,
            "must be 1, because a server gives its likeliest tokens at temperature 1 only",
        )
    if settings.workers != 1 or settings.engine != "local":
        raise UserError(
            "--workers", settings.workers, "must be 1 with --engine local; to ask a server faster, raise --concurrency"
        )


def served_identity(settings: CaptureSettings) -> str:
    """Return a hex SHA-256 of the served model's name, which is all that a server tells."""
    with _client(settings) as client:
        return hashlib.sha256(f"served\n{served_model(settings, client)}".encode()).hexdigest()


def served_model(settings: CaptureSettings, client: httpx2.Client) -> str:
    """Return the model to ask: `--served-model`, or the first one that the server lists."""
    if settings.served_model is not None:
        return settings.served_model
    answer = _Requests(settings, client).json("GET", "/models", None)
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise UserError("--teacher", settings.teacher, "lists no model; name one with --served-model") from None


def _client(settings: CaptureSettings) -> httpx2.Client:
    import httpx2

    key = usable_key(API_KEY, os.environ.get(API_KEY, ""))
    return httpx2.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(_TIMEOUT_SECONDS, connect=10),
        limits=httpx2.Limits(max_connections=settings.concurrency),
    )


class _Requests:
    """Sends requests at the allowed rate, and repeats those whose failure may be temporary.

    Attributes:
        stopped: set it when nobody waits for the answers any more, so that no more requests are sent.
    """

    def __init__(self, settings: CaptureSettings, client: httpx2.Client) -> None:
        self._settings, self._client = settings, client
        self._lock, self._next = threading.Lock(), 0.0
        self.stopped = threading.Event()

    def json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Return the JSON of the answer.

        Raises:
            UserError: the server refuses, or fails too often.
        """
        import httpx2

        address, reason = self._settings.teacher.rstrip("/") + path, ""
        for attempt in range(ATTEMPTS):
            wait = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**attempt) * random.uniform(0.5, 1)
            self._keep_to_rate()
            if self.stopped.is_set():
                break  # nobody reads the error below
            try:
                answer = self._client.request(method, address, json=body)
                if answer.status_code == 200:
                    return answer.json()
            except (httpx2.TransportError, ValueError) as error:  # a cut-off answer is no JSON
                reason = f"{type(error).__name__}: {error}"
            except httpx2.InvalidURL:
                raise UserError("--teacher", self._settings.teacher, "must be the URL of a server") from None
            else:
                reason = f"status {answer.status_code}: {' '.join(answer.text.split())[:200]}"
                if answer.status_code < 500 and answer.status_code not in _PASSING:
                    raise UserError("--teacher", self._settings.teacher, f"refuses the request ({reason})")
                asked = answer.headers.get("retry-after", "")
                wait = min(float(asked), 10 * _LONGEST_WAIT_SECONDS) if asked.isdigit() else wait
            if attempt + 1 < ATTEMPTS:
                self.stopped.wait(wait)
        allowed = f"failed {ATTEMPTS} times ({reason}); run the same command later to resume"
        raise UserError("--teacher", self._settings.teacher, allowed)

    def _keep_to_rate(self) -> None:
        if not self._settings.requests_per_second:
            return
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + 1 / self._settings.requests_per_second
        self.stopped.wait(mine - now)


class ServedAsker:
    """Asks a server about the pieces of rows, several at a time.

    Attributes:
        precision: "served", because the server does not tell its number format.
        packed: None, because documents never share a request.
    """

    precision, packed = "served", None

    def __init__(self, plan: Plan, dataset: PreparedDataset) -> None:
        """Prepare the client and choose the model."""
        self._settings, self._dataset, self._k = plan.settings, dataset, plan.manifest.top_k
        self._client = _client(plan.settings)
        self._requests = _Requests(plan.settings, self._client)
        try:
            self._model = served_model(plan.settings, self._client)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Send no more requests, and close the connection."""
        self._requests.stopped.set()
        self._client.close()

    def signals(self, split: str, rows: np.ndarray) -> PositionSignals:
        """Return the signals of all real positions of these rows, in their order.

        Raises:
            UserError: the server refuses, fails too often, or gives impossible values.
        """
        side = getattr(self._dataset, split)
        first, last = side.row_pieces[rows[0]], side.row_pieces[rows[-1] + 1]
        errors: list[UserError] = []

        def ask(piece: int) -> PositionSignals:
            try:
                return self._piece(side, piece)
            except UserError as error:
                errors.append(error)
                self._requests.stopped.set()  # the answers to other requests would be of no use
                raise

        # After an error or a signal, the waiting requests are dropped. Requests under way may take minutes. Nothing
        # waits for them, not even the end of the process, because a ThreadPool's threads are daemons.
        with ThreadPool(self._settings.concurrency) as pool:
            try:
                answers = list(pool.imap(ask, range(first, last)))
            except UserError:
                raise errors[0] from None  # others only were stopped
        return PositionSignals(*map(np.concatenate, zip(*answers, strict=True)))

    def _piece(self, side: Any, piece: int) -> PositionSignals:
        start, length = side.pieces[piece].tolist()
        end = int(side.document_offsets[side.piece_documents[piece] + 1])
        # One more token, whichever it is: a server says for each token what it expected in its place.
        following = int(side.tokens[start + length]) if start + length < end else self._dataset.tokenizer.eos_id
        prompt = [*side.tokens[start : start + length].tolist(), following]
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": self._k}
        answer = self._requests.json("POST", "/completions", body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if len(entries) != len(prompt):
                raise ValueError(f"{len(entries)} prompt_logprobs for {len(prompt)} tokens")
            vocabulary_size = self._dataset.tokenizer.vocabulary_size
            known = [_position(*pair, self._k, vocabulary_size) for pair in zip(entries[1:], prompt[1:], strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            allowed = (
                f"must return prompt_logprobs as vLLM does ({type(error).__name__}: {error}). The servers of llama.cpp "
                "can't; if you have its GGUF file, give that as --teacher"
            )
            raise UserError("--teacher", self._settings.teacher, allowed) from None
        ids_Tk, logprobs_Tk, label_T = (np.array(column) for column in zip(*known, strict=True))
        if start + length == end:
            label_T[-1] = np.nan  # the added token says nothing
        low_T, high_T = entropy_bounds(logprobs_Tk, vocabulary_size)
        figures = [low_T, np.exp(logprobs_Tk.max(1)), label_T, low_T]
        return PositionSignals(
            ids_Tk.reshape(-1), np.exp(logprobs_Tk).astype(np.float32).reshape(-1), np.full(length, self._k),
            *(figure.astype(np.float32) for figure in figures), high_T.astype(np.float32),
        )  # fmt: skip


def _position(entry: dict[str, Any], actual: int, k: int, vocabulary_size: int) -> tuple[list[int], list[float], float]:
    """Return a position's k likeliest ids in ascending order, their log-probabilities, and the actual token's."""
    logprobs = {int(token): float(about["logprob"]) for token, about in entry.items()}
    if not all(0 <= token < vocabulary_size for token in logprobs):
        raise ValueError("a token outside the dataset's vocabulary, so the server has another tokenizer")
    if not all(-np.inf < logprob <= _MASS_TOLERANCE for logprob in logprobs.values()):
        raise ValueError("a log-probability that is not a number from minus infinity to 0")
    likeliest = sorted(sorted(logprobs, key=lambda token: (-logprobs[token], token))[:k])
    if len(likeliest) < k:
        raise ValueError(f"{len(likeliest)} tokens where {k} were asked for")
    values = [min(0.0, logprobs[token]) for token in likeliest]
    mass = float(np.exp(values).sum())
    if mass > 1 + _MASS_TOLERANCE:
        raise ValueError(f"probabilities that sum to {mass:.4g}")
    shift = np.log(max(1.0, mass))
    return likeliest, [value - shift for value in values], min(0.0, logprobs[actual])


def entropy_bounds(logprobs_Nk: np.ndarray, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of the entropy when only the k likeliest tokens are known.

    None of the other tokens can be likelier than the least likely of the k. The entropy is lowest if as few of them as
    possible share the remaining probability m, and highest if all of them share it evenly.

    Args:
        logprobs_Nk: (N, k) log-probabilities of the likeliest tokens, nats.
        vocabulary_size: V.

    Returns:
        (N,) lower and (N,) upper bound, nats.
    """
    probs_Nk = np.exp(logprobs_Nk)
    known_N = -(probs_Nk * logprobs_Nk).sum(1)
    rest_N = np.clip(1 - probs_Nk.sum(1), 0, 1)
    others = vocabulary_size - logprobs_Nk.shape[1]
    if others == 0:
        return known_N, known_N
    least_N = np.minimum(probs_Nk.min(1), np.maximum(rest_N, np.finfo(float).tiny))
    log_rest_N = np.log(np.maximum(rest_N, np.finfo(float).tiny))
    low_N = known_N - rest_N * np.log(np.maximum(least_N, np.finfo(float).tiny))
    high_N = known_N + rest_N * (np.log(others) - log_rest_N)
    return np.minimum(low_N, high_N), high_N
