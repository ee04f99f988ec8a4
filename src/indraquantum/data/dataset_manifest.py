"""The manifest.json of a prepared dataset: every field with its type and range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from indraquantum.errors import UserError, first_problem
from indraquantum.files import read_json

FORMAT = "indraquantum-dataset"
FORMAT_VERSION = 3
READABLE = (2, 3)  # version 2 has no test split
MOST_SOURCES = 256  # their numbers are uint8
MOST_TOKENS = 1 << 32  # ids are uint32 at most


def _plain_name(name: str) -> str:
    """Check that a name stays inside the folder."""
    if "\\" in name or not all(name.split("/")) or {".", ".."} & set(name.split("/")):
        raise ValueError("must be the name of a file inside the folder")
    return name


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_FileName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain_name)]


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)  # a later program may add fields


class FileFacts(_Page):
    """What the manifest says about a file."""

    sha256: _Sha256
    bytes: _Count


class SourceFacts(_Page):
    """What the manifest says about a source. Only its name is used; the rest informs the reader."""

    name: str = Field(min_length=1)
    available: _Count | None = None
    duplicates: _Count | None = None
    near_duplicates: _Count | None = None
    documents: _Count | None = None
    validation_documents: _Count | None = None
    test_documents: _Count | None = None
    tokens: _Count | None = None
    unused_fields: dict[str, _Count] = {}
    left_out: dict[str, _Count] = {}
    notes: list[str] = []


class LargestIds(_Page):
    """The largest token id of each split."""

    train: _Count
    validation: _Count
    test: _Count = 0  # may be missing if there is no such split, but not null


class DatasetManifest(_Page):
    """The whole manifest."""

    format: Literal["indraquantum-dataset"]
    format_version: Literal[2, 3]
    row_length: int = Field(ge=1, le=1 << 31)
    versions: dict[str, str]
    vocabulary_size: int = Field(ge=1, le=MOST_TOKENS)
    bos_id: _Count | None
    """The token that begins each document; None if documents begin with their text."""
    eos_id: _Count
    tokenizer_sha256: _Sha256
    content_sha256: _Sha256
    options: dict[str, Any]
    sources: list[SourceFacts] = Field(min_length=1, max_length=MOST_SOURCES)
    largest_ids: LargestIds
    files: dict[_FileName, FileFacts]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, number in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if number is not None and number >= self.vocabulary_size:
                raise ValueError(f"{name} must be below vocabulary_size {self.vocabulary_size}, not {number}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError("sources must have different names")
        return self


def is_dataset(folder: Path) -> bool:
    """Whether `folder` holds a prepared dataset of any version."""
    try:
        manifest = read_json("", folder / "manifest.json")
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def read_dataset_manifest(field: str, folder: Path) -> dict[str, Any]:
    """Read and check the manifest of the dataset in `folder`; return it unchanged.

    Raises:
        UserError: it is missing, has another format or version, or has a field that is missing or wrong.
    """
    path = folder / "manifest.json"
    manifest = read_json(field, path) if path.is_file() else None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            field, folder, f"must be a prepared dataset: a folder with a manifest.json of format {FORMAT!r}"
        )
    if (found := manifest.get("format_version")) not in READABLE:
        allowed = " and ".join(map(str, READABLE))
        raise UserError(field, folder, f"has format version {found}; this program reads {allowed}")
    try:
        DatasetManifest.model_validate(manifest)
    except ValidationError as error:
        first = first_problem(error)
        where = ".".join(map(str, first.place))
        value = "" if isinstance(first.value, dict) else f" {str(first.value)[:60]!r}"
        raise UserError(field, path, f"is damaged: {where}{value}{': ' if where else ''}{first.allowed}") from None
    return manifest
