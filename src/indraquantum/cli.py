"""The command `indra`: each subcommand is one function that takes one settings class of config.py.

    indra prepare | data | capture | teacher | train | lr-test | test | chat | serve | eval | export | ablate | bench |
          runs | doctor | demo

An error in what you typed or in your files is one line on stderr, with exit status 2. Each command imports what it
needs when it runs, so that `indra --help` starts quickly.
"""

from __future__ import annotations

import contextlib
import gc
import io
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict
from pydantic import ValidationError

from indraquantum import __version__
from indraquantum.config import (
    AblateSettings,
    BenchSettings,
    CaptureSettings,
    ChatSettings,
    DemoSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    LrTestSettings,
    MonitorSettings,
    PrepareSettings,
    RunsSettings,
    ServeSettings,
    ShowSettings,
    TeacherSettings,
    TestSettings,
    TrainSettings,
)
from indraquantum.errors import IndraError, InvalidInput, UserError, as_option, refused_by_system, refused_setting
from indraquantum.interrupts import heeded
from indraquantum.launched import launched_processes
from indraquantum.progress import command_line

# `*` lifts the fields of a settings class to options of the command; switches have no --no- twin.
OPTIONS = Parameter(name="*", negative="")

app = App(
    name="indra",
    help="IndraQuantum phase 2: train a small language model by semantic distillation.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # run_guarded says it
)
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], options: Path | None = None
) -> None:
    """Run the command that `tokens` name.

    Parameters
    ----------
    options:
        A YAML file with options of the command; write _ for - in their names. The command line overrides the file.
    """
    if tokens[:1] != ("train",):
        require_one_process()
    app.config = None if options is None else options_of(options)
    app(tokens, exit_on_error=False, print_error=False)


def options_of(path: Path) -> Callable[[App, tuple[str, ...], ArgumentCollection], None]:
    """Return what gives cyclopts the options of the YAML file at `path` that the command line leaves out.

    Raises:
        UserError: the file can't be read, is not a mapping, or holds what no option has.
    """
    from indraquantum.yaml_settings import read_yaml

    content = read_yaml("--options", path, "options of the command, such as `epochs: 3`")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError("--options", f"{path}: {name}", "must be the name of an option; put it in quotes")
        if name == "options":  # cyclopts leaves out what `launch` takes
            raise UserError("--options", f"{path}: {name}", "must be an option of the command; this one names the file")
        if any(isinstance(part, dict | list) for part in (value if isinstance(value, list) else [value])):
            raise UserError("--options", f"{path}: {name}", "must have one value, or a list of values")

    def fill(command: App, names: tuple[str, ...], arguments: ArgumentCollection) -> None:
        # Below the command's own name: in a flat mapping, options with the name of a command would get lost.
        values = reduce(lambda inner, name: {name: inner}, reversed(names), content)
        Dict(values, source=str(path))(command, names, arguments)

    return fill


@app.command
def demo(*, settings: Annotated[DemoSettings, OPTIONS] = DemoSettings.model_construct()) -> None:
    """Run the whole pipeline offline on Python's own manual, from a corpus to a trained model that answers."""
    from indraquantum.demo import run_demo

    run_demo(settings)


@app.command
def prepare(*, settings: Annotated[PrepareSettings, OPTIONS] = PrepareSettings.model_construct()) -> None:
    """Turn WikiText, Alpaca and your own text into training rows, as a packed dataset and as a pickle."""
    from indraquantum.data.prepare import prepare as run
    from indraquantum.monitor.summaries import prepare_summary

    print(prepare_summary(run(settings)))


data = App(name="data", help="Inspect a prepared dataset.", help_format="plaintext")
app.command(data)


@data.command
def info(path: Path = Path("data/mixed_train"), /, *, tokenizer: str | None = None) -> None:
    """Print what a dataset holds: its sources, splits, rows and tokens.

    Parameters
    ----------
    path:
        The prepared folder, or a pickle.
    tokenizer:
        The tokenizer of a pickle: a folder, a file or a hub id. A packed folder has its own.
    """
    with quick_import():
        from indraquantum.data.inspect import describe

    print(describe(path, tokenizer))


@data.command
def verify(path: Path = Path("data/mixed_train"), /) -> None:
    """Check that a dataset is undamaged: every hash of a prepared folder, or the checksum of a pickle.

    Parameters
    ----------
    path:
        The prepared folder, or a pickle.
    """
    from indraquantum.data.inspect import verify as run

    print(run(path))


@data.command
def show(
    path: Path = Path("data/mixed_train"),
    /,
    *,
    settings: Annotated[ShowSettings, OPTIONS] = ShowSettings.model_construct(),
) -> None:
    """Print rows as text, and show where documents begin and end.

    Parameters
    ----------
    path:
        The prepared folder, or a pickle.
    """
    from indraquantum.data.inspect import show_rows

    print(show_rows(path, settings))


