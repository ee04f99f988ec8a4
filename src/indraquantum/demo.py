"""The demo: the whole pipeline on Python's own manual, offline, from a corpus to answers.

    indra demo            minutes on 2 cores
    indra demo --tiny     the same steps in seconds, for tests

Every Python comes with its manual as prose, and with thousands of docstrings, which give question/answer pairs. These
are the two kinds of text that the full run mixes. The demo trains a tokenizer and a small Llama teacher on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

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
from indraquantum.data.prepare import prepare
from indraquantum.data.python_manual import write_manual_corpus
from indraquantum.data.tokenizer_training import train_tokenizer
from indraquantum.evaluation.held_out import perplexity, unigram_cross_entropy
from indraquantum.files import make_folder
from indraquantum.inference.write import write_text
from indraquantum.metrics import read_metrics
from indraquantum.monitor.plots import save_overview
from indraquantum.monitor.summaries import capture_summary, prepare_summary
from indraquantum.teacher.capture import capture
from indraquantum.training.loop import train
from indraquantum.training.pretrain_teacher import pretrain_teacher

PROMPTS = (
    {"prompt": "The for statement is used to"},
    {"prompt": "An exception is raised when"},
    {"instruction": "What does os.path.join do?"},
)


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
    student={"d_model": 64, "layers": 4, "mlp_width": 344, "epochs": 3, "batch_tokens": 2048, "evaluate_every": 200,
             "learning_rate": 4e-3},
)  # fmt: skip
TINY = Size(
    documents=150,
    vocabulary=512,
    teacher={"width": 32, "layers": 2, "heads": 2, "steps": 60, "batch_tokens": 1024, "learning_rate": 1e-2},
    student={"d_model": 16, "layers": 2, "mlp_width": 64, "epochs": 4, "batch_tokens": 1024, "evaluate_every": 50,
             "learning_rate": 5e-3},
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


def run_demo(settings: DemoSettings) -> DemoReport:
    """Run every stage in `settings.output` and print the results.

    Raises:
        UserError: the folder can't be written, or this Python has no manual.
    """
    started = time.perf_counter()
    console = Console()
    size = TINY if settings.tiny else FULL
    compute = {"device": settings.device, "threads": settings.threads}
    folder = make_folder("--output", settings.output)

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
    save_overview(plot, metrics, "IndraQuantum demo: v4 unified distillation on Python's manual")

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
        console.print(f"  {name:21} {path}", soft_wrap=True, highlight=False)
    console.print(f"Done in {seconds:.0f} s. Now ask the model a question:\n")
    command = f'indra test {report.files["checkpoint"]} --instruction "What does str.split do?" --show-state'
    console.print("  .venv/bin/" + command, style="bold", soft_wrap=True, highlight=False)
