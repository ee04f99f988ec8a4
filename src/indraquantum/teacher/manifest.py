"""The page that pins stored signals to what they belong to: teacher, tokenizer, dataset, temperature, draws, seed.

`manifest.json` is rewritten after each shard, so that a capture that was stopped goes on where it was, and training
can distil from what there is. Two captures with the same identity give the same bytes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from indraquantum.errors import UserError
from indraquantum.files import SEAL, read_json, write_manifest_json

FORMAT = "indraquantum-signals"
FORMAT_VERSION = 3  # 2 added top-k, full and served signals, 3 the rows of a batch; older ones are read as they are
_READABLE = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
_SHA256 = r"^[0-9a-f]{64}$"


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Identity(_Page):
    """What decides every bit of the signals; all must agree for a capture to go on."""

    kind: Literal["sampled", "topk", "full"] = "sampled"
    """Random draws (unbiased), the likeliest tokens (biased), or every token (exact, large)."""
    served: bool = False
    """From a server: entropy is only bounded, and that teacher and tokenizer are what they say is not checked."""
    teacher_sha256: str = Field(pattern=_SHA256)
    tokenizer_sha256: str = Field(pattern=_SHA256)
    dataset_sha256: str = Field(pattern=_SHA256)
    vocabulary_size: int = Field(ge=2)
    temperature: float = Field(gt=0)
    draws: int | None = Field(default=None, ge=1, le=65_535)
    """Tokens drawn; None unless the kind is sampled."""
    top_k: int | None = Field(default=None, ge=1, le=65_535)
    """Tokens kept; None unless the kind is topk."""
    seed: int = Field(ge=0, lt=2**63)
    rows_per_shard: int = Field(ge=1)

    @property
    def is_truncated(self) -> bool:
        """Whether a position's probabilities are the teacher's own but sum to less than 1: the rest is not stored."""
        return self.kind == "topk"

    @model_validator(mode="after")
    def _amounts_fit_the_kind(self) -> Self:
        if (self.draws is not None, self.top_k is not None) != (self.kind == "sampled", self.kind == "topk"):
            raise ValueError(f"draws and top_k don't fit the kind {self.kind}")
        return self


class Sums(_Page):
    """Totals over a shard's positions, so that statistics need no second pass and don't depend on stops."""

    ids: int = Field(ge=0)
    entropy_nats: float | None
    entropy_bounds_nats: tuple[float, float] | None = Field(default=None, strict=False)
    """In place of `entropy_nats` where a server only bounds it."""
    confidence: float
    labels: int = Field(ge=0)
    label_logprob_nats: float


class ShardEntry(_Page):
    """One shard: the positions of the rows `rows[0]` to `rows[1] - 1` of a split."""

    file: str = Field(pattern=r"^[a-z0-9-]+\.safetensors$")
    split: Literal["train", "validation"]
    rows: tuple[int, int] = Field(strict=False)
    positions: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)
    precision: str
    """Number format that the teacher computed in; another device may continue a capture."""
    sums: Sums

    @model_validator(mode="after")
    def _rows_are_a_range(self) -> Self:
        if not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} must be the first row, from 0 on, and one past the last")
        return self


class Statistics(_Page):
    """What the signals are like, over all shards; None where there is nothing to average."""

    positions: int
    mean_ids: float | None
    mean_entropy_nats: float | None
    mean_entropy_bounds_nats: tuple[float, float] | None = Field(default=None, strict=False)
    mean_confidence: float | None
    bytes_per_token: float | None
    teacher_cross_entropy: dict[str, float]
    """Of the actual next tokens, nats, per split: the first figure to look at."""


class Manifest(Identity):
    """The whole page."""

    format: Literal["indraquantum-signals"] = FORMAT
    format_version: int = FORMAT_VERSION
    teacher: str
    teacher_revision: str | None
    batch_rows: int | None = Field(default=None, ge=1)
    """Rows that the teacher read at once, which decide the last bits; None before version 3."""
    shards: tuple[ShardEntry, ...] = Field(strict=False)
    complete: bool
    statistics: Statistics

    @model_validator(mode="after")
    def _shards_lie_apart(self) -> Self:
        ordered = sorted(self.shards, key=lambda entry: (entry.split, entry.rows))
        for one, other in pairwise(ordered):
            if one.split == other.split and other.rows[0] < one.rows[1]:
                raise ValueError(f"shards {one.file} and {other.file} both have rows from {other.rows[0]} on")
        files = [entry.file for entry in ordered]
        if len(set(files)) < len(files):
            raise ValueError("two shards are in one file")
        return self

    @property
    def identity(self) -> Identity:
        """The part that must agree."""
        return Identity(**{name: getattr(self, name) for name in Identity.model_fields})


def statistics_of(shards: tuple[ShardEntry, ...]) -> Statistics:
    """Average the shards' totals."""
    positions = sum(shard.positions for shard in shards)

    def mean(total: float) -> float | None:
        return total / positions if positions else None

    exact = [shard.sums.entropy_nats for shard in shards if shard.sums.entropy_nats is not None]
    bounds = [shard.sums.entropy_bounds_nats for shard in shards if shard.sums.entropy_bounds_nats is not None]

    cross_entropy = {}
    for split in ("train", "validation"):
        sums = [shard.sums for shard in shards if shard.split == split]
        if labels := sum(part.labels for part in sums):
            cross_entropy[split] = -sum(part.label_logprob_nats for part in sums) / labels
    return Statistics(
        positions=positions,
        mean_ids=mean(sum(shard.sums.ids for shard in shards)),
        mean_entropy_nats=mean(sum(exact)) if exact else None,
        mean_entropy_bounds_nats=tuple(sum(side) / positions for side in zip(*bounds, strict=True)) if bounds else None,
        mean_confidence=mean(sum(shard.sums.confidence for shard in shards)),
        bytes_per_token=mean(sum(shard.bytes for shard in shards)),
        teacher_cross_entropy=cross_entropy,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the page in place, atomically."""
    fields = manifest.model_dump(mode="json")
    first = {name: fields.pop(name) for name in ("format", "format_version", "teacher", "teacher_revision")}
    write_manifest_json(folder / MANIFEST_NAME, first | fields)


def read_manifest(field: str, folder: Path) -> Manifest:
    """Read and check the page.

    Args:
        field: the option to name in an error.
        folder: the folder of the signals.

    Raises:
        UserError: missing, not a manifest of signals, of a later version, or malformed.
    """
    path = folder / MANIFEST_NAME
    value = read_json(field, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(field, path, f"must be the manifest of teacher signals (format {FORMAT})")
    if (version := value.get("format_version")) not in _READABLE:
        raise UserError(field, path, f"must have format_version {FORMAT_VERSION} or lower, not {version!r}")
    value.pop(SEAL, None)
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}." for part in first["loc"])
        raise UserError(field, path, f"is damaged: {where[:-1]}{': ' * bool(where)}{first['msg']}") from None
