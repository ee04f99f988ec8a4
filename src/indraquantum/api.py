"""The package's functions for Python: prepare, capture, train, load, generate, evaluate, export.

    import indraquantum

    indraquantum.prepare(text=("notes.txt",), wikitext_samples=0, alpaca_samples=0, output="data/notes.pkl")
    report = indraquantum.train(data="data/notes", no_teacher=True, epochs=3)
    print(indraquantum.load(report.checkpoint).generate("Once upon a time").text)

Each function takes its options as keyword arguments, or as one settings object of `indraquantum.config`. Both use the
names of the command's options, with _ instead of -. Each function returns a dataclass with the results.

Errors. If an argument, a setting or a file is wrong, the function raises `InvalidInput`, which names the argument, its
value and what is allowed. `InvalidInput` is an `IndraError`, like every error that is documented here. If the system
fails in a way that no argument can change, such as a broken disk, the function raises `OSError`.

Output. The functions print nothing. Notes go to the logger `indraquantum`. By default you see its warnings, and
`logging.basicConfig(level=logging.INFO)` shows the other notes too. Long work shows a bar if stderr is a terminal.
`logging.getLogger("indraquantum").setLevel(logging.ERROR)` silences notes, warnings and bars.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from indraquantum.config import (
    CaptureSettings,
    EvalSettings,
    ExportSettings,
    LoadSettings,
    PrepareSettings,
    Settings,
    TrainSettings,
)
from indraquantum.errors import InvalidInput, TrainingInterrupted, refused_by_system

if TYPE_CHECKING:
    from indraquantum.data.prepare import PrepareReport
    from indraquantum.evaluation.figures import Evaluation
    from indraquantum.inference.export import ExportReport
    from indraquantum.inference.generate import GeneratedText
    from indraquantum.inference.load import Loaded
    from indraquantum.teacher.capture import CaptureReport
    from indraquantum.training.loop import TrainReport

S = TypeVar("S", bound=Settings)


@contextlib.contextmanager
def _one_family() -> Iterator[None]:
    """Inside, an error in the input is raised as an IndraError."""
    from indraquantum.interrupts import Interrupted

    try:
        yield
    except Interrupted as interrupted:  # which would end a program, or the session of a notebook
        raise TrainingInterrupted(interrupted.name) from None
    except OSError as error:
        if (told := refused_by_system(error)) is None:
            raise
        raise told from error


_FIRST = {PrepareSettings: "text", ExportSettings: "as_"}  # options that come to mind first, where it is not `data`


def _settings(kind: type[S], settings: S | None, options: dict[str, Any]) -> S:
    """Return the given settings, or those made from `options`."""
    if settings is None:
        return kind(**options)
    if options:
        raise InvalidInput("settings", type(settings).__name__, f"must be given alone, without {', '.join(options)}")
    if not isinstance(settings, kind):
        allowed = f"must be {kind.__name__}; or give options by name, such as `{_FIRST.get(kind, 'data')}=...`"
        raise InvalidInput("settings", type(settings).__name__, allowed)
    return settings


@_one_family()
def prepare(settings: PrepareSettings | None = None, **options: Any) -> PrepareReport:
    """Turn texts and instructions into training rows, and write them as a packed dataset and as a pickle.

    Args:
        settings: all options as one object, instead of keyword arguments.
        options: the options of `PrepareSettings` that differ from their defaults, such as `text`, `instructions`,
            `tokenizer`, `max_length` and `output`.

    Returns:
        The paths of the two layouts (`pickle`, `folder`), and what is in them.

    Raises:
        InvalidInput: an option or a source is wrong; nothing was written.
        Unreachable: a source or the tokenizer must be downloaded and can't be. It is an InvalidInput.
    """
    from indraquantum.data.prepare import prepare as run

    return run(_settings(PrepareSettings, settings, options))


@_one_family()
def capture(settings: CaptureSettings | None = None, **options: Any) -> CaptureReport:
    """Ask the teacher once about every position of a prepared dataset and store its signals.

    The same call resumes a stopped capture.

    Args:
        settings: all options as one object, instead of keyword arguments.
        options: the options of `CaptureSettings` that differ from their defaults, such as `data`, `teacher`, `output`,
            `draws` and `device`.

    Returns:
        The path of the signals, and statistics about them.

    Raises:
        InvalidInput: an option, the teacher or the dataset is wrong, or `output` holds other signals.
        Unreachable: the teacher must be downloaded and can't be. It is an InvalidInput.
    """
    from indraquantum.teacher.capture import capture as run

    return run(_settings(CaptureSettings, settings, options))


@_one_family()
def train(settings: TrainSettings | None = None, **options: Any) -> TrainReport:
    """Train IndraQuantumPhase2 by semantic distillation, or resume the run in the folder `output`.

    If `signals` holds no signals of a teacher yet, this function first asks the teacher, as `capture` does.
    `no_teacher=True` trains on cross-entropy alone. In the main thread, SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the
    run after the current step and a checkpoint.

    Args:
        settings: all options as one object, instead of keyword arguments.
        options: the options of `TrainSettings` that differ from their defaults, such as `data`, `signals`, `output`,
            `epochs`, `batch_tokens` and `device`.

    Returns:
        The paths of the last checkpoint and of the metrics, the number of steps, and the held-out cross-entropy of
        each source.

    Raises:
        InvalidInput: an option, the data or the signals are wrong, or `output` holds another run or is in use.
        TrainingStopped: the loss is not finite, or the model has collapsed and `on_collapse` is `stop`.
        TrainingInterrupted: a signal stopped the run after a checkpoint. It is a KeyboardInterrupt.
    """
    from indraquantum.training.loop import train as run

    settings = _settings(TrainSettings, settings, options)
    if settings.dry_run:
        raise InvalidInput("dry_run", True, "must be left out: the command `indra train --dry-run` prints its report")
    if settings.minutes is not None:
        from indraquantum.trials.budget import within_minutes

        settings = within_minutes(settings)
    return run(settings)


@_one_family()
def load(checkpoint: str | Path, **options: Any) -> Loaded:
    """Load a trained model with its tokenizer.

    Args:
        checkpoint: a checkpoint that `train` wrote, or a folder that `indra export` wrote.
        options: `device` (auto, cpu, cuda, mps), `threads` (0 leaves the choice to torch), and `weights` of a
            checkpoint: ema, the moving average; last; or auto, which takes the average if there is one.

    Returns:
        The tokenizer, the names of the aligned readouts, and the model twice with the same weights: `model`, an
        `IndraQuantumPhase2` for transformers, and `inference_model`, which loads and writes without transformers.

    Raises:
        InvalidInput: `checkpoint` is not one of these, or is damaged, or an option is wrong.
    """
    from indraquantum.device import choose_device
    from indraquantum.inference.load import load as run

    settings = LoadSettings(**options)
    return run(_path("checkpoint", checkpoint), choose_device(settings), settings.weights)


@_one_family()
def generate(model: Loaded | str | Path, prompt: str | None = None, **options: Any) -> GeneratedText:
    """Write text, and read from the model's own state how sure it was of each token.

    Args:
        model: what `load` returned, or the path of a checkpoint or exported folder, which is loaded for this text only.
        prompt: the text to continue. To ask a question instead, give `instruction` (and `input`) as options.
        options: those of `TestSettings`, such as `max_new_tokens`, `temperature`, `top_p`, `top_k` and `seed`.
            Equal seeds give equal text. `show_state=False` leaves the states out, which saves a pass.

    Returns:
        `text`, without the prompt, and `tokens`: for each its text, probability, confidence and uncertainty.

    Raises:
        InvalidInput: an option is wrong, or prompt and text together are longer than the model takes.
    """
    loading = {name: options.pop(name) for name in LoadSettings.model_fields if name in options}
    return _loaded(model, loading).generate(prompt, **options)


@_one_family()
def evaluate(model: Loaded | str | Path, settings: EvalSettings | None = None, **options: Any) -> Evaluation:
    """Measure a model on held-out text: how well it predicts, and what its state knows of the teacher.

    Args:
        model: what `load` returned, or the path of a checkpoint or an exported folder.
        settings: all options as one object, instead of keyword arguments.
        options: the options of `EvalSettings` that differ from their defaults: `data`, a prepared dataset, or `text`, a
            file; `split`, `signals`, `row_length`.

    Returns:
        The figures of each source and of all, and the alignment with the teacher if there are signals.

    Raises:
        InvalidInput: an option is wrong, or the dataset has another tokenizer than the model.
    """
    from indraquantum.inference.report import measure
    from indraquantum.kernels.measured import way_for
    from indraquantum.kernels.ways import using

    settings = _settings(EvalSettings, settings, options)
    if settings.json_file is not None:
        raise InvalidInput("json_file", settings.json_file, "must be left out: the figures are returned")
    given = settings.model_fields_set & LoadSettings.model_fields.keys()
    loaded = _loaded(model, {name: getattr(settings, name) for name in given})
    with using(way_for(loaded.inference_model.device)):
        return measure(loaded, settings, f"indraquantum.evaluate({str(loaded.path)!r})")


@_one_family()
def export(
    checkpoint: Loaded | str | Path, folder: str | Path, settings: ExportSettings | None = None, **options: Any
) -> ExportReport:
    """Write a trained model for other programs: transformers, llama.cpp, and what reads a Llama.

    Args:
        checkpoint: a checkpoint that `train` wrote, or what `load` returned for one, whose file is read again.
        folder: the folder to write; it must be new or empty.
        settings: all options in one object.
        options: or those of `ExportSettings` that differ from their defaults, such as `as_` (`transformers`, `llama`,
            `gguf`, `onnx` or `page`), `outtype` and `push`.

    Returns:
        The folder, a sentence that says how to use it, and the address if it was uploaded.

    Raises:
        InvalidInput: `checkpoint` is damaged, `folder` is not empty, the model has no such form, or the hub refused.
    """
    from indraquantum.inference.export import export_checkpoint as run

    checkpoint = getattr(checkpoint, "path", checkpoint)  # of what `load` returned
    return run(_path("checkpoint", checkpoint), _path("folder", folder), _settings(ExportSettings, settings, options))


def _path(name: str, value: Any) -> Path:
    """Return an argument that must be a path."""
    if not isinstance(value, str | os.PathLike):
        raise InvalidInput(name, type(value).__name__, "must be a path")
    return Path(value)


def _loaded(model: Loaded | str | Path, options: dict[str, Any]) -> Loaded:
    """Return `model`, which is loaded with `options` if it is a path."""
    if isinstance(model, str | Path):
        return load(model, **options)
    if options:
        name = next(iter(options))
        raise InvalidInput(name, options[name], "must be left out for a loaded model; give it to `load` instead")
    if not hasattr(model, "inference_model"):
        raise InvalidInput("model", type(model).__name__, "must be what `load` returns, or the path of a model")
    return model
