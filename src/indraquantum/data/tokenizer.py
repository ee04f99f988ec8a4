"""The tokenizer of this project: EOS ends a document, and BOS begins it if the tokenizer has one.

No text becomes a control token, whatever it spells.

The class wraps a `tokenizers.Tokenizer`: every prepared folder has one as its tokenizer.json, and it encodes batches on
all cores. The classes of transformers would add nothing that is used here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from indraquantum.data import gguf_tokenizer, sentencepiece_model
from indraquantum.data.control_tokens import (
    CONFIG,
    MAP,
    Start,
    Stated,
    choose_control_tokens,
    read_stated,
)
from indraquantum.data.dataset_manifest import is_dataset, read_dataset_manifest
from indraquantum.data.gguf_file import SUFFIX, is_gguf, open_gguf
from indraquantum.data.gguf_tokenizer import Described
from indraquantum.data.sentencepiece_check import warn_of_difference
from indraquantum.errors import UserError
from indraquantum.files import NOT_ITS_SUM, damaged_file, read_json, sha256_of
from indraquantum.progress import warn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
FILES = [JSON_FILE, CONFIG, MAP, SENTENCEPIECE_FILE]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
UNSEEN = "a \u0378"  # holds a code point without a character, which no vocabulary has
NEEDED = "\u00e9\u0436\u6f22\U0001f600"  # Latin with an accent, Cyrillic, Chinese, an emoji: a text often has one such
RARER = "\r\u05d0\u0639\u0905\ud55c"  # a line end of Windows, Hebrew, Arabic, Devanagari, Korean
# Texts encoded at once: enough for all cores. The library takes about 25 bytes for each character.
CHUNK_DOCUMENTS = 1024
CHUNK_CHARACTERS = 1 << 22


class TextTokenizer:
    """A tokenizer with its control tokens. `require_same_tokenizer` compares two of them."""

    def __init__(self, backend: Tokenizer | Callable[[], Tokenizer], bos_id: int | None, eos_id: int) -> None:
        """Wrap a tokenizer.

        Args:
            backend: The library's tokenizer, or a function that loads it at its first use; that takes 0.1 s.
            bos_id: The id that begins every document; None if documents begin with their text.
            eos_id: The id that ends every document.
        """
        self._given = backend
        self.bos_id, self.eos_id = bos_id, eos_id

    @cached_property
    def backend(self) -> Tokenizer:
        """The library's tokenizer, without truncation, padding and dropout. Control tokens in a text stay text."""
        backend = _turn_off_extras(self._given() if callable(self._given) else self._given)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over vocabulary, merges and added tokens; manifests identify a tokenizer by it.

        Parts that transformers rewrites on saving (post-processor, flags of added tokens, formatting) are left out.
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
        """The largest id plus one, including added tokens."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocabulary_size <= 1 << 16 else np.uint32)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode whole documents, on all cores.

        Args:
            texts: The text of each document. `</s>` or `<unk>` inside it is text like any other.

        Returns:
            One array of ids a document: BOS if there is one, the text, EOS.
        """
        dtype, documents = self.dtype, []
        for chunk in text_chunks(texts):
            encodings = self.backend.encode_batch_fast(chunk, add_special_tokens=False)
            documents += [np.array([*self._beginning, *each.ids, self.eos_id], dtype=dtype) for each in encodings]
        return documents

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt that a model continues: BOS, if there is one, and the ids of `text`."""
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
        """The ids of BOS, if there is one, and EOS."""
        return (*self._beginning, self.eos_id)

    @property
    def beginning(self) -> str:
        """What a document begins with, in words."""
        return "their text" if self.bos_id is None else str(self.backend.id_to_token(self.bos_id))

    @property
    def ending(self) -> str:
        """What a document ends with."""
        return str(self.backend.id_to_token(self.eos_id))

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for text that no other token covers; None if there is none, or it is BOS or EOS, as in GPT-2."""
        model = json.loads(self.to_json())["model"]
        found = model.get("unk_id")  # of Unigram; the other kinds name it
        if found is None and model.get("unk_token") is not None:
            found = self.backend.token_to_id(model["unk_token"])
        return None if found in self.control_ids else found

    def what_it_loses(self) -> list[str]:
        """Return what a text loses on the way through the tokenizer, of line breaks, runs of spaces and capitals."""
        back = self.decode(self.encode_prompt("one\nTwo  three"))
        lost = {"line breaks": "\n" not in back, "runs of spaces": "  " not in back, "capitals": "T" not in back}
        return [name for name, is_lost in lost.items() if is_lost]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. BOS and EOS are dropped, and by default every other special token."""
        control = self.control_ids
        kept = [int(token) for token in ids if token not in control]
        return self.backend.decode(kept, skip_special_tokens=skip_special_tokens)

    def unpredicted_bytes(self, document: Sequence[int]) -> int:
        """Return the UTF-8 bytes that are never predicted: those of a document's first token if there is no BOS."""
        return 0 if self.bos_id is not None else self.count_bytes(document[:1])

    def count_bytes(self, ids: Sequence[int]) -> int:
        """Return how many UTF-8 bytes of text `ids` spell, also of characters that are cut off.

        A decoder shows U+FFFD, which has 3 bytes, in the place of what is not a whole character.
        """
        text = self.decode(ids)
        if "\ufffd" not in text:
            return len(text.encode())
        kept = [int(token) for token in ids if token not in self.control_ids]
        if self._is_byte_level:  # each character of a token stands for a byte
            return sum(len(self.backend.id_to_token(token) or "") for token in kept)
        letter = self.backend.token_to_id("<0x41>")
        if letter is None:  # there are no tokens of single bytes, so no character is cut off
            return len(text.encode())
        return len(self.decode([letter if token in self._ids_of_bytes else token for token in kept]).encode())

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are spelled in GPT-2's alphabet of bytes."""
        return '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])

    @cached_property
    def _ids_of_bytes(self) -> frozenset[int]:
        """The tokens `<0x00>` to `<0xFF>` of tokenizers that spell rare characters byte by byte."""
        found = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in found if token is not None)

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
        """Return the tokenizer of a prepared folder, whose tokenizer.json is read and checked at its first use.

        Args:
            field: The option to name in an error.
            file: The tokenizer.json.
            manifest: The folder's manifest.
        """

        def load() -> Tokenizer:
            from tokenizers import Tokenizer

            if sha256_of(file) != manifest["files"][file.name]["sha256"]:
                raise UserError(field, file, "is damaged: its SHA-256 is not the one in the manifest")
            return Tokenizer.from_file(str(file))

        tokenizer = cls(load, manifest["bos_id"], manifest["eos_id"])
        # Computing these two would parse the file. The manifest has them, and `indra data verify` checks them.
        tokenizer.sha256, tokenizer.vocabulary_size = manifest["tokenizer_sha256"], manifest["vocabulary_size"]
        return tokenizer