@app.command
def capture(*, settings: Annotated[CaptureSettings, OPTIONS] = CaptureSettings.model_construct()) -> None:
    """Ask the teacher about every position of a dataset once, and store its signals."""
    from indraquantum.monitor.summaries import capture_summary
    from indraquantum.teacher.capture import capture as run

    print(capture_summary(run(settings)))


@app.command
def teacher(*, settings: Annotated[TeacherSettings, OPTIONS] = TeacherSettings.model_construct()) -> None:
    """Train a small Llama teacher from scratch on a prepared dataset."""
    from indraquantum.interrupts import Interrupts

    with Interrupts():  # before the imports that take a while
        from indraquantum.training.pretrain_teacher import pretrain_teacher

        pretrain_teacher(settings)


@app.command
def train(*, settings: Annotated[TrainSettings, OPTIONS] = TrainSettings.model_construct()) -> None:
    """Train IndraQuantumPhase2 on text and on a teacher's signals (semantic distillation)."""
    from indraquantum.interrupts import Interrupts

    if settings.dry_run:
        if launched_processes() > 1:
            raise UserError("--dry-run", True, "must be left out with several processes")
        from indraquantum.trials.dry_run import dry_run

        dry_run(settings)
        return
    with Interrupts():  # before the imports that take a while
        with quick_import():
            from indraquantum.training.loop import train as run

        if settings.minutes is not None:
            from indraquantum.trials.budget import within_minutes

            settings = within_minutes(settings)
        run(settings)


@app.command(name="lr-test")
def lr_test(*, settings: Annotated[LrTestSettings, OPTIONS] = LrTestSettings.model_construct()) -> None:
    """Find a learning rate: train with a rising rate, plot the loss, and discard the trained weights."""
    from indraquantum.trials.lr_range import lr_range_test

    lr_range_test(settings)


@app.command
def test(checkpoint: Path, /, *, settings: Annotated[TestSettings, OPTIONS] = TestSettings.model_construct()) -> None:
    """Write text with a trained model.

    Parameters
    ----------
    checkpoint:
        A checkpoint that training wrote, such as checkpoint_v4_epoch_3.pt, or a folder that indra export wrote
        as transformers.
    """
    with quick_import():
        from indraquantum.inference.write import write_text

    write_text(checkpoint, settings)


@app.command
def chat(checkpoint: Path, /, *, settings: Annotated[ChatSettings, OPTIONS] = ChatSettings.model_construct()) -> None:
    """Talk with a trained model in the terminal; or pipe a question to it, and it prints the answer alone.

    Parameters
    ----------
    checkpoint:
        A checkpoint that training wrote, or a folder that indra export wrote as transformers.
    """
    with quick_import():
        from indraquantum.inference.chat import run_chat

    run_chat(checkpoint, settings)


@app.command
def serve(
    checkpoint: Path, /, *, settings: Annotated[ServeSettings, OPTIONS] = ServeSettings.model_construct()
) -> None:
    """Serve a trained model over HTTP: OpenAI's API, with the log-probabilities that `indra capture` asks for.

    Parameters
    ----------
    checkpoint:
        A checkpoint that training wrote, or a folder that indra export wrote as transformers.
    """
    from indraquantum.serving.server import serve_checkpoint

    serve_checkpoint(checkpoint, settings)


@app.command(name="eval")
def evaluate(
    checkpoint: Path, /, *, settings: Annotated[EvalSettings, OPTIONS] = EvalSettings.model_construct()
) -> None:
    """Measure a model on held-out text: its loss, its calibration, and how well its state agrees with the teacher.

    Parameters
    ----------
    checkpoint:
        A checkpoint that training wrote, or a folder that indra export wrote as transformers.
    """
    with quick_import():
        from indraquantum.inference.report import evaluate_checkpoint

    evaluate_checkpoint(checkpoint, settings)


@app.command
def export(
    checkpoint: Path,
    folder: Path,
    /,
    *,
    settings: Annotated[ExportSettings, OPTIONS] = ExportSettings.model_construct(),
) -> None:
    """Write a trained model for other programs: transformers, llama.cpp, onnxruntime, a browser.

    Parameters
    ----------
    checkpoint:
        A checkpoint that training wrote.
    folder:
        The folder to write. It must be new or empty.
    """
    from indraquantum.inference.export import export_checkpoint

    print(export_checkpoint(checkpoint, folder, settings))


