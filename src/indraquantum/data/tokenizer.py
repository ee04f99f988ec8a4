"""The tokenizer as this project uses it: EOS ends a document, BOS begins it if the tokenizer has one, text stays text.

No text becomes a control token, whatever it spells.

It wraps a `tokenizers.Tokenizer`, because that is what both training (`tokenizer.json` in every prepared folder) and
speed (`encode_batch`, all cores) want; transformers' classes add nothing that is used here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from indraquantum.data import sentencepiece_model
from indraquantum.data.control_tokens import (
    CONFIG,
    MAP,
    Start,
    choose_control_tokens,
    read_stated,
)
from indraquantum.data.same_tokenizer import say_difference
from indraquantum.errors import UserError
from indraquantum.files import NOT_ITS_SUM, damaged_file, read_json, sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
FILES = [JSON_FILE, CONFIG, MAP, SENTENCEPIECE_FILE]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
UNSEEN = "a \u0378"  # a code point that stands for no character: vocabularies lack it
REMEDY = "put tokenizer.json and tokenizer_config.json into a folder and give it with --tokenizer FOLDER"


class TextTokenizer:
    """A tokenizer with its control tokens; `require_same_tokenizer` tells whether two of them are the same."""

    def __init__(self, backend: Tokenizer | Callable[[], Tokenizer], bos_id: int | None, eos_id: int) -> None:
        """Wrap a tokenizer.

        Args:
            backend: The library's tokenizer, or what loads it at its first use: parsing takes a tenth of a second.
            bos_id: Begins every document; None where documents begin with their text.
            eos_id: Ends every document.
        """
        self._given = backend
        self.bos_id, self.eos_id = bos_id, eos_id

    @cached_property
    def backend(self) -> Tokenizer:
        """The library's tokenizer, set up: no truncation, no padding, control tokens in text stay text."""
        backend = self._given() if callable(self._given) else self._given
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over vocabulary, merges and added tokens, which stands in manifests and names a tokenizer there.

        What transformers rewrites on saving (post-processor, flags of added tokens, formatting) stays outside.
        Tokenizers with different hashes can still be the same: `require_same_tokenizer` compares them.
        """
        parts = json.loads(self.backend.to_str())
        model = parts["model"]
        content = {
            "type": model["type"],
            "vocabulary": model.get("vocab"),
            "merges": model.get("merges"),
            "added": sorted([token["id"], token["content"]] for token in parts["added_tokens"]),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocabulary_size <= 1 << 16 else np.uint32)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode whole documents, on all cores.

        Args:
            texts: One text a document; `</s>` or `<unk>` inside is text like any other.

        Returns:
            One array of ids a document: BOS if there is one, the text, EOS.
        """
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        dtype = self.dtype
        return [np.array([*self._beginning, *encoding.ids, self.eos_id], dtype=dtype) for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Return BOS, if there is one, and the ids of `text`, open for a model to go on."""
        return [*self._beginning, *self.encode_text(text)]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text` alone."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @property
    def _beginning(self) -> tuple[int, ...]:
        """What a document begins with, before its text."""
        return () if self.bos_id is None else (self.bos_id,)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """The ids of BOS and EOS, as far as there are any."""
        return (*self._beginning, self.eos_id)

    @property
    def beginning(self) -> str:
        """What a document begins with, in words."""
        return "their text" if self.bos_id is None else str(self.backend.id_to_token(self.bos_id))

    @property
    def ending(self) -> str:
        """What a document ends with."""
        return str(self.backend.id_to_token(self.eos_id))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens are dropped."""
        control = self.control_ids
        kept = [int(token) for token in ids if token not in control]
        return self.backend.decode(kept, skip_special_tokens=True)

    def unpredicted_bytes(self, document: Sequence[int]) -> int:
        """UTF-8 bytes of a document that nothing predicts: without BOS those of its first token, with BOS none.

        A first token that is a part of a character counts as one byte.
        """
        if self.bos_id is not None:
            return 0
        return len(self.decode(document[:1]).replace("\ufffd", "?").encode())

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str, bos_id: int | None, eos_id: int) -> TextTokenizer:
        """Build it from the content of a tokenizer.json and the ids of its two control tokens."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(text), bos_id, eos_id)

    @classmethod
    def from_manifest(cls, field: str, file: Path, manifest: dict[str, Any]) -> TextTokenizer:
        """Stand for the tokenizer.json of a prepared folder, which is read and checked at its first use.

        Args:
            field: The option to name in an error.
            file: The tokenizer.json.
            manifest: What the folder's manifest says of it.
        """

        def load() -> Tokenizer:
            from tokenizers import Tokenizer

            if sha256_of(file) != manifest["files"][file.name]["sha256"]:
                raise UserError(field, file, "is damaged: its SHA-256 is not the manifest's")
            return Tokenizer.from_file(str(file))

        tokenizer = cls(load, manifest["bos_id"], manifest["eos_id"])
        # These two would parse the file; the manifest knows them, and `indra data verify` checks that it is right.
        tokenizer.sha256, tokenizer.vocabulary_size = manifest["tokenizer_sha256"], manifest["vocabulary_size"]
        return tokenizer


def load_tokenizer(field: str, name: str, start: Start = "auto") -> TextTokenizer:
    """Load a tokenizer from a folder, a file, or the Hugging Face hub.

    A folder without tokenizer.json may hold a SentencePiece model, tokenizer.model, which is converted. Where both are
    there, tokenizer.json is used, and a line on stderr says where the two give different ids.

    Args:
        field: The option to name in an error.
        name: The folder, its tokenizer.json or tokenizer.model, or a hub id such as `owner/name`.
        start: What documents begin with; see `choose_control_tokens`.

    Raises:
        UserError: nothing there, not a tokenizer, no EOS, no BOS where one is asked for, or text could become one of
            them.
    """
    file = _tokenizer_file(field, name)
    if damaged_file(file.parent, [file.name]) is not None:
        raise UserError(field, file, NOT_ITS_SUM)
    converted = None
    if file.suffix == ".model":
        converted = sentencepiece_model.convert(field, file)
    description = converted.description if converted else read_json(field, file)
    stated = read_stated(field, file.parent, converted.control_tokens if converted else {})
    backend = _backend(field, file, description)
    control = choose_control_tokens(field, file, stated, backend, start)
    tokenizer = TextTokenizer(backend, *control)
    if (spelled := _spelled_control_token(tokenizer)) is not None:
        tokenizer = TextTokenizer(_backend(field, file, _out_of_reach(description, set(control) - {None})), *control)
        if _spelled_control_token(tokenizer) is not None:
            raise UserError(field, name, f"turns the text {spelled!r} into a control token; use another tokenizer")
    model = file if converted else file.with_name(SENTENCEPIECE_FILE)
    if model.is_file():
        say_difference(field, file, model, tokenizer)
    return tokenizer


def _backend(field: str, file: Path, description: Any) -> Tokenizer:
    """The library's tokenizer, without the truncation and padding that a file may ask for."""
    from tokenizers import Tokenizer

    if not isinstance(description, dict) or "model" not in description:
        raise UserError(field, file, "must be a tokenizer.json (a JSON object with a model)")
    with _refusing(field, file, "must be a tokenizer.json that tokenizers can read"):
        backend = Tokenizer.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    with _refusing(field, file, "must have a token for what its vocabulary lacks"):
        backend.encode(UNSEEN, add_special_tokens=False)
    return backend


