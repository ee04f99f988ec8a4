"""The model card (README.md) of an exported model, written from what the run has recorded.

A checkpoint knows its settings. `run.json` beside the metrics says where its data and signals were; their manifests say
what they hold, and the metrics have the figures. The card says what it could not find. No record says which texts a
stage with data of its own had, or the weights of --start-from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum import __version__
from indraquantum.config import ALPACA, WIKITEXT
from indraquantum.data.dataset_manifest import read_dataset_manifest
from indraquantum.data.padded import SOURCE as PICKLE
from indraquantum.errors import UserError
from indraquantum.files import combined_sha256
from indraquantum.inference.load import Loaded, WhichWeights
from indraquantum.metrics import METRICS_NAME, RECORD_NAME, read_record
from indraquantum.monitor.runs import evaluation_until
from indraquantum.progress import tell
from indraquantum.teacher.manifest import read_manifest, signals_beside
from indraquantum.training.checkpoint import Checkpoint

NON_COMMERCIAL = "cc-by-nc-4.0"
ASK = "Ask whoever trained the model before you use it commercially."
MANUAL = ("manual.txt", "questions.json")  # what the demo gives as --wikitext and --alpaca, in one folder
MANUAL_LICENCE = "Python's manual and docstrings: PSF licence"


class Public(NamedTuple):
    """A source that comes from the internet unless a path is given. It is in English."""

    given: str  # default of the option
    name: str  # on the hub
    title: str
    author: str
    licence: str


PUBLIC = {  # by the name of the option, which is also the source's name in the manifest
    "wikitext": Public(WIKITEXT, WIKITEXT, "WikiText-103", "from Wikipedia", "CC BY-SA 3.0 and GFDL"),
    "alpaca": Public(
        ALPACA, "tatsu-lab/alpaca", "Stanford Alpaca", "written by OpenAI's text-davinci-003",
        "CC BY-NC 4.0, so for non-commercial use only",
    ),
}  # fmt: skip
CITATION = """@software{indraquantum,
  title = {IndraQuantum: a small language model with a quantum projector, trained by semantic distillation},
  author = {{IndraQuantum developers}},
  year = {2026},
}"""


@dataclass(frozen=True)
class Exported:
    """What an exporter says about what it wrote."""

    use: str  # one line: how to use the folder
    example: str  # the same as code, in Markdown
    notes: tuple[str, ...] = ()  # what differs from the model in this package
    library: str = "transformers"  # as the hub calls it


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run."""

    steps: int
    tokens: int
    settings: Mapping[str, Any]  # what decided it
    sources: tuple[Mapping[str, Any], ...] = ()  # of the dataset's manifest
    options: Mapping[str, Any] = field(default_factory=dict)  # of `indra prepare`
    teacher: str | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)  # nats per token
    measured_at: int = 0  # the step of held_out
    missing: tuple[str, ...] = ()  # what was not found

    @classmethod
    def find(cls, path: Path, checkpoint: Checkpoint, logs: Path, weights: WhichWeights = "auto") -> RunFacts:
        """Gather what is recorded about the run of the checkpoint at `path`; what is missing is no error.

        Args:
            path: the checkpoint's path, which tells its run.
            checkpoint: what it holds.
            logs: the folder of all runs' logs.
            weights: which of its weights the card is about. If a run has a moving average, the figures are of that.
        """
        known = {"steps": checkpoint.step, "tokens": checkpoint.tokens, "settings": checkpoint.settings}
        folder, signals = logs / path.resolve().parent.name, _signals(checkpoint.settings)
        try:
            record = read_record(folder)
            if record is None or Path(record.get("checkpoints", "")).resolve() != path.resolve().parent:
                raise UserError("--logs", folder, f"holds no {RECORD_NAME} of this run")
            if weights != "last" or not checkpoint.average:
                known["measured_at"], known["held_out"] = _evaluation(folder, checkpoint.step)
        except UserError as error:
            tell(f"The model card says less: {error}.")
            teacher = ["its teacher"] if signals else []
            return cls(**known, missing=("its data", *teacher, "its figures"))
        missing, settings = [] if known.get("held_out") else ["its figures"], record["settings"] or {}
        if (manifest := _manifest(Path(settings.get("data", "")), checkpoint.settings.get("data"))) is not None:
            known |= {"sources": tuple(manifest["sources"]), "options": manifest["options"]}
        else:
            missing.append("its data")
        if signals:
            known["teacher"] = _teacher(settings, signals)
            missing += [] if known["teacher"] else ["its teacher"]
        return cls(**known, missing=tuple(missing))

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources, from the manifest or from the figures."""
        names = [source["name"] for source in self.sources] or self.held_out
        return tuple(name for name in names if name not in ("all", PICKLE))  # a pickle does not tell its sources

    @property
    def other_data(self) -> tuple[str, ...]:
        """What the model learned from besides the data of the run. No record says which texts these are."""
        own, stages = self.settings.get("data"), self.settings.get("stages", {})
        others = [f"the data of stage {name}" for name, stage in stages.items() if stage.get("data", own) != own]
        return (*others, *(["the data of the weights that it started from"] if self.settings.get("start_from") else []))

    @property
    def is_manual(self) -> bool:
        """Whether the demo's corpus, Python's manual, was given in the place of WikiText and Alpaca."""
        paths = [Path(str(self.options.get(name))) for name in PUBLIC]
        return tuple(path.name for path in paths) == MANUAL and len({path.parent for path in paths}) == 1

    def is_public(self, source: str) -> bool:
        """Return whether `source` is WikiText or Alpaca itself, not a file that was given in its place."""
        given = str(self.options.get(source))  # perhaps with a revision or checksum
        return source in PUBLIC and source in self.source_names and given.startswith(PUBLIC[source].given)

    def may_be(self, option: str, source: str) -> bool:
        """Return whether `source` may be WikiText or Alpaca (`option`): a file of that name, or given in its place."""
        return option in source.lower() and not (self.is_manual and source == option)

    @property
    def may_have_alpaca(self) -> bool:
        """Whether Alpaca was, or may have been, among the recorded data."""
        return any(self.may_be("alpaca", name) for name in self.source_names)

    @property
    def non_commercial(self) -> bool:
        """Whether Alpaca was among the data, or may have been."""
        return self.may_have_alpaca or not self.source_names or bool(self.other_data)


def _evaluation(folder: Path, step: int) -> tuple[int, Mapping[str, float]]:
    """Return the step and the figures of the run's last evaluation until `step`; no figures if they can't be read."""
    try:
        return evaluation_until(folder / METRICS_NAME, step)
    except (UserError, OSError):
        return 0, {}


def _manifest(folder: Path, content_sha256: str | None) -> dict[str, Any] | None:
    """Return the manifest of the dataset in `folder`, if it is still the one that the run saw."""
    try:
        manifest = read_dataset_manifest("--data", folder)
    except UserError:
        return None
    return manifest if manifest["content_sha256"] == content_sha256 else None


def _signals(settings: Mapping[str, Any]) -> set[str]:
    """Return the SHA-256 of all signals that a run learned from. A stage with data of its own has others."""
    parts = (settings, *settings.get("stages", {}).values())
    return {part["signals"] for part in parts if part.get("signals")}


def _teacher(settings: Mapping[str, Any], signals: set[str]) -> str | None:
    """Return the teacher of `signals`, if the run's folder still holds these, and the run had no others."""
    folder = Path(settings.get("signals") or signals_beside(Path(settings.get("data", ""))))
    try:
        manifest = read_manifest("--signals", folder)
    except UserError:
        return None
    return manifest.teacher if signals == {combined_sha256(entry.sha256 for entry in manifest.shards)} else None