def text_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of at most CHUNK_DOCUMENTS, and of CHUNK_CHARACTERS if no single text is longer."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        if chunk and (len(chunk) == CHUNK_DOCUMENTS or characters + len(text) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += len(text)
    if chunk:
        yield chunk


def load_tokenizer(field: str, name: str, start: Start = "auto") -> TextTokenizer:
    """Load a tokenizer from a folder, a file, or the Hugging Face hub.

    A folder without tokenizer.json may hold a SentencePiece model, tokenizer.model, which is converted. If both are
    there, tokenizer.json is used, and a line on stderr warns if the two give different ids. A GGUF file holds its
    tokenizer, which is converted too. The folder of a prepared dataset has the dataset's tokenizer. A line on stderr
    warns if rare characters are dropped.

    Args:
        field: The option to name in an error.
        name: The folder, its tokenizer.json or tokenizer.model, a GGUF file, or a hub id such as `owner/name`.
        start: What documents begin with; see `choose_control_tokens`.

    Raises:
        UserError: there is no tokenizer, it has no EOS, or no BOS although `start` asks for one, text could become one
            of them, or it drops common characters.
    """
    file = _tokenizer_file(field, name)
    if damaged_file(file.parent, [file.name]) is not None:
        raise UserError(field, file, NOT_ITS_SUM)
    prepared = _of_dataset(field, file)
    if prepared is not None and start == "auto":
        return prepared
    description, stated = _described(field, file)
    backend = _backend(field, file, description)
    if prepared is not None:
        bos, eos = (None if id_ is None else backend.id_to_token(id_) for id_ in (prepared.bos_id, prepared.eos_id))
        stated = Stated(None if bos == eos else bos, eos, bos is None)
    control = choose_control_tokens(field, file, stated, backend, start)
    tokenizer = TextTokenizer(backend, *control)
    if (spelled := _spelled_control_token(tokenizer)) is not None:
        changed = _out_of_reach(description, set(control) - {None})
        tokenizer = TextTokenizer(_backend(field, file, changed), *control)
        if _spelled_control_token(tokenizer) is not None and changed["model"].get("type") == "Unigram":
            spellings = [backend.id_to_token(number) for number in dict.fromkeys(control) if number is not None]
            tokenizer = TextTokenizer(_backend(field, file, _cut_apart(changed, spellings)), *control)
        if _spelled_control_token(tokenizer) is not None:
            raise UserError(
                field,
                name,
                f"turns the text {spelled!r} into a control token, so text could end a document; use another tokenizer",
            )
    model = file if file.suffix == ".model" else file.with_name(SENTENCEPIECE_FILE)
    if model.is_file() and not is_gguf(file):
        warn_of_difference(field, file, model, tokenizer.backend)
    if dropped := _dropped(tokenizer.backend, RARER):
        warn(f"warning: {file} has no token for {', '.join(map(repr, dropped))}; a text loses what has no token")
    return tokenizer


