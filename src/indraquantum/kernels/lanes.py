"""Threads that each work on a part of the vocabulary without waiting for the others.

torch's own threads wait for each other at the end of every operation, some thousand times a call. If anything else runs
on the machine, all of them wait for the latest one each time. Lanes wait for each other only a few times a chunk, and
each works in its own core's cache.

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
    """The vocabulary, divided into lanes of one thread each, and every lane into tiles; a context manager."""

    def __init__(self, vocabulary_size: int, tile: int, count: int) -> None:
        """Divide `vocabulary_size` tokens into `count` lanes, with tiles of at most `tile` tokens."""
        count = min(count, vocabulary_size)
        bounds = [vocabulary_size * lane // count for lane in range(count + 1)]
        self.tiles = [_cut(start, stop, tile) for start, stop in itertools.pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Lanes:
        """Start the threads. With one lane, the caller's own thread does the work with the help of torch's threads."""
        if len(self.tiles) > 1:
            self._pool = ThreadPoolExecutor(len(self.tiles), "lane", torch.set_num_threads, (1,))
            torch.set_num_threads(1)  # else torch's own threads, which wait busily, would take the lanes' cores
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the threads and restore torch's number of threads, which is partly global."""
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)

    def map(self, work: Callable[[Tiles], Result]) -> list[Result]:
        """Call `work` with each lane's tiles at the same time; return the results in the lanes' order."""
        if self._pool is None:
            return [work(tiles) for tiles in self.tiles]
        return list(self._pool.map(work, self.tiles))


def _cut(start: int, stop: int, tile: int) -> Tiles:
    """Even pieces of at most `tile`."""
    count = -(-(stop - start) // tile)
    bounds = [start + (stop - start) * piece // count for piece in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]