def model_card(name: str, loaded: Loaded, facts: RunFacts, exported: Exported) -> str:
    """Return the text of README.md for the model called `name`."""
    header = {
        "library_name": exported.library,
        "pipeline_tag": "text-generation",
        "license": NON_COMMERCIAL if facts.non_commercial else "other",
        "language": _languages(facts),
        "tags": ["indraquantum", "distillation", *(["non-commercial"] if facts.non_commercial else [])],
        "datasets": list(_hub_datasets(facts).values()),
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value),
        "---",
        "",
        f"# {name}",
        "",
        f"{_about(loaded)} It was written by `indra export`, IndraQuantum {__version__}.",
        "",
        "## Use it",
        "",
        exported.example,
        "",
        *(f"- {note}" for note in exported.notes),
        *([""] if exported.notes else []),
        "## Data and licence",
        "",
        *_data(facts),
        "",
        "## Training",
        "",
        *_training(loaded, facts),
        "",
        "## Figures",
        "",
        *_figures(facts),
        "",
        "## Limits",
        "",
        "- The model is small. It writes fluent text with wrong facts, and repeats what its data say, biases included.",
        "- Use it for research and teaching, not for advice or decisions.",
        f"- It was trained on rows of {_row_length(facts)} tokens; further back its memory is untested.",
        "- Its language is that of its data.",
        *([f"- This card does not know {_list(facts.missing)}: the records were not found."] if facts.missing else []),
        "",
        "## How to cite",
        "",
        "```bibtex",
        CITATION,
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _about(loaded: Loaded) -> str:
    shape = loaded.inference_model.config
    parameters = sum(parameter.numel() for parameter in loaded.inference_model.parameters())
    return (
        f"A small language model of {parameters:,} parameters ({shape.num_hidden_layers} layers of width "
        f"{shape.hidden_size}, {shape.vocab_size:,} tokens with embeddings of width {shape.d_model}, projector "
        f"{shape.projector}), trained from scratch."
    )