def _of_dataset(field: str, file: Path) -> TextTokenizer | None:
    """Return the tokenizer of a prepared dataset, whose manifest names BOS and EOS, or None if `file` is of no such."""
    if file.name != JSON_FILE or not is_dataset(file.parent):
        return None
    return TextTokenizer.from_manifest(field, file, read_dataset_manifest(field, file.parent))


def _described(field: str, file: Path) -> Described:
    """Return the content of a tokenizer.json, converted if `file` is of another kind, and its BOS and EOS.

    A GGUF file names them itself. For other files, those beside them do.
    """
    if is_gguf(file):
        return gguf_tokenizer.convert(field, open_gguf(field, file))
    if file.suffix == ".model":
        converted = sentencepiece_model.convert(field, file)
        return Described(converted.description, read_stated(field, file.parent, converted.control_tokens))
    return Described(read_json(field, file), read_stated(field, file.parent, {}))


def _backend(field: str, file: Path, description: Any) -> Tokenizer:
    """Return the library's tokenizer, without the truncation, padding and dropout that a file may ask for."""
    from tokenizers import Tokenizer

    if not isinstance(description, dict) or "model" not in description:
        raise UserError(field, file, "must be a tokenizer.json, which is a JSON object with a model")
    with _refusing(field, file, "must be a tokenizer.json that the tokenizers library can read"):
        backend = Tokenizer.from_str(json.dumps(description))
    _turn_off_extras(backend)
    with _refusing(field, file, "must have a token for unknown characters"):
        backend.encode(UNSEEN, add_special_tokens=False)
        dropped = _dropped(backend, NEEDED)
    if dropped:
        raise UserError(field, file, f"must have a token for unknown characters; it drops {dropped[0]!r} from a text")
    return backend


