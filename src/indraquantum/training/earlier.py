"""What earlier versions of the program did where an option did not exist yet, or had another default.

A run that one of them began resumes with the same command: options that the command does not give keep their value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from indraquantum.config import Settings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.training.checkpoint import DamagedCheckpoint, load_checkpoint

# What the program did before it had an option, for options whose default is something else.
BEFORE_THE_OPTION = {
    "tail": "none",
    "softmax": "exact",
    "bias_start": "zeros",
    "table_start": "normal",
    "residual": False,
    "residual_head": "same",
    "row_order": 1,
    "precision": "float32",
    "objective_precision": "float32",
    "attention_precision": "layers",
}
# Options whose default is another one than when some runs began.
CHANGED_DEFAULTS = ("table_rate", "projector_rate", "bias_start", "table_start", "precision")
# The former defaults of options that decide the shape of a model.
FORMER_SHAPE = {"d_model": 128, "mlp_width": 688, "residual": False, "residual_head": "same"}


def with_defaults(
    then: Mapping[str, Any], names: Iterable[str], options: type[Settings] = TrainSettings
) -> dict[str, Any]:
    """Return what decided an earlier run, with a value for each option in `names` that is newer than the run.

    This value is the option's default, or what BEFORE_THE_OPTION says. Where an earlier run left the width of its
    states to the default, it was that of the table.
    """
    defaults = {name: field.default for name, field in options.model_fields.items()} | BEFORE_THE_OPTION
    known = {name: defaults[name] for name in names if name in defaults} | dict(then)
    if known.get("projector", "none") != "none" and known.get("state_width", 0) is None:
        known["state_width"] = known["d_model"]
    return known


def with_former_shape(settings: TrainSettings) -> TrainSettings:
    """Return `settings` with the shape of the run that they resume, where it is a former default and not given.

    A checkpoint that can't be read changes nothing: what resumes from it reports it.
    """
    try:
        before = settings_of_checkpoint(settings)
    except (UserError, OSError):  # OSError: another run, which holds the folder, has removed it
        return settings
    if before is None:
        return settings
    then = with_defaults(before, [*FORMER_SHAPE, "state_width"])
    former = FORMER_SHAPE | {"state_width": then.get("d_model")}
    free = former.keys() - settings.model_fields_set
    return settings.model_copy(update={name: former[name] for name in free if then.get(name) == former[name]})


def settings_of_checkpoint(settings: TrainSettings) -> dict[str, Any] | None:
    """Return what decides the run of the checkpoint to resume from, or of one of the same run; None without one."""
    if settings.resume == "never":
        return None
    if settings.resume != "auto":
        path = Path(settings.resume)
        return load_checkpoint("--resume", path).settings if path.is_file() else None
    there = settings.output.glob("checkpoint_v4_*.pt")
    for path in sorted(there, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(DamagedCheckpoint):  # automatic resume skips it too
            return load_checkpoint("--output", path).settings
    return None
