"""What the tests of stops, crashes and damage share: a small run, forks of this warm process, and what must be equal.

A fork starts in milliseconds what a new process needs seconds for: torch is loaded already.
"""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.metrics import read_metrics
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint

# Two epochs with dropout and accumulated gradients (16 rows at a time), saved and evaluated at different steps.
SMALL = {
    "d_model": 10, "layers": 1, "heads": 2, "mlp_width": 14, "batch_tokens": 1440, "learning_rate": 5e-3,
    "evaluate_every": 3, "save_every": 2, "epochs": 2, "dropout": 0.1, "threads": 1,
    "device": "cpu",
    "micro_batch_tokens": 16 * 48,
}  # fmt: skip
# Rounding grows slowly: what differs by more than it differs otherwise. Muon rounds to bfloat16.
STEADY = {"optimizer": "adamw", "table_rate": 10.0, "projector_rate": 1.0}


def small_run(world, folder: Path, **changes) -> TrainSettings:
    """Settings of the run in `folder`."""
    return TrainSettings(**{"data": world.data, "output": folder / "run", "logs": folder / "logs", **SMALL, **changes})


def train_small(settings: TrainSettings):
    """The run, as the command line starts it."""
    return loop.train(settings)


def quiet(said: Path | None = None) -> None:
    """Run in a fork, with output to the file `said` or nowhere. Use one thread: OpenMP's don't survive a fork."""
    torch.set_num_threads(1)
    descriptor = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fork(action: Callable[[], object], said: Path | None = None) -> int:
    """Start `action` in a fork, as the command line would; its process id. Whatever happens, the fork ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            quiet(said)
            status = cli.run_guarded(action)
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def in_fork(action: Callable[[], object], said: Path | None = None) -> int:
    """Run `action` in a fork, as the command line would; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(action, said), 0)[1])


def die() -> None:
    """What kill -9 does, to this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(limit: int = 4096) -> None:
    """Let no file of a fork grow beyond `limit` bytes, which the system refuses as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def at(owner, name, when, occurrence, strike):
    """Call `strike` before or after the given occurrence of `owner.name`; for a fork, which never takes it back."""
    original, count = getattr(owner, name), 0

    @functools.wraps(original)
    def wrapped(*arguments, **options):
        nonlocal count
        count += 1
        if count == occurrence and when == "before":
            strike()
        value = original(*arguments, **options)
        if count == occurrence and when == "after":
            strike()
        return value

    setattr(owner, name, wrapped)


def at_every(owner, name, strike):
    """Call `strike` with the arguments before each call of `owner.name`."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        strike(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def last_checkpoint(settings: TrainSettings) -> Path:
    """The checkpoint of the run's last epoch: by name alone, the tenth would come before the ninth."""
    return max(settings.output.glob("*_epoch_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def content_of(*folders: Path) -> dict[Path, bytes]:
    """Every file below `folders`, with its bytes."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def result(settings: TrainSettings) -> tuple[str, list[dict]]:
    """What two runs must have in common to the bit: weights, optimiser state and position; and every metrics line."""
    checkpoint = load_checkpoint("", last_checkpoint(settings))
    state = (checkpoint.step, checkpoint.tokens, checkpoint.finished, checkpoint.best, checkpoint.loss_scale)
    digest = hashlib.sha256(repr(state).encode())
    states = sorted(checkpoint.optimizer["state"].items())
    for part in (checkpoint.model, checkpoint.average, *(state for _, state in states)):
        for name, tensor in sorted(part.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(repr(checkpoint.optimizer["param_groups"]).encode())
    lines = read_metrics(settings.logs / settings.output.name / "metrics.jsonl")
    return digest.hexdigest(), [{**line, "tokens_per_second": None} for line in lines]
