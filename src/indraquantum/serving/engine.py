"""Writes many texts at once: a thread in which waiting requests join the running ones between two steps.

A pass of the model takes hardly longer for several texts than for one. So each step writes one token of every text that
has a slot. Texts that arrive meanwhile wait for the next step; then their prompts are read together in one pass. A text
that ends frees its slot at once. Whoever waits for a text gets events, which never make the engine wait.

Which tokens a text gets depends on its own seed and logits alone. Rows of a pass don't mix, so the logits are the same
alone and among others, up to rounding.

Legend: B texts, T positions, V vocabulary.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from indraquantum.inference.generate import GREEDY_BELOW
from indraquantum.model.decoder import Decoder, PackedModel

PROMPT_POSITIONS = 4096  # of a pass that reads prompts, padding included; a single prompt may be longer
LOGITS_ROWS = 128  # positions of a prompt whose logits exist at once
NUCLEUS = 512  # top-p sorts this many of the likeliest tokens first

Ranked = tuple[int, float]  # a token and its log-probability


class Token(NamedTuple):
    """A token was written."""

    id: int
    logprob: float  # in the model's full distribution, at temperature 1
    top: list[Ranked]  # the likeliest tokens, as many as were asked for


class PromptToken(NamedTuple):
    """What the model thought of a token of the prompt."""

    logprob: float
    rank: int  # 1 for the likeliest token
    top: list[Ranked]


class Prompt(NamedTuple):
    """The prompt was read. For its first token, which nothing predicts, there is None."""

    tokens: list[PromptToken | None]


class End(NamedTuple):
    """Nothing more comes."""

    reason: Literal["stop", "length", "error"]
    token: Token | None = None  # the EOS that ended it, which is not written


Event = Token | Prompt | End


@dataclass(eq=False)
class Job:
    """One text to write.

    Attributes:
        ids: the prompt.
        room: the most tokens to write.
        tell: is called with the events of each step, in the engine's thread; must return at once.
        temperature: 0 takes the likeliest token.
        top_p: sample only from the likeliest tokens whose probabilities sum to this.
        seed: decides what is drawn.
        top: how many of the likeliest tokens to tell with each written one; None if no log-probability is needed.
        prompt_top: the same for the prompt's tokens.
        cancelled: set it when nobody waits for the text any more.
    """

    ids: Sequence[int]
    room: int
    tell: Callable[[list[Event]], None]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: str = ""
    top: int | None = None
    prompt_top: int | None = None
    cancelled: bool = False
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)  # of a string: the same numbers in every version of Python


class Full(Exception):
    """Too many texts wait already, or the engine is closing."""


class Engine:
    """The thread that writes. Use it in a `with`.

    Args:
        packed: the model.
        eos_id: the token that ends a text.
        slots: the most texts at once.
        longest_queue: the most texts that may wait.
    """

    def __init__(self, packed: PackedModel, eos_id: int, slots: int, longest_queue: int) -> None:
        self.packed, self._eos_id, self.longest_queue = packed, eos_id, longest_queue
        self._decoder = Decoder(packed, slots)
        self._running: list[Job] = []  # by slot
        self._next: list[int] = []  # the token to read next, by slot
        self._waiting: deque[Job] = deque()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts are being written, and how many wait."""
        return len(self._running), len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let these texts be written: all of them or none.

        Raises:
            Full: the queue has no room for them, or the engine is closing.
        """
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if self._closing or len(self._waiting) + len(jobs) > self.longest_queue:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._running):
                    self._changed.wait()
                if self._closing:
                    break
                arrived = self._admitted()
            try:
                self._begin(arrived)
                self._step()
            except Exception as error:  # of one pass, such as memory that is not there; the next requests are served
                self._fail(arrived, error)
        for job in (*self._running, *self._waiting):
            job.tell([End("error")])

    def _admitted(self) -> list[Job]:
        """Take the jobs from the queue that get a slot now."""
        arrived: list[Job] = []
        longest = 0
        while self._waiting and len(self._running) + len(arrived) < self._decoder.slots:
            job = self._waiting[0]
            longest = max(longest, len(job.ids))
            if arrived and longest * (len(arrived) + 1) > PROMPT_POSITIONS:
                break
            self._waiting.popleft()
            if not job.cancelled:
                arrived.append(job)
        return arrived

    def _fail(self, arrived: Sequence[Job], error: Exception) -> None:
        import logging

        logging.getLogger("indraquantum").error("a pass of the model failed: %s: %s", type(error).__name__, error)
        for job in {*self._running, *arrived}:
            job.tell([End("error")])
        self._running, self._next = [], []
        while self._decoder.active:
            self._decoder.release(self._decoder.active - 1)

    @torch.no_grad()
    def _begin(self, arrived: Sequence[Job]) -> None:
        """Read the prompts of new texts and write the first token of each."""
        if not arrived:
            return
        first = self._decoder.active
        # Where nothing is to be written, the last token is only predicted, never read.
        texts = [job.ids if job.room else job.ids[:-1] or job.ids for job in arrived]
        states_BTD = self._decoder.begin(texts)
        for row, job in enumerate(arrived):
            if job.prompt_top is not None:
                job.tell([Prompt(self._prompt_tokens(states_BTD[row], job.ids, job.prompt_top))])
        ends_B = torch.tensor([len(text) - 1 for text in texts], device=states_BTD.device)
        states_BD = states_BTD[torch.arange(len(texts), device=states_BTD.device), ends_B]
        self._running += arrived
        self._next += [0] * len(arrived)
        self._write(self.packed.logits(states_BD), first)

    @torch.no_grad()
    def _step(self) -> None:
        """Write one more token of each text."""
        for slot in reversed(range(len(self._running))):
            if self._running[slot].cancelled:
                self._release(slot)
        if self._running:
            self._write(self.packed.logits(self._decoder.step(torch.tensor(self._next))), 0)

    def _write(self, logits_BV: Tensor, first: int) -> None:
        """Choose a token for each text from slot `first` on, tell it, and end the texts that are complete."""
        logits_BV = logits_BV.float().cpu()
        likeliest = logits_BV.argmax(-1).tolist()
        ended = []
        for row, slot in enumerate(range(first, len(self._running))):
            job, logits_V = self._running[slot], logits_BV[row]
            if job.room == 0:
                job.tell([End("length")])
                ended.append(slot)
                continue
            token = likeliest[row] if job.temperature < GREEDY_BELOW else drawn(logits_V, job)
            written = _written(logits_V, token, job.top)
            job.room -= 1
            events: list[Event] = [written] if job.room else [written, End("length")]
            if token == self._eos_id:
                events = [End("stop", written)]
            if isinstance(events[-1], End):
                ended.append(slot)
            job.tell(events)
            self._next[slot] = token
        for slot in reversed(ended):
            self._release(slot)

    def _release(self, slot: int) -> None:
        self._decoder.release(slot)
        self._running[slot], self._next[slot] = self._running[-1], self._next[-1]
        self._running.pop()
        self._next.pop()

    def _prompt_tokens(self, states_TD: Tensor, ids: Sequence[int], top: int) -> list[PromptToken | None]:
        """Return what the model thought of each token of a prompt."""
        found: list[PromptToken | None] = [None]
        actual_T = torch.tensor(ids[1:], device=states_TD.device)
        for start in range(0, len(actual_T), LOGITS_ROWS):
            part_T = actual_T[start : start + LOGITS_ROWS]
            logprobs_TV = self.packed.logits(states_TD[start : start + len(part_T)]).float().log_softmax(-1)
            own_T1 = logprobs_TV.gather(1, part_T[:, None])
            ranks_T = (logprobs_TV > own_T1).sum(-1) + 1
            best = logprobs_TV.topk(min(top, logprobs_TV.shape[-1])) if top else None
            for row, (own, rank) in enumerate(zip(own_T1[:, 0].tolist(), ranks_T.tolist(), strict=True)):
                ranked = [] if best is None else _ranked(best.indices[row], best.values[row])
                found.append(PromptToken(own, rank, ranked))
        return found


def _ranked(ids: Tensor, logprobs: Tensor) -> list[Ranked]:
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))


def _written(logits_V: Tensor, token: int, top: int | None) -> Token:
    if top is None:
        return Token(token, 0.0, [])
    total = logits_V.logsumexp(-1)
    best = logits_V.topk(min(top, len(logits_V)))
    return Token(token, (logits_V[token] - total).item(), _ranked(best.indices, best.values - total))


def drawn(logits_V: Tensor, job: Job) -> int:
    """Return a token that is drawn with one random number of the job.

    The tokens lie along a line, each as long as its probability; the number points at one of them. Without top-p they
    lie in the order of their ids, so that another rounding of the logits hardly ever changes which one it is.
    """
    probs_V = (logits_V / job.temperature).softmax(-1)
    if job.top_p >= 1:
        return _pointed_at(probs_V, job.draw.random())
    best = probs_V.topk(min(NUCLEUS, len(probs_V)))
    if best.values.sum() < job.top_p:
        best = probs_V.sort(descending=True)
    before = best.values.double().cumsum(0) - best.values
    kept = max(1, int((before < job.top_p).sum()))
    return int(best.indices[_pointed_at(best.values[:kept], job.draw.random())])


def _pointed_at(probs: Tensor, where: float) -> int:
    ends = probs.double().cumsum(0)
    place = int(torch.searchsorted(ends, where * ends[-1], right=True))
    return min(place, int(probs.nonzero()[-1])) if place >= len(probs) else place
