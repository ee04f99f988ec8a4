"""Reads what a GGUF file says of itself: llama.cpp's format, which holds a model and its tokenizer in one file.

The package gguf does the reading. Tensors are not read here, only their names and types.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indraquantum.errors import UserError, optional_package, reason
from indraquantum.files import unreadable

SUFFIX = ".gguf"
INSTALL = "indraquantum[gguf]"
_MAGIC = b"GGUF"


class GgufFile(NamedTuple):
    """The metadata of a GGUF file."""

    path: Path
    metadata: dict[str, Any]  # llama.cpp's keys, such as general.architecture
    tensors: dict[str, str]  # the type of each tensor, such as Q4_1

    @property
    def architecture(self) -> str:
        """The name that llama.cpp gives to the model's architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def quantisation(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        kinds = sorted(self.tensors.values())
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def is_gguf(name: str | Path) -> bool:
    """Return whether a name is that of a GGUF file."""
    return Path(name).suffix.lower() == SUFFIX


def open_gguf(field: str, path: Path) -> GgufFile:
    """Read the metadata of the file at `path`; the same file is read once.

    Args:
        field: The option to name in an error.
        path: The file.

    Raises:
        UserError: the package gguf is missing, or the file is not a whole GGUF file of a model.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise unreadable(field, path, error) from None
    return _read(field, path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _read(field: str, path: Path, _changed: int, _bytes: int) -> GgufFile:
    with optional_package(field, path, "gguf", INSTALL):
        from gguf import GGUFReader
    try:
        with open(path, "rb") as file:
            begins = file.read(len(_MAGIC))
    except OSError as error:
        raise unreadable(field, path, error) from None
    if begins != _MAGIC:
        raise UserError(field, path, "must be a GGUF file; it does not begin as one")
    try:
        reader = GGUFReader(path)
        metadata = {name: entry.contents() for name, entry in reader.fields.items()}
        tensors = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as error:  # numpy and the package raise many kinds for bytes that are missing or wrong
        if "GGMLQuantizationType" in str(error):
            allowed = f"has weights of a type that the package gguf does not know ({reason(error)})"
        else:
            allowed = f"can't be read as a GGUF file; it is cut off or damaged ({reason(error)})"
        raise UserError(field, path, allowed) from None
    found = GgufFile(path, metadata, tensors)
    _check(field, found)
    return found


def _check(field: str, file: GgufFile) -> None:
    """Refuse a file that is not the whole of a model."""
    about = file.metadata
    if (parts := about.get("split.count", 1)) > 1:
        merge = "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
        part = about.get("split.no", 0) + 1
        raise UserError(field, file.path, f"is part {part} of {parts} of a model; join the parts with {merge}")
    if not isinstance(about.get("general.architecture"), str):
        raise UserError(field, file.path, "must name its architecture (general.architecture), but does not")
    if (kind := about.get("general.type", "model")) != "model":
        raise UserError(field, file.path, f"must hold a model, but holds a file of the type {kind}")


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Return the float32 values of one tensor of a file that `open_gguf` has read."""
    from gguf import GGUFReader, dequantize

    (tensor,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
