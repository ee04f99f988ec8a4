"""Fixtures for all tests: offline, one thread, no GPU, and the real inputs of ../shared where they are."""

from __future__ import annotations

import importlib.abc
import json
import os
import random
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports them: libraries that would ask a hub must fail at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Toy sizes are quickest on one thread; `make test-processors` asks for others.
os.environ["OMP_NUM_THREADS"] = os.environ.get("INDRA_TEST_THREADS", "1")
# Nothing is measured and nothing hangs on what is quicker here.
os.environ["INDRA_PRODUCTS"] = "onednn:512x1000"
# `--precision auto` is float32 on every processor, so that the tests compute alike on all.
os.environ["INDRA_BFLOAT16"] = "0"
# The tests are of the CPU, and many fork, which a process that has used CUDA can't.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The same examples each time, however slow the machine is.
settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

# A shell that starts the tests in the background, or nohup, has these ignored, which tests of signals would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# What takes longest, and begins first: a long file that begins last has one core for itself.
LONG_FILES = (
    "test_survival.py", "test_serving.py", "test_ablation.py", "test_ablation_plan.py", "test_parallel_runs.py",
    "test_trainer_options.py", "test_inference_onnx.py", "test_inference_export.py", "test_damage.py", "test_demo.py",
    "test_readme.py", "test_examples.py", "test_kernels_bench.py", "test_demo_real.py", "test_teacher_workers.py",
)  # fmt: skip


def pytest_configure(config):
    """Let xdist hand out files in the order of the tests, instead of those with the most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def _same_threads():
    """Each test begins with the same number of threads, even if an earlier test changed it."""
    torch, threads = sys.modules.get("torch"), int(os.environ["OMP_NUM_THREADS"])
    if torch and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_mps(monkeypatch):
    """A Mac hides its GPU from the libraries that take one by themselves, such as transformers' Trainer."""
    if torch := sys.modules.get("torch"):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _as_a_command():
    """Messages read as at the command line, and notes are printed; tests of the Python functions put this out."""
    from indraquantum.progress import command_line

    with command_line():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, tokenizer and teacher beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture
def deaf_server():
    """The address of a port that is taken, so that no other program gets it, but at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def no_pictures(monkeypatch):
    """A figure is a few bytes instead of a drawing, which takes a while. Other tests look at real ones."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def without_package(monkeypatch):
    """Return `without_package(name, error)`: importing this package then fails, as if it were missing or broken."""

    def block(package: str, error: Exception) -> None:
        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == package:
                    raise error

        loaded = [name for name in sys.modules if package in name.split(".")]  # torch.utils.tensorboard is another
        for name in loaded:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])

    return block


@dataclass(frozen=True)
class World:
    """A tiny world of text, tokenizer, dataset, teacher and signals, made on the spot; read-only."""

    wikitext: Path
    alpaca: Path
    tokenizer: Path
    pickle: Path
    data: Path
    teacher: Path
    signals: Path


SUBJECTS = ("the cat", "a dog", "my bird", "the fish", "one horse", "the old mouse")
VERBS = ("sees", "likes", "follows", "finds", "hears")
PLACES = ("in the garden", "by the river", "under a tree", "on the hill", "at night")


def sentence(draw: random.Random) -> str:
    """Return a sentence in which some next words are certain and others are open, so a model can learn something."""
    return f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(SUBJECTS)} {draw.choice(PLACES)} ."


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Text of a few hundred sentences, and everything the pipeline makes of it."""
    from indraquantum.config import CaptureSettings, PrepareSettings, TeacherSettings
    from indraquantum.data.prepare import prepare
    from indraquantum.data.tokenizer_training import train_tokenizer
    from indraquantum.teacher.capture import capture
    from indraquantum.training.pretrain_teacher import pretrain_teacher

    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    paragraphs = [" ".join(sentence(draw) for _ in range(draw.randint(1, 6))) for _ in range(120)]
    samples = [
        {"instruction": f"Who {draw.choice(VERBS)} {draw.choice(SUBJECTS)}?", "input": "", "output": sentence(draw)}
        for _ in range(60)
    ]
    text, questions = folder / "wiki.txt", folder / "alpaca.json"
    text.write_text("\n".join(paragraphs), encoding="utf-8")
    questions.write_text(json.dumps(samples), encoding="utf-8")
    train_tokenizer(text, questions, 320, folder / "tokenizer")
    data, teacher, signals = folder / "mixed", folder / "teacher", folder / "teacher_signals"
    prepare(
        PrepareSettings(
            wikitext=str(text), alpaca=str(questions), tokenizer=str(folder / "tokenizer"), max_length=48,
            output=data.with_suffix(".pkl"),
        )
    )  # fmt: skip
    pretrain_teacher(
        TeacherSettings(data=data, output=teacher, width=24, layers=1, heads=2, steps=40, batch_tokens=480,
                        learning_rate=1e-2, device="cpu", logs=folder / "logs")
    )  # fmt: skip
    capture(CaptureSettings(data=data, teacher=str(teacher), output=signals, device="cpu"))
    return World(text, questions, folder / "tokenizer", data.with_suffix(".pkl"), data, teacher, signals)
