"""Tokenizers in GGUF files: they give the ids of the model's own tokenizer, or are refused in one line."""

from __future__ import annotations

import json
import struct

import pytest

import gguf_world
from indraquantum.data.sentencepiece_check import FIXED_TEXTS
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from teacher_world import write_tokenizer
from test_data_sentencepiece import KINDS, texts, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write(folder, tmp_path):
    """Write a GGUF file without tensors whose tokenizer is the folder's, with other entries, and return its path."""

    def write(**entries):
        changed = {f"tokenizer.ggml.{name}": value for name, value in entries.items()}
        return gguf_world.write_gguf(tmp_path / "model.gguf", gguf_world.byte_level_of(folder) | changed)

    return write


def load(path):
    return load_tokenizer("--tokenizer", str(path))


def test_it_gives_the_ids_of_the_tokenizer_json_that_it_was_made_from(folder, write):
    own, converted = load(folder), load(write())
    for text in FIXED_TEXTS:
        assert converted.encode_prompt(text) == own.encode_prompt(text)
        assert converted.decode(own.encode_text(text)) == own.decode(own.encode_text(text))
    assert converted.control_ids == own.control_ids == (0, 1)
    assert converted.vocabulary_size == own.vocabulary_size


MIXED = "don'T ab1234, a\u030a ((x)) $5\n\n c  "


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "don|'|T| ab|1234|,| a|\u030a| ((|x|))| $|5|\n\n| c|  "),
        ("smollm", "don|'|T| ab|1|2|3|4|,| a|\u030a| ((|x|))| $|5|\n\n| c|  "),
        ("llama-bpe", "don|'T| ab|123|4|,| a|\u030a| ((|x|))| $|5|\n\n| c|  "),
        ("qwen2", "don|'T| ab|1|2|3|4|,| \u00e5| ((|x|))| $|5|\n\n| c|  "),
        ("default", "don|'|T| ab|123|4|,| a|\u030a| |((|x|))| |$|5|\n\n| c|  "),
    ],
)
def test_the_file_says_how_a_text_is_cut(write, pre, pieces):
    tokenizer = load(write(pre=pre))
    encoding = tokenizer.backend.encode(MIXED, add_special_tokens=False)
    normalizer = tokenizer.backend.normalizer
    text = normalizer.normalize_str(MIXED) if normalizer else MIXED
    cut = [text[begin:end] for _, (begin, end) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces.split("|")
    assert tokenizer.decode(encoding.ids) == text


def test_a_whole_word_that_is_a_token_needs_no_merges(folder, write):
    tokens = [*gguf_world.byte_level_of(folder)["tokenizer.ggml.tokens"], "zqz"]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    word = len(tokens) - 1
    assert load(write(tokens=tokens, token_type=kinds, pre="llama-bpe")).encode_text("zqz") == [word]
    assert word not in load(write(tokens=tokens, token_type=kinds, pre="gpt-2")).encode_text("zqz")


def test_control_tokens_in_a_text_stay_text_and_other_added_ones_are_found(folder, write):
    tokens = [*gguf_world.byte_level_of(folder)["tokenizer.ggml.tokens"], "<tool>"]
    tokenizer = load(write(tokens=tokens, token_type=[3, 3] + [1] * (len(tokens) - 3) + [4]))
    ids = tokenizer.encode_text("a</s><tool>b")
    assert tokenizer.eos_id not in ids
    assert ids.count(len(tokens) - 1) == 1
    assert tokenizer.decode(ids) == "a</s><tool>b"


@pytest.mark.parametrize(
    ("entries", "bos"),
    [
        ({"add_bos_token": True}, 0),
        ({"add_bos_token": False}, None),
        ({"add_bos_token": None}, None),
        ({"add_bos_token": None, "pre": "llama-bpe"}, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 0),
        ({"add_bos_token": False, "bos_token_id": 1}, 1),  # GPT-2's one token stands between documents
    ],
)
def test_the_file_says_whether_documents_begin_with_bos(write, entries, bos):
    path = write(**entries)
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"bos_token": "e", "eos_token": "t"}))
    tokenizer = load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, 1)  # the files beside it belong to another tokenizer