@app.command
def ablate(plan: Path, /, *, settings: Annotated[AblateSettings, OPTIONS] = AblateSettings.model_construct()) -> None:
    """Train variants of a model on the same tokens with several seeds, and write a report that compares them.

    The same command again keeps finished runs and continues with the others.

    Parameters
    ----------
    plan:
        The plan, a YAML file. docs/FORMATS.md describes it, and configs/ablations holds examples.
    """
    from indraquantum.interrupts import Interrupts

    with Interrupts():  # before the imports that take a while
        from indraquantum.ablation.ablate import ablate as run

        report = run(plan, settings)
    if report is not None:
        print(f"The report is in {report}.")


@app.command
def bench(*, settings: Annotated[BenchSettings, OPTIONS] = BenchSettings.model_construct()) -> None:
    """Measure the speed and memory of the objective and of the whole training step. Run it on an idle machine."""
    from indraquantum.trials.bench_step import bench as run

    run(settings)


@app.command
def doctor(*, settings: Annotated[DoctorSettings, OPTIONS] = DoctorSettings.model_construct()) -> None:
    """Print versions, devices, threads and caches, for a bug report."""
    from indraquantum.doctor import doctor as run

    run(settings)


runs = App(name="runs", help="List training runs, or compare some of them.", help_format="plaintext")
app.command(runs)


@runs.default
def list_(*, settings: Annotated[RunsSettings, OPTIONS] = RunsSettings.model_construct()) -> None:
    """List runs with their state, steps, last loss, and last and best held-out cross-entropy of each source."""
    from indraquantum.monitor.run_table import list_runs

    list_runs(settings.logs)


@runs.command
def compare(
    run: str, /, *others: str, settings: Annotated[RunsSettings, OPTIONS] = RunsSettings.model_construct()
) -> None:
    """Compare runs: show the settings in which they differ, and their held-out figures side by side.

    Parameters
    ----------
    run:
        The name of a run below the logs, or the path of its folder.
    others:
        More runs to compare it with.
    """
    from indraquantum.monitor.run_table import compare_runs

    compare_runs(settings.logs, (run, *others))


@app.command
def monitor(
    logs: Path = Path("logs"), /, *, settings: Annotated[MonitorSettings, OPTIONS] = MonitorSettings.model_construct()
) -> None:
    """Show runs in your browser while they train: their curves, what they wrote, and the state of their models.

    Parameters
    ----------
    logs:
        The folder of the logs. Every folder below it with a metrics.jsonl is a run.
    """
    from indraquantum.live.monitor import monitor as run

    run(logs, settings)


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Import without garbage collection. It would take an eighth of torch's import time and find nothing to free."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def require_one_process() -> None:
    """Refuse several processes of torchrun, because only training shares its work among them.

    Raises:
        UserError: there is more than one process.
    """
    if (world := launched_processes()) > 1:
        raise UserError("torchrun", f"{world} processes", "must be 1: only `indra train` runs in several processes")


def one_line(error: CycloptsError) -> str:
    """Say what is wrong with the command line in one line: the option, the value, what is allowed."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, ValidationError):
        cause = cause.__cause__
    if cause is None:
        return " ".join(str(error).split())
    refused = refused_setting(cause)
    return str(InvalidInput(as_option(refused.field).replace(".", "-"), refused.value, refused.allowed))


def _nobody_reads() -> bool:
    """Return whether the reader of stdout is gone."""
    try:
        sys.stdout.flush()  # what could not be written is still there
        ended = select.poll()
        ended.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in ended.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file, or a closed one
        return False


def run_guarded(action: Callable[[], object]) -> int:
    """Run `action` and return the exit status; an error in the input becomes one line on stderr."""
    with command_line():
        try:
            action()
        except CycloptsError as error:
            print(f"indra: error: {one_line(error)}", file=sys.stderr)
            return 2
        except IndraError as error:
            if not error.is_told:
                print(f"indra: error: {error}", file=sys.stderr)
            return error.exit_status
        except KeyboardInterrupt:
            print("indra: interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return 141
            told = refused_by_system(error)
            if told is None:
                raise
            print(f"indra: error: {told}", file=sys.stderr)
            return told.exit_status
    return 0


def leave(number: int, _: FrameType | None) -> None:
    """End by an exception when a signal asks for it, so that temporary files are removed."""
    if number == signal.SIGHUP:  # a closed terminal sends it more than once; no other may interrupt the clean-up
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `indra` with `arguments` (default: those of the process) and exit with its status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    if threading.current_thread() is threading.main_thread():  # elsewhere no signal arrives, nor can one be caught
        for number in heeded(signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, leave)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file is read while the command runs
        # A name in a manifest, or a terminal that knows ASCII alone, must not stop the command.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.exit(run_guarded(lambda: app.meta(tokens, exit_on_error=False, print_error=False)))


if __name__ == "__main__":
    main()