@contextlib.contextmanager
def _refusing(field: str, file: Path, must: str) -> Iterator[None]:
    """Turn the library's errors into a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises Exception itself, or a Rust panic, which is no Exception
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(field, file, f"{must} ({reason})") from None


def _tokenizer_file(field: str, name: str) -> Path:
    """Find the tokenizer.json or tokenizer.model that `name` means, downloading it where it is a hub id."""
    path = Path(name)
    if not path.is_dir():
        if path.exists():
            return path
        if not HUB_ID.fullmatch(name) or path.suffix in (".json", ".model"):
            raise UserError(field, name, f"does not exist; {REMEDY}")
        from indraquantum.data.download import hub_files

        path = hub_files(field, name, FILES, "model", REMEDY)
    for file in (path / JSON_FILE, path / SENTENCEPIECE_FILE):
        if file.is_file():
            return file
    raise UserError(field, name, f"has no tokenizer.json and no tokenizer.model; {REMEDY}")


def _spelled_control_token(tokenizer: TextTokenizer) -> str | None:
    """The spelling of a control token that becomes this token where it stands in a text; None where none does."""
    for control in tokenizer.control_ids:
        spelled = tokenizer.backend.id_to_token(control)
        if control in tokenizer.encode_text(f"{spelled} a {spelled}"):
            return spelled
    return None


def _out_of_reach(description: dict[str, Any], control: set[int]) -> dict[str, Any]:
    """The tokenizer.json with control tokens that no text becomes: marked as special, and with the lowest scores."""
    added = [
        token | {"special": token.get("special") or token["id"] in control}
        for token in description.get("added_tokens") or []
    ]
    model = dict(description["model"])
    if model.get("type") == "Unigram":
        model["vocab"] = [list(piece) for piece in model["vocab"]]
        sentencepiece_model.put_out_of_reach(model["vocab"], control)
    return description | {"added_tokens": added, "model": model}
