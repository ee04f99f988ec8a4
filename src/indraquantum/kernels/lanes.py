"""Threads that each own a part of the vocabulary and go through it without waiting for the others.

torch's own threads meet at the end of every operation, some thousand times a call; where anything else runs on the
machine, each meeting waits for whoever is late. Lanes meet a few times a chunk, and each works on its own core's
cache.

Legend: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Result = TypeVar("Result")
Tiles = list[slice]


class Lanes:
    """The vocabulary cut into lanes, one thread each, and every lane into tiles; a context manager."""

    def __init__(self, vocabulary_size: int, tile: int, count: int) -> None:
        """Cut `vocabulary_size` tokens into `count` lanes of tiles of at most `tile` tokens."""
        count = min(count, vocabulary_size)
        bounds = [vocabulary_size * lane // count for lane in range(count + 1)]
        self.tiles = [_cut(start, stop, tile) for start, stop in itertools.pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Lanes:
        """Start the threads; with one lane the caller's own thread does the work, torch's threads helping it."""
        if len(self.tiles) > 1:
            self._pool = ThreadPoolExecutor(len(self.tiles), "lane", torch.set_num_threads, (1,))
            torch.set_num_threads(1)  # else torch's own threads, waiting busily for more, take the lanes' cores
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the threads and give torch its own back: the number is partly global."""
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)

    def map(self, work: Callable[[Tiles], Result]) -> list[Result]:
        """Call `work` with each lane's tiles, all at once; the results come in the lanes' order."""
        if self._pool is None:
            return [work(tiles) for tiles in self.tiles]
        return list(self._pool.map(work, self.tiles))


def _cut(start: int, stop: int, tile: int) -> Tiles:
    """Even pieces of at most `tile`."""
    count = -(-(stop - start) // tile)
    bounds = [start + (stop - start) * piece // count for piece in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]
