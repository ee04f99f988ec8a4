"""Several processes of one run, as torchrun would start them. Forking them from this one takes milliseconds."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from indraquantum.processes import Processes, joined_processes
from survival import fork

# Seconds after which processes that wait for each other are taken for hung: many, for a machine with other work, but
# fewer than pytest's 300, which would not say which of them still ran.
PATIENCE = 240.0


def start(world: int, action: Callable[[int], object], folder: Path) -> list[int]:
    """Fork `world` processes that run `action(rank)` as the command line would; their ids, by rank.

    What rank R prints goes to `folder/said.R`.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as held:  # no other program gets the port; the first process may listen at it nevertheless
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        if sys.platform == "linux":
            here["GLOO_SOCKET_IFNAME"] = "lo"  # the name elsewhere is another, and Gloo finds it
        return [fork(partial(_take_place, rank, world, here, action), folder / f"said.{rank}") for rank in range(world)]


def _take_place(rank: int, world: int, here: dict[str, str], action: Callable[[int], object]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= here | {name: str(value) for name, value in place.items()}
    action(rank)


def wait(pids: list[int]) -> list[int]:
    """The exit statuses, negative for a signal; a hang fails."""
    statuses, deadline = {}, time.monotonic() + PATIENCE
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"hung; ended so far: {statuses}")
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def run(world: int, action: Callable[[int], object], folder: Path) -> list[int]:
    """The exit statuses of `action(rank)` in `world` processes."""
    return wait(start(world, action, folder))


def values(world: int, action: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """What `action` returns in each of `world` processes that have met."""

    def act(rank: int) -> None:
        with joined_processes() as processes:
            (folder / f"value.{rank}").write_bytes(pickle.dumps(action(processes)))

    assert run(world, act, folder) == [0] * world, said(folder)
    return [pickle.loads((folder / f"value.{rank}").read_bytes()) for rank in range(world)]


def said(folder: Path) -> str:
    """All that the processes printed."""
    return "\n".join(said_by(path) for path in sorted(folder.glob("said.*")))


def said_by(path: Path) -> str:
    """What one process printed, without the lines in which Gloo of torch 2.10 tells of its connections."""
    return "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("[Gloo]"))
