"""The tokenizer as this project uses it: BOS first, EOS last, and text that can never become a control token.

It wraps a `tokenizers.Tokenizer`, because that is what both training (`tokenizer.json` in every prepared folder) and
speed (`encode_batch`, all cores) want; transformers' classes add nothing that is used here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import read_json, sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ["tokenizer.json", "tokenizer_config.json"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
REMEDY = "put tokenizer.json and tokenizer_config.json into a folder and give it with --tokenizer FOLDER"


class TextTokenizer:
    """A tokenizer with its two control tokens; `sha256` tells whether two of them are the same."""

    def __init__(self, backend: Tokenizer | Callable[[], Tokenizer], bos_id: int, eos_id: int) -> None:
        """Wrap a tokenizer.

        Args:
            backend: The library's tokenizer, or what loads it at its first use: parsing takes a tenth of a second.
            bos_id: Begins every document.
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
        """Hex SHA-256 over vocabulary, merges and added tokens, so that a file written anew is still the same.

        What transformers rewrites on saving (post-processor, flags of added tokens, formatting) stays outside.
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
            One array of ids a document: BOS, the text, EOS.
        """
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        dtype = self.dtype
        return [np.array([self.bos_id, *encoding.ids, self.eos_id], dtype=dtype) for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Return BOS and the ids of `text`, open for a model to go on."""
        return [self.bos_id, *self.backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens are dropped."""
        kept = [int(token) for token in ids if token not in (self.bos_id, self.eos_id)]
        return self.backend.decode(kept, skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str, bos_id: int, eos_id: int) -> TextTokenizer:
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


def load_tokenizer(field: str, name: str) -> TextTokenizer:
    """Load a tokenizer from a folder, a tokenizer.json, or the Hugging Face hub.

    Args:
        field: The option to name in an error.
        name: The folder or file, or a hub id such as `owner/name`. BOS and EOS are those of tokenizer_config.json;
            without one, `<s>` and `</s>` where the vocabulary has them. Others are not guessed.

    Raises:
        UserError: nothing there, not a tokenizer, no BOS or EOS, or text could become one of them.
    """
    from tokenizers import Tokenizer

    file = _tokenizer_file(field, name)
    bos_id, eos_id = _control_ids(field, file, read_json(field, file))
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself on a bad file, nothing narrower
        reason = str(error).splitlines()[0][:120]
        raise UserError(field, file, f"must be a tokenizer.json that tokenizers can read ({reason})") from None
    tokenizer = TextTokenizer(backend, bos_id, eos_id)
    _refuse_control_text(field, name, tokenizer)
    return tokenizer


def _tokenizer_file(field: str, name: str) -> Path:
    """Find the tokenizer.json that `name` means, downloading it where it is a hub id."""
    path = Path(name)
    if path.is_dir():
        path = path / FILES[0]
        if not path.is_file():
            raise UserError(field, name, f"has no tokenizer.json; {REMEDY}")
    elif not path.exists():
        if not HUB_ID.fullmatch(name) or path.suffix == ".json":
            raise UserError(field, name, f"does not exist; {REMEDY}")
        from indraquantum.data.download import hub_files

        path = hub_files(field, name, FILES, "model", REMEDY) / FILES[0]
        if not path.is_file():
            raise UserError(field, name, f"has no tokenizer.json on the hub; {REMEDY}")
    return path


def _control_ids(field: str, file: Path, description: Any) -> tuple[int, int]:
    """Read the ids of BOS and EOS, in this order."""
    if not isinstance(description, dict) or "model" not in description:
        raise UserError(field, file, "must be a tokenizer.json (a JSON object with a model)")
    config_file = file.with_name(FILES[1])
    config = read_json(field, config_file) if config_file.is_file() else {}
    vocabulary = description["model"].get("vocab") if isinstance(description["model"], dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    try:
        if isinstance(vocabulary, list):  # Unigram: pairs of piece and score, the place is the id
            ids = {piece[0]: place for place, piece in enumerate(vocabulary)}
        ids |= {token["content"]: token["id"] for token in description.get("added_tokens") or []}
    except (TypeError, KeyError, IndexError):
        raise UserError(field, file, "must be a tokenizer.json; its vocab or added_tokens are not") from None
    found = []
    for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>")):
        token = config.get(key) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        token = usual if token is None else token
        if not isinstance(token, str) or token not in ids:
            allowed = f"needs a {key} in tokenizer_config.json that is in the vocabulary ({token!r} is not)"
            raise UserError(field, file, allowed)
        found.append(ids[token])
    return found[0], found[1]


def _refuse_control_text(field: str, name: str, tokenizer: TextTokenizer) -> None:
    """Refuse a tokenizer that turns the spelling of a control token into that token."""
    for control in (tokenizer.bos_id, tokenizer.eos_id):
        spelled = tokenizer.backend.id_to_token(control)
        if control in tokenizer.encode_prompt(f"{spelled} a {spelled}")[1:]:
            raise UserError(field, name, f"turns the text {spelled!r} into a control token; use another tokenizer")