def _turn_off_extras(backend: Tokenizer) -> Tokenizer:
    """Turn off what a file may ask for and documents must not have: truncation, padding, merges left out at random."""
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return backend


def _dropped(backend: Tokenizer, characters: str) -> str:
    """Return those characters that no token covers, or only in part.

    The library's BPE leaves out what it does not know if it has no token for it. What the normalizer and the
    pre-tokenizer remove is meant to be removed.
    """

    def is_whole(character: str) -> bool:
        text = backend.normalizer.normalize_str(character) if backend.normalizer else character
        cut = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        pieces = [piece for piece, _ in cut if piece]
        spans = (token.offsets for piece in pieces for token in backend.model.tokenize(piece))
        return sum(end - begin for begin, end in spans) >= len("".join(pieces).encode())

    return "".join(character for character in characters if not is_whole(character))


@contextlib.contextmanager
def _refusing(field: str, file: Path, must: str) -> Iterator[None]:
    """Turn the library's errors into a UserError."""
    try:
        with _without_stderr():
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, or a Rust panic, which is not an Exception
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(field, file, f"{must} ({reason})") from None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what is written to the process's stderr: a Rust panic prints its message there before it is raised."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _remedy(field: str) -> str:
    files = "tokenizer.json and tokenizer_config.json"
    if field == "--tokenizer":
        return f"put {files} into a folder and give it with --tokenizer FOLDER"
    return f"put {files} beside the model's files"


def _tokenizer_file(field: str, name: str) -> Path:
    """Find the tokenizer.json or tokenizer.model that `name` means; a hub id is downloaded."""
    path = Path(name)
    if not path.is_dir():
        if path.exists():
            return path
        if not HUB_ID.fullmatch(name) or path.suffix in (".json", ".model", SUFFIX):
            raise UserError(field, name, f"does not exist; {_remedy(field)}")
        from indraquantum.data.download import hub_files

        path = hub_files(field, name, FILES, "model", _remedy(field))
    for file in (path / JSON_FILE, path / SENTENCEPIECE_FILE):
        if file.is_file():
            return file
    raise UserError(field, name, f"has no tokenizer.json and no tokenizer.model; {_remedy(field)}")


def _spelled_control_token(tokenizer: TextTokenizer) -> str | None:
    """Return the spelling of a control token that becomes this token inside a text; None if none does."""
    for control in tokenizer.control_ids:
        spelled = tokenizer.backend.id_to_token(control)
        if control in tokenizer.encode_text(f"{spelled} a {spelled}"):
            return spelled
    return None


def _out_of_reach(description: dict[str, Any], control: set[int]) -> dict[str, Any]:
    """Return the tokenizer.json with control tokens that no text becomes: special, and with the lowest scores."""
    added = [
        token | {"special": token.get("special") or token["id"] in control}
        for token in description.get("added_tokens") or []
    ]
    model = dict(description["model"])
    if model.get("type") == "Unigram":
        model["vocab"] = [list(piece) for piece in model["vocab"]]
        sentencepiece_model.put_out_of_reach(model["vocab"], control)
    return description | {"added_tokens": added, "model": model}


def _cut_apart(description: dict[str, Any], spellings: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizer.json with a step that cuts the first character off where a text spells a control token.

    A score can't keep a unigram model from a piece one of whose characters is unknown: the library (0.23.3) takes an
    unknown character for worse than every piece, two for worse still.
    """
    plain = [re.sub(r"([][.^$*+?(){}|\\])", r"\\\1", text) for text in spellings]  # as few escapes as browsers allow
    found = "|".join(f"(?={text}){text[: 1 + (text[0] == chr(92))]}" for text in plain)
    step = {"type": "Split", "pattern": {"Regex": found}, "behavior": "Isolated", "invert": False}
    before = description.get("pre_tokenizer")
    steps = [] if before is None else before.get("pretokenizers", [before])
    return description | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, step]}}
