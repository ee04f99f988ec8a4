"""Trains several runs at once, each in its own process, which saves a checkpoint and ends when its parent ends.

The processes are forked from one that has loaded everything and computed nothing. On macOS, where the system's own
libraries may crash in a forked process, each is started afresh. multiprocessing's own pools can do neither: they lose a
job whose process is killed, and they don't wait for checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock

from indraquantum.ablation.tasks import Task
from indraquantum.errors import UserError
from indraquantum.interrupts import Interrupts
from indraquantum.progress import command_line

PATIENCE = 120  # seconds that a process has to save a checkpoint and end after its parent was killed


def run_tasks(tasks: Sequence[Task], jobs: int, say: Callable[[str], object]) -> list[str]:
    """Do `tasks`, `jobs` of them at a time. If one fails, the others continue.

    Args:
        tasks: runs without a JSON file.
        jobs: processes at a time.
        say: called with a line about each run that ends.

    Returns:
        A line with the reason for each run that has no JSON file afterwards.

    Raises:
        Interrupted: a signal came; the unfinished runs have saved a checkpoint.
    """
    context = multiprocessing.get_context(start_method())
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["indraquantum.ablation.one_run"])
        _start_server()
    waiting, running, without = deque(tasks), {}, []
    with Interrupts() as interrupts:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    with interrupts.deferred():
                        process = context.Process(target=_run_here, args=(waiting[0],), name=waiting[0].name)
                        try:
                            process.start()
                        except (EOFError, OSError):  # the process that forks has ended, perhaps by the same signal
                            interrupts.check()
                            raise
                        running[process] = waiting.popleft()
                    interrupts.check()
                for process in _ended(list(running)):
                    outcome = _outcome(running.pop(process), process.exitcode, len(waiting) + len(running))
                    say(outcome.line)
                    if not outcome.recorded:
                        without.append(outcome.line)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    return without


def start_method() -> Literal["forkserver", "spawn"]:
    """Return how multiprocessing starts the runs on this system."""
    return "spawn" if sys.platform == "darwin" else "forkserver"


def _start_server() -> None:
    """Start the process that forks the runs, and let it ignore a terminal that closes, or a Ctrl-C in it.

    A SIGHUP would end it and leave the runs behind. They have a session of their own, and their parent ends them. A
    SIGINT would end it with a traceback while it loads; after that, it ignores SIGINT by itself. So do the runs.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        forkserver.ensure_running()  # the new process takes over what is ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Outcome(NamedTuple):
    line: str
    recorded: bool  # the run has its JSON


def _ended(running: list[BaseProcess]) -> list[BaseProcess]:
    ended = wait([process.sentinel for process in running])
    found = [process for process in running if process.sentinel in ended]
    for process in found:
        process.join()
    return found


def _outcome(task: Task, exit_status: int | None, left: int) -> _Outcome:
    record = task.record()
    if record is None:
        killed = f"killed by signal {-exit_status}" if exit_status and exit_status < 0 else ""  # by lack of memory, say
        said = killed or _last_line(log_path(task)) or f"exit status {exit_status}"
        return _Outcome(f"{task.name}: not finished ({said}); see {log_path(task)}", recorded=False)
    if record["status"] == "failed":
        return _Outcome(f"{task.name}: failed: {record['line']}", recorded=True)
    loss = record["sources"]["all"]["cross_entropy"]
    half = record["half"]
    return _Outcome(f"{task.name}: {loss:.4f} nats/token on the {half} half; {left} runs to go", recorded=True)


def log_path(task: Task) -> Path:
    """Return the file for the output of a run's process."""
    return task.settings.logs / task.settings.output.name / "output.txt"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _run_here(task: Task) -> None:
    """Do one run; this is what its process executes."""
    os.setsid()  # a Ctrl-C in the terminal goes to the parent, which passes it on
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    log = log_path(task)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    from indraquantum.ablation.one_run import run_task

    with command_line():  # it writes into the log of a command
        try:
            with FileLock(log.with_name(".run-lock"), timeout=PATIENCE):
                if task.record() is None:
                    run_task(task)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_status)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
