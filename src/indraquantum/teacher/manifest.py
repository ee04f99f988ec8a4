"""The manifest.json of stored signals: the teacher, tokenizer, dataset, temperature, draws and seed they belong to.

It is rewritten after each shard, so that a stopped capture can be resumed, and training can use the signals that are
there. Two captures with the same identity give the same bytes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from indraquantum.errors import UserError, first_problem
from indraquantum.files import SEAL, read_json, write_manifest_json

FORMAT = "indraquantum-signals"
# 2 added top-k, full and served signals, 3 the rows of a batch, 4 the source of a GGUF file; all are read.
FORMAT_VERSION = 4
_READABLE = (1, 2, 3, 4)
MANIFEST_NAME = "manifest.json"
_SHA256 = r"^[0-9a-f]{64}$"


def signals_beside(data: Path) -> Path:
    """Return the folder of the signals of the dataset at `data`, if no other is named."""
    return data.parent / "teacher_signals"


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Identity(_Page):
    """Everything that decides the signals. A capture is resumed only if all of it agrees."""

    kind: Literal["sampled", "topk", "full"] = "sampled"
    """Random draws (unbiased), the likeliest tokens (biased), or every token (exact, large)."""
    served: bool = False
    """From a server: the entropy is only bounded, and nothing checks that teacher and tokenizer are the ones named."""
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
        """Whether only a part of each position's probability is stored."""
        return self.kind == "topk"

    @model_validator(mode="after")
    def _amounts_fit_the_kind(self) -> Self:
        if (self.draws is not None, self.top_k is not None) != (self.kind == "sampled", self.kind == "topk"):
            raise ValueError(f"draws and top_k don't fit the kind {self.kind}")
        return self


class Sums(_Page):
    """Totals over a shard's positions, from which the statistics are computed without reading the shard."""

    ids: int = Field(ge=0)
    entropy_nats: float | None
    entropy_bounds_nats: tuple[float, float] | None = Field(default=None, strict=False)
    """The lower and upper bound, instead of `entropy_nats`, if a server only bounds it."""
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
    """The number format in which the teacher computed. Earlier versions could mix two, as in bfloat16+float32."""
    sums: Sums

    @model_validator(mode="after")
    def _rows_are_a_range(self) -> Self:
        if not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} must be the first row, from 0 on, and one past the last")
        return self


class Statistics(_Page):
    """Averages over all shards; None if there is nothing to average."""

    positions: int
    mean_ids: float | None
    mean_entropy_nats: float | None
    mean_entropy_bounds_nats: tuple[float, float] | None = Field(default=None, strict=False)
    mean_confidence: float | None
    bytes_per_token: float | None
    teacher_cross_entropy: dict[str, float]
    """The teacher's cross-entropy on the actual next tokens of each split, in nats. Look at this figure first."""


class TeacherSource(_Page):
    """What a teacher's GGUF file says of itself."""

    format: Literal["gguf"] = "gguf"
    architecture: str
    quantisation: dict[str, int]
    """How many tensors there are of each type, such as Q4_1. They were turned into floats before they were used."""
    facts: dict[str, str]
    """Its entries of the kind general.*, such as name, organization, license and base models."""


class Agreement(_Page):
    """How mixed precision compared with float32 on held-out positions before the first row was captured."""

    positions: int = Field(ge=1)
    kl_nats: float
    """Mean KL divergence of mixed precision's distributions from float32's."""
    largest_kl_nats: float
    entropy_difference_nats: float
    """Mean entropy in mixed precision minus the mean entropy in float32."""
    speedup: float = Field(gt=0)
    """CPU seconds of float32 divided by those of mixed precision."""


class Manifest(Identity):
    """The whole manifest."""

    format: Literal["indraquantum-signals"] = FORMAT
    format_version: int = FORMAT_VERSION
    teacher: str
    teacher_revision: str | None
    teacher_source: TeacherSource | None = None
    """Only for a GGUF file."""
    batch_rows: int | None = Field(default=None, ge=1)
    """Rows that the teacher read at once, which decides the last bits; None before version 3."""
    precision: str | None = None
    """The number format in which the teacher computes: float32, mixed, bfloat16 or float16. None before version 4, and
    for a server."""
    agreement: Agreement | None = None
    """The measurement by which auto chose the precision; None if none was needed."""
    shards: tuple[ShardEntry, ...] = Field(strict=False)
    complete: bool
    statistics: Statistics

    @model_validator(mode="after")
    def _shards_lie_apart(self) -> Self:
        ordered = sorted(self.shards, key=lambda entry: (entry.split, entry.rows))
        for one, other in pairwise(ordered):
            if one.split == other.split and other.rows[0] < one.rows[1]:
                raise ValueError(f"shards {one.file} and {other.file} both hold row {other.rows[0]}")
        files = [entry.file for entry in ordered]
        if len(set(files)) < len(files):
            raise ValueError("two shards name the same file")
        return self

    @property
    def known_precision(self) -> str | None:
        """The number format of the signals; None if no shard tells it, or an earlier version mixed several."""
        formats = {entry.precision for entry in self.shards}
        only = formats.pop() if len(formats) == 1 else None
        return self.precision or (None if only and "+" in only else only)


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
    """Write the manifest atomically."""
    fields = manifest.model_dump(mode="json")
    names = ("format", "format_version", "teacher", "teacher_revision", "teacher_source")
    first = {name: fields.pop(name) for name in names}
    write_manifest_json(folder / MANIFEST_NAME, first | fields)


def read_manifest(field: str, folder: Path) -> Manifest:
    """Read and check the manifest.

    Args:
        field: the option to name in an error.
        folder: the folder of the signals.

    Raises:
        UserError: it is missing, not a manifest of signals, of a later version, or damaged.
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
        first = first_problem(error)
        where = ".".join(map(str, first.place))
        raise UserError(field, path, f"is damaged: {where}{': ' if where else ''}{first.allowed}") from None
