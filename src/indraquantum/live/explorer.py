"""Answers the state explorer of the page. torch is imported when it is first used, and models stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indraquantum.config import MonitorSettings, TestSettings
from indraquantum.errors import UserError
from indraquantum.live.details import checkpoints_of
from indraquantum.live.server import Query, Refused, whole_number
from indraquantum.live.watched import Watched
from indraquantum.metrics import read_record
from indraquantum.teacher.manifest import MANIFEST_NAME, signals_beside

if TYPE_CHECKING:
    from indraquantum.inference.load import Loaded

MOST_MODELS = 2
MOST_NEW_TOKENS = 256
MOST_CHARACTERS = 20_000  # of a prompt
OPTIONS = ("prompt", "instruction", "input", "max_new_tokens", "temperature", "top_p", "top_k", "seed")


class Explorer:
    """Loads checkpoints of the watched runs and looks inside their states, for one request at a time."""

    def __init__(self, watched: Watched, settings: MonitorSettings) -> None:
        self._watched, self._settings = watched, settings
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[Any, ...], Loaded] = OrderedDict()

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        """Continue a prompt with a checkpoint."""
        settings = TestSettings(**{name: body[name] for name in OPTIONS if body.get(name) is not None})
        for name in ("prompt", "instruction", "input"):
            if len(getattr(settings, name) or "") > MOST_CHARACTERS:
                raise UserError(name, "a long text", f"must have at most {MOST_CHARACTERS:,} characters")
        if settings.max_new_tokens > MOST_NEW_TOKENS:
            raise UserError("max_new_tokens", settings.max_new_tokens, f"must be at most {MOST_NEW_TOKENS} here")
        with self._lock:
            from indraquantum.inference.explore import written

            return written(self._model(body.get("run"), body.get("checkpoint")), settings)

    def row(self, body: dict[str, Any]) -> dict[str, Any]:
        """Read a held-out row of the run's own data."""
        row = body.get("row")
        if type(row) is not int:
            raise UserError("row", row, "must be a whole number")
        with self._lock:
            from indraquantum.data.dataset import open_dataset
            from indraquantum.data.same_tokenizer import require_same_tokenizer
            from indraquantum.inference.explore import held_out_row
            from indraquantum.teacher.signals import open_signals

            loaded, settings = self._model(body.get("run"), body.get("checkpoint")), self._run_settings(body.get("run"))
            data = _path(settings, "data")
            if data is None or not data.exists():
                where = "must be there; start `indra monitor` in the folder in which you trained"
                raise UserError("data", data or "nothing", where)
            dataset = open_dataset("data", data, settings.get("tokenizer"))
            ours, theirs = loaded.tokenizer, dataset.tokenizer
            require_same_tokenizer("data", data, "must have the checkpoint's tokenizer", ours, theirs)
            folder = _path(settings, "signals") or signals_beside(data)
            signals = open_signals("signals", folder, dataset) if (folder / MANIFEST_NAME).is_file() else None
            return {"rows": dataset.validation.num_rows, **held_out_row(loaded, dataset.validation, row, signals)}

    def vocabulary(self, query: Query) -> dict[str, Any]:
        """Return the vocabulary as a map; with `texts=1` also the tokens themselves."""
        first = {name: values[0] for name, values in query.items()}
        dimension = whole_number("dimension", first["dimension"]) if first.get("dimension") else None
        with self._lock:
            from indraquantum.inference.explore import token_name, vocabulary

            loaded = self._model(first.get("run"), first.get("checkpoint"))
            found = vocabulary(loaded, dimension)
            if first.get("texts"):
                found["texts"] = [token_name(loaded.tokenizer, token) for token in range(len(found["phase"]))]
            return found

    def _run_settings(self, run: object) -> dict[str, Any]:
        return (read_record(self._watched.path(str(run)).parent) or {}).get("settings") or {}

    def _model(self, run: object, name: object) -> Loaded:
        """Return the model of a checkpoint that is in the list of its run.

        Raises:
            Refused: there is no such checkpoint.
            UserError: it can't be loaded.
        """
        record = read_record(self._watched.path(str(run)).parent) or {}
        path = next((path for path in checkpoints_of(record) if path.name == name), None)
        if path is None:
            raise Refused(404, "there is no such checkpoint; training may have removed it")
        from indraquantum.device import choose_device
        from indraquantum.inference.load import load

        about = path.stat()
        key = (path, about.st_mtime_ns, about.st_size)
        if key not in self._models:
            while len(self._models) >= MOST_MODELS:
                self._models.popitem(last=False)
            self._models[key] = load(path, choose_device(self._settings))
        self._models.move_to_end(key)
        return self._models[key]


def _path(settings: dict[str, Any], name: str) -> Path | None:
    value = settings.get(name)
    return Path(value) if isinstance(value, str) and "\0" not in value else None
