"""The tokenizer: ids by hand and by SentencePiece, control tokens kept out of text, identity by content."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from indraquantum.config import TINYLLAMA
from indraquantum.data import tokenizer as tokenizer_module
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from teacher_world import write_tokenizer
from tiny_tokenizer import BOS, EOS, IDS, ids, save_tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tiny_tokenizer(tmp_path / "tokenizer")


def test_documents_and_prompts(folder):
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocabulary_size) == (BOS, EOS, len(IDS))
    documents = tokenizer.encode_documents(["the cat sat", ""])
    assert [document.tolist() for document in documents] == [[BOS, *ids("the cat sat"), EOS], [BOS, EOS]]
    assert documents[0].dtype == np.uint16
    assert tokenizer.encode_prompt("on the mat .") == [BOS, *ids("on the mat .")]


def test_text_never_becomes_a_control_token(folder):
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    (document,) = tokenizer.encode_documents(["the </s> cat <s> <unk>"])
    assert document.tolist() == [BOS, *ids("the </ s > cat < s > < unk >"), EOS]
    assert tokenizer.encode_prompt("</s>") == [BOS, *ids("</ s >")]


def test_decode_drops_control_tokens(folder):
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    assert tokenizer.decode([BOS, *ids("the cat"), EOS, EOS]) == "the cat"


def test_a_file_serves_as_well_as_its_folder(folder):
    assert load_tokenizer("-", str(folder / "tokenizer.json")).sha256 == load_tokenizer("-", str(folder)).sha256


def test_sha256_is_of_the_content_not_of_the_file(folder, tmp_path):
    first = load_tokenizer("-", str(folder))
    description = json.loads((folder / "tokenizer.json").read_text())
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=7, sort_keys=True))
    again = load_tokenizer("-", str(folder))
    assert again.sha256 == first.sha256
    assert len(again.encode_documents(["the cat sat on the mat"])[0]) == 8, "a file's truncation must not cut text"

    description["model"]["vocab"]["cat"], description["model"]["vocab"]["mat"] = IDS["mat"], IDS["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert load_tokenizer("-", str(folder)).sha256 != first.sha256


def test_json_round_trip(folder):
    first = load_tokenizer("-", str(folder))
    again = TextTokenizer.from_json(first.to_json(), first.bos_id, first.eos_id)
    assert again.sha256 == first.sha256
    assert again.encode_prompt("the </s>") == first.encode_prompt("the </s>")


def test_large_vocabularies_take_32_bits(tmp_path):
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, 65_537)}
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel(words, unk_token="<s>")), 0, 1)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (document,) = tokenizer.encode_documents(["w65536 w2"])
    assert document.tolist() == [0, 65_536, 2, 1]
    assert document.dtype == np.uint32


def refused(name, field="--tokenizer"):
    with pytest.raises(UserError) as caught:
        load_tokenizer(field, str(name))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_tokenizers_are_refused_in_one_line(tmp_path):
    assert "--tokenizer FOLDER" in refused(TINYLLAMA)  # the tests are offline
    assert "has no tokenizer.json" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"')
    assert "must be JSON" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "must be a tokenizer.json" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Other", "vocab": {"<s>": 0, "</s>": 1}}}')
    assert "that the tokenizers library can read" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused(tmp_path)


def test_control_tokens_are_not_guessed(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>"}')
    assert "bos_token" in refused(folder)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer("-", str(folder)).eos_id == EOS  # <s> and </s> are there


@pytest.mark.parametrize("config", [None, {"bos_token": None, "eos_token": None}])
def test_a_tokenizer_without_eos_is_refused(folder, config):
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["vocab"]["other"] = description["model"]["vocab"].pop("</s>")
    description["added_tokens"] = [added for added in description["added_tokens"] if added["content"] != "</s>"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "eos_token" in refused(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"bos_token": ["<s>"]}),
        ("tokenizer.json", {"added_tokens": [7]}),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}),
        ("tokenizer.json", {"model": {"vocab": [1, 2]}}),
        ("tokenizer.json", {"model": {"vocab": [[], []]}}),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),  # a Rust panic
    ],
)
def test_a_malformed_tokenizer_is_refused_in_one_line(folder, capfd, file, change):
    page = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(page | change))
    refused(folder)
    assert capfd.readouterr().err == ""
    print("heard", file=__import__("sys").stderr)
    assert capfd.readouterr().err == "heard\n"


def test_a_tokenizer_that_fails_on_what_it_has_not_seen_is_refused_before_any_text_is_read(tmp_path):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    pieces = Tokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], None, False))
    for tokenizer in (words, pieces):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert "must have a token for unknown characters" in refused(tmp_path)


def test_a_tokenizer_that_reads_control_tokens_from_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "into a control token" in refused(tmp_path)


# From SentencePiece itself (tokenizer.model, `encode`), not from this package; BOS 1 and EOS 2 set around them.
SENTENCEPIECE = {
    "The <unk> cat </s> @-@ sat . <s>":
        [1, 450, 529, 2960, 29958, 6635, 1533, 29879, 29958, 732, 29899, 29992, 3290, 869, 529, 29879, 29958, 2],
    "Zwölf 漢字": [1, 12017, 5873, 29888, 29871, 31652, 30578, 2],
    "": [1, 2],
}  # fmt: skip


@pytest.mark.shared
def test_ids_equal_sentencepieces(shared):
    tokenizer = load_tokenizer("--tokenizer", str(shared / "tokenizer"))
    documents = tokenizer.encode_documents(list(SENTENCEPIECE))
    assert [document.tolist() for document in documents] == list(SENTENCEPIECE.values())


@pytest.mark.shared
def test_the_same_tokenizer_saved_by_transformers_is_equal(shared, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(shared / "tokenizer").save_pretrained(tmp_path)
    again, first = load_tokenizer("-", str(tmp_path)), load_tokenizer("-", str(shared / "tokenizer"))
    assert (again.sha256, again.bos_id, again.eos_id) == (first.sha256, 1, 2)
    assert load_tokenizer("-", str(shared / "teacher")).sha256 != first.sha256


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def save_bpe(folder, alphabet, byte_level=True, normalizer=None, **options):
    """A BPE without merges whose tokens are `<s>`, `</s>` and an alphabet."""
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}, [], **options))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer:
        tokenizer.normalizer = normalizer
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("alphabet", "options", "dropped"),
    [
        ("abc ", {"byte_level": False}, "é"),
        ("abc ", {"byte_level": False, "byte_fallback": True}, "é"),
        ([sign for sign in BYTES if sign != "æ"], {}, "漢"),  # the first of its three bytes, 0xE6
        ([sign for sign in BYTES if sign != "ð"], {"normalizer": normalizers.NFD()}, "\U0001f600"),
    ],
)
def test_a_tokenizer_that_drops_characters_is_refused(tmp_path, alphabet, options, dropped):
    said = refused(save_bpe(tmp_path / "tokenizer", alphabet, **options))
    assert f"must have a token for unknown characters; it drops {dropped!r} from a text" in said


@pytest.mark.parametrize(
    ("alphabet", "options"),
    [
        (BYTES, {}),
        (BYTES, {"normalizer": normalizers.Replace("\u0378", "")}),
        ("abc e", {"byte_level": False, "unk_token": "e"}),
        ([*"abc ", *(f"<0x{byte:02X}>" for byte in range(256))], {"byte_level": False, "byte_fallback": True}),
    ],
)
def test_a_tokenizer_that_keeps_all_characters_is_used(tmp_path, alphabet, options, capfd):
    tokenizer = load_tokenizer("--tokenizer", str(save_bpe(tmp_path / "tokenizer", alphabet, **options)))
    assert tokenizer.encode_text("é漢")
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_drops_rarer_characters_is_used_with_a_warning(tmp_path, capfd):
    """As a byte-level BPE has it whose training text had no Korean: its bytes begin with 0xEA to 0xED."""
    folder = save_bpe(tmp_path / "tokenizer", [sign for sign in BYTES if sign not in "ê\u00ed"])
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    assert len(tokenizer.encode_text("한")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("tokenizer.json has no token for '한'; a text loses what has no token")


def test_merges_are_never_left_out_at_random(tmp_path):
    folder, text = write_tokenizer(tmp_path / "tokenizer"), "the cat and the hat and the rat"
    ids = load_tokenizer("-", str(folder)).encode_text(text)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(description))
    for tokenizer in (load_tokenizer("-", str(folder)), TextTokenizer.from_json(json.dumps(description), 0, 1)):
        assert all(tokenizer.encode_text(text) == ids for _ in range(20))
        assert json.loads(tokenizer.to_json())["model"]["dropout"] is None


def test_texts_are_encoded_in_chunks_by_number_and_length(folder, monkeypatch):
    texts = ["the ", "cat on", "a", "the mat " * 4, "b", "c", "d", "e"]
    tokenizer = load_tokenizer("-", str(folder))
    whole = [document.tolist() for document in tokenizer.encode_documents(texts)]
    monkeypatch.setattr(tokenizer_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 10)
    assert list(tokenizer_module.text_chunks(texts)) == [texts[:2], texts[2:3], texts[3:4], texts[4:7], texts[7:]]
    assert list(tokenizer_module.text_chunks([])) == []
    assert [document.tolist() for document in tokenizer.encode_documents(texts)] == whole


@pytest.mark.parametrize("byte_level", [True, False])
def test_the_bytes_of_a_character_that_is_cut_off_are_counted_as_they_are_spelled(tmp_path, byte_level):
    signs = BYTES if byte_level else [*"abc ", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = load_tokenizer(
        "--tokenizer", str(save_bpe(tmp_path / "tokenizer", signs, byte_level, byte_fallback=not byte_level))
    )
    whole = [decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend.decoder = decoders.ByteLevel() if byte_level else decoders.Sequence(whole)
    text = "ab \U00013000\U00013001é\ufffdc"  # with U+FFFD itself, too
    document = tokenizer.encode_documents([text])[0].tolist()
    beginning = len(document) - 1 - len(text.encode())  # each token of the text is a byte
    for cut in range(beginning, len(document)):
        assert tokenizer.count_bytes(document[:cut]) == cut - beginning
    assert tokenizer.count_bytes(document) == len(text.encode())
