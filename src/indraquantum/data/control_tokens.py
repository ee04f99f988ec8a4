"""Which tokens begin and end a document, as the files beside a tokenizer.json say.

Models expect different beginnings. Llama's documents begin with BOS. Qwen has no BOS, so its documents begin with their
text. GPT-2 separates documents by one token, `<|endoftext|>`, which stands both before and after a document. Several
files can say which kind a tokenizer is; `--document-start` overrides them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from indraquantum.errors import UserError
from indraquantum.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Start = Literal["auto", "bos", "eos", "none"]
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
USUAL_BOS = "<s>"
USUAL_EOS = ("</s>", "<|endoftext|>")


class ControlTokens(NamedTuple):
    """The tokens around a document."""

    bos_id: int | None  # begins every document; None if documents begin with their text
    eos_id: int  # ends every document


class Stated(NamedTuple):
    """What the files say about BOS and EOS."""

    bos: str | None
    eos: str | None
    no_bos: bool  # they say that there is none


def read_stated(field: str, folder: Path, otherwise: Mapping[str, str | None]) -> Stated:
    """Read tokenizer_config.json, and special_tokens_map.json for what that one leaves open.

    Args:
        field: The option to name in an error.
        folder: Where the files are; either may be missing.
        otherwise: `bos_token` and `eos_token` to use if neither file mentions them.

    Raises:
        UserError: a file is not a JSON object, or an entry has another type than transformers writes.
    """
    files = [folder / name for name in (CONFIG, MAP)]
    pages = [(file, _page(field, file)) for file in files if file.is_file()]
    found: dict[str, str | None] = {}
    for key in ("bos_token", "eos_token"):
        for file, page in pages:
            if key in page and found.get(key) is None:
                found[key] = _token(field, file, key, page[key])
        if key not in found and key in otherwise:
            found[key] = otherwise[key]
    adds = [page["add_bos_token"] for _, page in pages if page.get("add_bos_token") is not None]
    if adds and not isinstance(adds[0], bool):
        raise UserError(field, folder / CONFIG, f"must have true or false as its add_bos_token, not {adds[0]!r}")
    none_named = "bos_token" in found and found["bos_token"] is None
    return Stated(found.get("bos_token"), found.get("eos_token"), none_named or adds[:1] == [False])


def _page(field: str, file: Path) -> dict[str, Any]:
    page = read_json(field, file)
    if not isinstance(page, dict):
        raise UserError(field, file, "must be a JSON object")
    return page


def _token(field: str, file: Path, key: str, value: Any) -> str | None:
    token = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(token, str):
        raise UserError(field, file, f"must have the text of a token, or null, as its {key}, not {str(value)[:60]}")
    return token


def choose_control_tokens(
    field: str, file: Path, stated: Stated, backend: Tokenizer, start: Start = "auto"
) -> ControlTokens:
    """Decide what begins and what ends a document.

    Args:
        field: The option to name in an error.
        file: The tokenizer, for the error.
        stated: What the files beside it say.
        backend: The tokenizer. Its post-processor shows what its models' texts begin and end with.
        start: `auto` begins documents as the tokenizer's own models expect: with the BOS token that the files name or
            that the post-processor sets, and with nothing if they say that there is none. If they say nothing, with
            `<s>` if the vocabulary has it, else with EOS. The other values overrule the files.

    Raises:
        UserError: there is no EOS, a token is not in the vocabulary, or `start` asks for a BOS and there is none.
    """
    ids = backend.get_vocab(with_added_tokens=True)
    around = _set_around_text(backend)
    eos = _id_of(field, file, "eos_token", stated.eos, ids)
    if eos is None:
        usual = [ids[token] for token in USUAL_EOS if token in ids]
        eos = next((token for token in (around.last, *usual) if token is not None), None)
    if eos is None:
        raise UserError(
            field,
            file,
            f"needs an eos_token in {CONFIG}: none is named there, and the vocabulary has none of the usual ones",
        )
    if start in ("eos", "none"):
        return ControlTokens(eos if start == "eos" else None, eos)
    bos = _id_of(field, file, "bos_token", stated.bos, ids)
    named = around.first if bos is None else bos
    if start == "bos":
        named = ids.get(USUAL_BOS) if named is None else named
        if named is None:
            raise UserError("--document-start", start, f"must be auto, eos or none: {file} names no BOS token")
        return ControlTokens(named, eos)
    if stated.no_bos and around.first is None and named != eos:
        return ControlTokens(None, eos)
    if named is None:
        named = ids.get(USUAL_BOS, eos)
    return ControlTokens(named, eos)


def _id_of(field: str, file: Path, key: str, token: str | None, ids: Mapping[str, int]) -> int | None:
    if token is not None and token not in ids:
        allowed = f"needs a {key} in {CONFIG} that is in the vocabulary; {token!r} is not"
        raise UserError(field, file, allowed)
    return None if token is None else ids[token]


class _Around(NamedTuple):
    """The id that a post-processor puts before a text and the one behind it; None if it is not exactly one."""

    first: int | None
    last: int | None


def _set_around_text(backend: Tokenizer) -> _Around:
    encoding = backend.encode("a")
    marks = encoding.special_tokens_mask
    before = sum(1 for _ in itertools.takewhile(bool, marks))
    behind = sum(1 for _ in itertools.takewhile(bool, reversed(marks)))
    if before == len(marks):  # "a" is not in the vocabulary, so nobody can tell what follows it
        behind = 0
    return _Around(encoding.ids[0] if before == 1 else None, encoding.ids[-1] if behind == 1 else None)
