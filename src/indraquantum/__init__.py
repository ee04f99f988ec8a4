"""IndraQuantum phase 2: a small language model with a quantum projector, and the complete system that trains it.

    from indraquantum import prepare, capture, train, load, generate, evaluate, export

The names below are loaded when they are first used, because torch and transformers take seconds to import.

Importing the package tells transformers' Auto classes and pipelines about the model, whichever of the two packages is
imported first. Neither transformers nor torch is imported for that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

from indraquantum.lazy_names import lazy_names

if sys.platform == "win32":
    print("indra: error: IndraQuantum needs Linux or macOS; on Windows, install and run it in WSL 2", file=sys.stderr)
    raise SystemExit(2)  # instead of an ImportError of the first module that Windows lacks

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from indraquantum.api import capture as capture
    from indraquantum.api import evaluate as evaluate
    from indraquantum.api import export as export
    from indraquantum.api import generate as generate
    from indraquantum.api import load as load
    from indraquantum.api import prepare as prepare
    from indraquantum.api import train as train
    from indraquantum.config import CaptureSettings as CaptureSettings
    from indraquantum.config import EvalSettings as EvalSettings
    from indraquantum.config import ExportSettings as ExportSettings
    from indraquantum.config import LoadSettings as LoadSettings
    from indraquantum.config import PrepareSettings as PrepareSettings
    from indraquantum.config import TestSettings as TestSettings
    from indraquantum.config import TrainSettings as TrainSettings
    from indraquantum.data.prepare import PrepareReport as PrepareReport
    from indraquantum.errors import IndraError as IndraError
    from indraquantum.errors import InvalidInput as InvalidInput
    from indraquantum.errors import TrainingInterrupted as TrainingInterrupted
    from indraquantum.errors import TrainingStopped as TrainingStopped
    from indraquantum.errors import Unreachable as Unreachable
    from indraquantum.evaluation.figures import Evaluation as Evaluation
    from indraquantum.inference.export import ExportReport as ExportReport
    from indraquantum.inference.generate import GeneratedText as GeneratedText
    from indraquantum.inference.load import Loaded as Loaded
    from indraquantum.loss_v2 import LossTerms as LossTerms
    from indraquantum.loss_v2 import SemanticDistillationLoss as SemanticDistillationLoss
    from indraquantum.loss_v2 import TeacherSignals as TeacherSignals
    from indraquantum.model.configuration import IndraQuantumConfig as IndraQuantumConfig
    from indraquantum.model.modeling import IndraQuantumPhase2 as IndraQuantumPhase2
    from indraquantum.teacher.capture import CaptureReport as CaptureReport
    from indraquantum.teacher.collator import SignalCollator as SignalCollator
    from indraquantum.training.loop import TrainReport as TrainReport

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("capture", "evaluate", "export", "generate", "load", "prepare", "train"), "api"),
    **dict.fromkeys(("IndraError", "InvalidInput", "TrainingInterrupted", "TrainingStopped", "Unreachable"), "errors"),
    **dict.fromkeys(("IndraQuantumConfig", "IndraQuantumPhase2"), "model"),
    **dict.fromkeys(("LossTerms", "SemanticDistillationLoss", "TeacherSignals"), "loss_v2"),
    **{f"{kind}Settings": "config" for kind in ("Capture", "Eval", "Export", "Load", "Prepare", "Test", "Train")},
    "CaptureReport": "teacher.capture",
    "Evaluation": "evaluation.figures",
    "ExportReport": "inference.export",
    "GeneratedText": "inference.generate",
    "Loaded": "inference.load",
    "PrepareReport": "data.prepare",
    "SignalCollator": "teacher.collator",
    "TrainReport": "training.loop",
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(auto: ModuleType) -> None:
    """Tell transformers' Auto classes about the model as they know their own: by names, which cost no import."""
    auto.CONFIG_MAPPING_NAMES["indraquantum"] = "IndraQuantumConfig"
    sys.modules["transformers.models.indraquantum"] = importlib.import_module("indraquantum.model")


class _AutoFinder:
    """Finds the module of the Auto classes as Python does, and registers the model once it is loaded."""

    module = "transformers.models.auto.configuration_auto"

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == cls.module else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _AutoFinder.module in sys.modules:
    _register(sys.modules[_AutoFinder.module])
else:
    sys.meta_path.insert(0, _AutoFinder)