def _data(facts: RunFacts) -> list[str]:
    lines = [
        f"- {source['name']}: {source.get('documents') or 0:,} documents, {source.get('tokens') or 0:,} tokens. "
        f"{_licence(facts, source['name'])}."
        for source in facts.sources
    ] or [f"- {name}. {_licence(facts, name)}." for name in facts.source_names]
    if not lines:
        lines = [f"- The data are not recorded here. {ASK}"]
    if facts.other_data:
        lines.append(f"- Not recorded here: {_list(facts.other_data)}. {ASK}")
    if facts.is_public("alpaca"):
        lines += ["", "Alpaca was among the data, so this model is for **non-commercial** use only."]
    elif facts.may_have_alpaca:
        doubt = "Alpaca may have been among the data. Unless you know that it was not, this model is for"
        lines += ["", f"{doubt} **non-commercial** use only."]
    if dataset := facts.settings.get("data"):
        lines += ["", f"SHA-256 of the prepared dataset: `{dataset}`."]
    return lines


def _licence(facts: RunFacts, source: str) -> str:
    if facts.is_manual and source in PUBLIC:
        return MANUAL_LICENCE
    for option, public in PUBLIC.items():
        if facts.is_public(source) and source == option:
            return f"{public.title}, {public.author}: {public.licence}"
        if facts.may_be(option, source):
            given = f"Given as a file or an address with --{option}. " if option == source in facts.options else ""
            return f"{given}If it is {public.title}, its licence is {public.licence}"
    return "Its licence is the one of that text"


def _hub_datasets(facts: RunFacts) -> dict[str, str]:
    """Return the sources that came from the hub, with their names there."""
    return {source: public.name for source, public in PUBLIC.items() if facts.is_public(source)}


def _languages(facts: RunFacts) -> list[str]:
    """Return English if all data are known to be English. Of other texts nobody knows the language."""
    known = facts.source_names and not facts.other_data and set(facts.source_names) <= set(_hub_datasets(facts))
    return ["en"] if known else []


def _training(loaded: Loaded, facts: RunFacts) -> list[str]:
    stages = ", ".join(facts.settings.get("stages", {}))
    aligned = _list(sorted(loaded.aligned or ())) or "none"
    if facts.teacher is not None:
        teacher = f"{facts.teacher}, asked once; its signals are stored"
    else:
        teacher = "not recorded here" if _signals(facts.settings) else "none, cross-entropy alone"
    before = ["- It started from other weights, whose training is not recorded here."]
    return [
        *(before if facts.settings.get("start_from") else []),
        f"- Steps: {facts.steps:,}, {facts.tokens:,} tokens, seed {facts.settings.get('seed', 'unknown')}.",
        f"- Stages of the strategy: {stages or 'not recorded'}.",
        f"- Teacher: {teacher}.",
        f"- Readouts that the teacher aligned: {aligned}.",
    ]


def _figures(facts: RunFacts) -> list[str]:
    if not facts.held_out:
        return ["Not recorded here. `indra eval` measures a checkpoint."]
    rows = [f"| {name} | {nats:.3f} |" for name, nats in facts.held_out.items()]
    about = "Cross-entropy of held-out text:"
    if facts.measured_at != facts.steps:
        about = (
            f"Cross-entropy of held-out text at step {facts.measured_at:,}, before this model's step {facts.steps:,}:"
        )
    return [about, "", "| source | nats per token |", "|---|---|", *rows]


def _row_length(facts: RunFacts) -> str:
    return f"{facts.options['max_length']:,}" if "max_length" in facts.options else "a few hundred"


def _list(names: Any) -> str:
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last
