"""Several processes of one run, as torchrun would start them. Forking them from this one takes milliseconds."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from indraquantum import cli
from indraquantum.processes import Processes, joined_processes
from survival import quiet

PATIENCE = 60.0  # seconds after which processes that wait for each other are taken for hung


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(world: int, action: Callable[[int], object], folder: Path) -> list[int]:
    """Fork `world` processes that run `action(rank)` as the command line would; their ids, by rank.

    What rank R prints goes to `folder/said.R`.
    """
    folder.mkdir(exist_ok=True)
    port, pids = free_port(), []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
                quiet(folder / f"said.{rank}")
                status = cli.run_guarded(lambda rank=rank: action(rank))
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return pids


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
