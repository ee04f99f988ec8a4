"""The one comparison of two tokenizers: the same by any route, refused where ids mean other tokens or text differs."""

from __future__ import annotations

import json

import pytest

from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from teacher_world import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE with one token that is found in text."""
    write_tokenizer(tmp_path / "tokenizer")
    change(tmp_path / "tokenizer", lambda page: page["added_tokens"].append(added(263, "<tool>", special=False)))
    return tmp_path / "tokenizer"


def added(number, content, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def change(folder, how):
    page = json.loads((folder / "tokenizer.json").read_text())
    how(page)
    (folder / "tokenizer.json").write_text(json.dumps(page))


def compare(folder, how):
    """Compare the tokenizer with itself after a change."""
    first = load_tokenizer("-", str(folder))
    change(folder, how)
    require_same_tokenizer("--it", folder, "must be the same", first, load_tokenizer("-", str(folder)))


SAME = {
    "merges as pairs or as text": lambda page: page["model"].update(
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in page["model"]["merges"]]
    ),
    "post-processor": lambda page: page.update(
        post_processor={"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
    ),
    "truncation": lambda page: page.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ),
    "flags of control tokens": lambda page: page["added_tokens"][0].update(lstrip=True, normalized=True),
    "control tokens that are in the vocabulary only": lambda page: page.update(added_tokens=page["added_tokens"][1:]),
    "a sequence of one": lambda page: page.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [page["pre_tokenizer"]]}
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_id_of_any_text_is_the_same(folder, name, capfd):
    compare(folder, SAME[name])
    assert capfd.readouterr().err == ""


def swap(page):
    vocabulary = page["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


DIFFERENT = {
    "two tokens swapped": (swap, "token 66 is 'a', not 'b'"),
    "one more": (lambda page: page["added_tokens"].append(added(264, "<more>")), "264 tokens, not 265"),
    "other merges": (lambda page: page["model"]["merges"].reverse(), "the tokens are equal, but the merges differ"),
    "lower case": (lambda page: page.update(normalizer={"type": "Lowercase"}), "The quick brown"),
    "digits": (
        lambda page: page.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"String": "th"}, "behavior": "Removed", "invert": False},
            page["pre_tokenizer"]]}),
        "becomes other ids",
    ),
    "a token that text no longer becomes": (lambda page: page["added_tokens"][-1].update(special=True), "'<tool>'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_gives_other_ids_is_refused_with_the_place_and_both_hashes(folder, name):
    how, words = DIFFERENT[name]
    with pytest.raises(UserError) as caught:
        compare(folder, how)
    message = str(caught.value)
    assert message.startswith(f"--it: got {folder}; must be the same: ")
    assert words in message
    assert "\n" not in message
    assert "sha256" in message


def test_a_space_at_the_beginning_alone_is_said_and_accepted(folder, capfd):
    def strip(page):
        page["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": ""}

    change(folder, lambda page: page["added_tokens"].pop())
    compare(folder, strip)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: --it ")
    assert "' a space at the beginning'" in line


@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_saved_by_transformers_it_is_the_same(folder, tmp_path, loader):
    import transformers

    getattr(transformers, loader).from_pretrained(folder).save_pretrained(tmp_path / "saved")
    first, again = (load_tokenizer("-", str(path)) for path in (folder, tmp_path / "saved"))
    require_same_tokenizer("--it", "saved", "must be the same", first, again)
    assert again.sha256 == first.sha256


@pytest.mark.shared
def test_the_llama_tokenizer_saved_by_transformers_drops_a_leading_space(shared, tmp_path, capfd):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(shared / "tokenizer").save_pretrained(tmp_path)
    first, again = (load_tokenizer("-", str(path)) for path in (shared / "tokenizer", tmp_path))
    require_same_tokenizer("--teacher", tmp_path, "must have the dataset's tokenizer", first, again)
    assert "texts that begin with a space" in capfd.readouterr().err


@pytest.mark.shared
def test_the_wrongly_converted_llama_tokenizer_is_another_one(shared):
    first, wrong = (load_tokenizer("-", str(shared / "tokenizer" / name)) for name in ("", "before-2026-11-28"))
    with pytest.raises(UserError, match="the tokens are equal, but the merges differ"):
        require_same_tokenizer("--data", "it", "must have the dataset's tokenizer", first, wrong)
