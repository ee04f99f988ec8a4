"""SentencePiece files: converted, they give SentencePiece's own ids; a tokenizer.json that does not is named."""

from __future__ import annotations

import io
import json
import random
import re
import struct

import pytest

from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError

spm = pytest.importorskip("sentencepiece")

TEXT = "the cat sat on a mat and then the other cats sat there with 12 or 345 mats -- while it rained"
WORDS = TEXT.split()
CODE = ["def f(x):\n    if x:\n        return  10\n", "a  b   c    d     e", "--- == ----", "x < 3 > y / z"]


def corpus():
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=9)) for _ in range(200)]
    return lines + CODE * 20 + [" " * (number % 17) + line for number, line in enumerate(lines)]


def texts():
    """Texts that conversions get wrong: runs, leading and trailing spaces, control tokens, letters never seen."""
    draw = random.Random(1)
    alphabets = (" a", " -", "the cat  ", "</s> ▁<s>x", "漢zé😀 a", "\n\t  x1", "0123 ")
    drawn = ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(0, 25))) for _ in range(600)]
    runs = [f"{' ' * before}the{' ' * between}cat" for before in range(20) for between in range(1, 20)]
    return drawn + corpus()[:30] + CODE + runs


def train(file, **options):
    """A tiny SentencePiece model in `file`."""
    given = {"vocab_size": 340, "minloglevel": 9, "hard_vocab_limit": False}
    with io.BytesIO() as content:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=content, **given | options)
        model = content.getvalue()
    if options.get("allow_whitespace_only_pieces"):
        for piece in ("▁" * length for length in range(1, 20)):
            model = re.sub(re.escape(field(piece)) + b"\x15....", field(piece) + LOWEST, model, flags=re.DOTALL)
    file.write_bytes(model)
    return spm.SentencePieceProcessor(model_file=str(file))


def field(piece):
    """A piece's text as its file has it: tag, length, text."""
    text = piece.encode()
    return bytes([10, len(text)]) + text


LOWEST = b"\x15" + struct.pack("<f", -1e9)  # what Llama's file gives to every run of spaces


LLAMA = {
    "byte_fallback": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}
RUNS = {"allow_whitespace_only_pieces": True, "vocab_size": 380}
KINDS = {
    "llama": {"model_type": "bpe", **LLAMA, **RUNS},
    "gemma": {"model_type": "bpe", **LLAMA, **RUNS, "add_dummy_prefix": False},
    "bpe of defaults": {"model_type": "bpe"},
    "bpe that keeps lines": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "unigram": {"model_type": "unigram", **LLAMA},
    "unigram of defaults": {"model_type": "unigram"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_a_sentencepiece_file_alone_gives_its_ids(tmp_path, kind, capfd):
    reference = train(tmp_path / "tokenizer.model", **KINDS[kind])
    tokenizer = load_tokenizer("--tokenizer", str(tmp_path))
    wrong = [text for text in texts() if tokenizer.encode_prompt(text) != [1, *reference.encode(text)]]
    assert wrong == []
    assert [document[-1] for document in tokenizer.encode_documents(["a"])] == [reference.eos_id()]
    if "byte_fallback" in KINDS[kind]:
        for text in texts():
            assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    capfd.readouterr()
    file = load_tokenizer("--tokenizer", str(tmp_path / "tokenizer.model"))
    assert file.to_json() == tokenizer.to_json()
    assert "warning" not in capfd.readouterr().err


def test_the_models_own_control_tokens_count(tmp_path):
    train(tmp_path / "tokenizer.model", model_type="bpe", bos_id=-1, eos_id=1, eos_piece="<end>")
    tokenizer = load_tokenizer("--tokenizer", str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.backend.id_to_token(tokenizer.eos_id)) == (None, "<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<end>"}))
    assert load_tokenizer("--tokenizer", str(tmp_path)).bos_id == 1


@pytest.fixture
def both(tmp_path):
    """A SentencePiece file, and its right tokenizer.json beside it."""
    train(tmp_path / "tokenizer.model", **KINDS["llama"])
    (tmp_path / "tokenizer.json").write_text(load_tokenizer("-", str(tmp_path)).to_json())
    return tmp_path


def test_a_right_tokenizer_json_beside_it_is_no_news(both, capfd):
    load_tokenizer("--tokenizer", str(both))
    assert "warning" not in capfd.readouterr().err


def without_prefix(page):
    page["normalizer"]["normalizers"] = page["normalizer"]["normalizers"][1:]


def backwards(page):
    page["model"]["merges"] = page["model"]["merges"][::-1]


def metaspace(page):
    """As transformers 5.23 loads and saves a Llama tokenizer."""
    page["normalizer"] = None
    page["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_prefix, "The quick brown"), (backwards, "becomes ["), (metaspace, "' a space at the beginning'")],
)
def test_a_tokenizer_json_that_differs_from_it_is_said(both, capfd, change, words):
    page = json.loads((both / "tokenizer.json").read_text())
    change(page)
    (both / "tokenizer.json").write_text(json.dumps(page))
    load_tokenizer("--tokenizer", str(both))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "SentencePiece's tokenizer.model differ" in line
    assert words in line


def test_without_the_library_it_says_that_it_did_not_compare(both, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    load_tokenizer("--tokenizer", str(both))
    (line,) = capfd.readouterr().err.splitlines()
    assert "was not compared" in line
    assert "pip install sentencepiece" in line
    (both / "tokenizer.json").unlink()
    load_tokenizer("--tokenizer", str(both))  # the conversion needs no library


def test_damaged_files_are_refused_in_one_line(both):
    (both / "tokenizer.json").unlink()
    file = both / "tokenizer.model"
    content, draw = file.read_bytes(), random.Random(2)
    for size in (0, 1, 7, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match="tokenizer") as caught:
            load_tokenizer("--tokenizer", str(both))
        assert "\n" not in str(caught.value)
    refused = 0
    for _ in range(60):  # any error is a UserError
        spoilt = bytearray(content)
        for _ in range(3):
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
        file.write_bytes(spoilt)
        try:
            load_tokenizer("--tokenizer", str(both))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "char"}, "is not of the kind bpe or unigram"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
    ],
)
def test_what_a_tokenizer_json_cannot_express_is_refused(tmp_path, options, words):
    train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=words):
        load_tokenizer("--tokenizer", str(tmp_path))


@pytest.mark.shared
def test_the_converted_llama_file_is_the_right_tokenizer_json(shared):
    right = json.loads(load_tokenizer("-", str(shared / "tokenizer")).to_json())
    converted = json.loads(load_tokenizer("-", str(shared / "tokenizer" / "tokenizer.model")).to_json())
    assert converted | {"post_processor": None} == right | {"post_processor": None}