def test_tokens_that_only_fill_up_the_table_are_none_of_the_tokenizer(folder, write):
    tokens = gguf_world.byte_level_of(folder)["tokenizer.ggml.tokens"]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    filled = write(tokens=[*tokens, "[PAD263]", "[PAD264]"], token_type=[*kinds, 5, 5])
    assert load(filled).vocabulary_size == len(tokens)


def sentencepiece_metadata(reference, prefixed):
    """What llama.cpp's converter writes for a SentencePiece model."""
    numbers = range(reference.vocab_size())
    kinds = []
    for number in numbers:
        tests = ((reference.is_unknown, 2), (reference.is_control, 3), (reference.is_byte, 6))
        kinds.append(next((kind for test, kind in tests if test(number)), 1))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": [reference.get_score(number) for number in numbers],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefixed,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize(("kind", "prefixed"), [("llama", True), ("gemma", False)])
def test_a_sentencepiece_tokenizer_gives_sentencepieces_ids(tmp_path, kind, prefixed):
    reference = train(tmp_path / "tokenizer.model", **KINDS[kind])
    metadata = sentencepiece_metadata(reference, prefixed)
    tokenizer = load(gguf_world.write_gguf(tmp_path / "model.gguf", metadata))
    wrong = [text for text in texts() if tokenizer.encode_prompt(text) != [1, *reference.encode(text)]]
    assert wrong == []
    assert tokenizer.control_ids == (1, 2)


def test_runs_of_spaces_that_the_file_adds_are_found(tmp_path):
    reference = train(tmp_path / "tokenizer.model", **KINDS["gemma"], user_defined_symbols=["▁▁", "▁▁▁", "\n"])
    metadata = sentencepiece_metadata(reference, prefixed=False)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for number, token in enumerate(tokens):
        if token in ("▁▁", "▁▁▁", "\n"):
            tokens[number], kinds[number] = token.replace("▁", " "), 4  # as the converter of Gemma writes them
    tokenizer = load(gguf_world.write_gguf(tmp_path / "model.gguf", metadata))
    folder = load(tmp_path / "tokenizer.model")
    for text in texts():
        if "▁" in text:  # to SentencePiece this sign is a space
            continue
        assert tokenizer.encode_text(text) == folder.encode_text(text) == reference.encode(text)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"model": None}, "has no tokenizer; give the model's own folder instead"),
        ({"model": "no_vocab"}, "has no tokenizer"),
        ({"model": "bert"}, "has a tokenizer of the kind bert; supported are gpt2 and llama"),
        ({"pre": "viking"}, "is not supported (tokenizer.ggml.pre viking); supported are default, gpt-2"),
        ({"merges": None}, "must have tokenizer.ggml.merges"),
        ({"merges": ["x never"]}, "must be a tokenizer.json that the tokenizers library can read"),
        ({"eos_token_id": None}, "must name the token that ends a document (tokenizer.ggml.eos_token_id)"),
        ({"eos_token_id": 263}, "must have a token for its tokenizer.ggml.eos_token_id 263"),
        ({"token_type": [1, 2]}, "must have as many tokenizer.ggml.token_type as tokens (263)"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "must have each token once"),
    ],
)
def test_a_tokenizer_that_cannot_be_right_is_refused(write, entries, reason):
    path = write(**entries)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"--tokenizer: got {path}; ")
    assert "\n" not in message


def test_damaged_files_are_refused(write, tmp_path):
    content = write().read_bytes()
    kinds = {
        "cut off": content[: len(content) // 2],
        "must be a GGUF file": b"PK" + content[2:],
        "damaged": content[:4] + struct.pack("<I", 1) + content[8:],
    }
    for number, (reason, damaged) in enumerate(kinds.items()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=reason):
            load(path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.gguf")


def test_without_the_package_a_line_says_what_to_install(write, without_package):
    path = write()
    without_package("gguf", ModuleNotFoundError("No module named 'gguf'"))
    with pytest.raises(UserError, match=r"pip install 'indraquantum\[gguf\]'"):
        load(path)
