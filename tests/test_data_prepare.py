"""`indra prepare`: the user's pickle to the last id, both layouts of the same documents, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace

from indraquantum.config import PrepareSettings, ShowSettings
from indraquantum.data import dataset
from indraquantum.data.dataset import open_dataset
from indraquantum.data.inspect import describe, show_rows
from indraquantum.data.prepare import prepare, random_order
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.monitor.summaries import prepare_summary
from tiny_tokenizer import BOS, EOS, ids, save_tiny_tokenizer

PROMPT = "### Instruction : "
ANSWER = " ### Response : "
# Twelve documents whose ids are worked out by hand: the words of the text as the tiny tokenizer splits it.
WIKI = {
    "the cat sat .": "the cat sat .",
    "the <unk> dog": "the < unk > dog",
    "a @-@ b </s> c": "a @-@ b </ s > c",
    "the dog ran on the mat and the cat sat on the dog .": "the dog ran on the mat and the cat sat on the dog .",
    "= a": "= a",
    "red": "red",
}
ALPACA = {
    ("Add", "2 and 3", "5"): PROMPT + "Add ### Input : 2 and 3" + ANSWER + "5",
    ("Add 2 and 3.", "", "5"): PROMPT + "Add 2 and 3 ." + ANSWER + "5",
    ("Name it", "", "a cat\n\nand\ta dog"): PROMPT + "Name it" + ANSWER + "a cat and a dog",
    ("Name it", "red", ""): PROMPT + "Name it ### Input : red" + ANSWER.rstrip(),
    ("Add <s>", "", "b"): PROMPT + "Add < s >" + ANSWER + "b",
    ("Input:", "### Response:", "c"): PROMPT + "Input : ### Input : ### Response :" + ANSWER + "c",
}
LENGTH = 13


def settings(folder, **changes):
    """Settings over the twelve documents, written into `folder` where they are not there yet."""
    wiki, alpaca = folder / "wiki.tokens", folder / "alpaca.json"
    if not wiki.exists():
        wiki.write_text(" = Title = \n \n" + "".join(f" {text} \n" for text in WIKI), encoding="utf-8")
        items = [dict(zip(("instruction", "input", "output"), sample, strict=True)) for sample in ALPACA]
        alpaca.write_text(json.dumps(items), encoding="utf-8")
        save_tiny_tokenizer(folder / "tokenizer")
    given = {"wikitext": str(wiki), "alpaca": str(alpaca), "tokenizer": str(folder / "tokenizer")}
    return PrepareSettings(**({"max_length": LENGTH, "output": folder / "out" / "mixed.pkl"} | given | changes))


def full_text(sample):
    """The prompt once more, written another way than in the package."""
    instruction, given, output = sample
    parts = ["### Instruction:", instruction, "", "### Response:", output]
    if given:
        parts[2:2] = ["", "### Input:", given]
    return "\n".join(parts)


def documents():
    """Every document as ids, BOS and EOS around it, by its text."""
    texts = WIKI | {full_text(sample): words for sample, words in ALPACA.items()}
    return {text: [BOS, *ids(words), EOS] for text, words in texts.items()}


def held_out(texts):
    """The texts of a source of at most 8 that are held out: the half, at most 4, with the smallest hashes."""
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(b"held out\0" + text.encode()).digest())
    return set(by_hash[: min(4, len(texts) // 2)])


def padded(document):
    kept = document[:LENGTH]
    missing = LENGTH - len(kept)
    return {"input_ids": kept + [EOS] * missing, "attention_mask": [1] * len(kept) + [0] * missing}


def stream_documents(split):
    return [
        split.tokens[a:b].tolist() for a, b in zip(split.document_offsets, split.document_offsets[1:], strict=False)
    ]


def sort_rows(rows):
    return sorted(rows, key=json.dumps)


def test_the_pickle_and_the_folder_to_the_last_id(tmp_path):
    report = prepare(settings(tmp_path))
    held = held_out(list(WIKI)) | held_out([full_text(sample) for sample in ALPACA])
    training = [document for text, document in documents().items() if text not in held]
    rows = pickle.loads(report.pickle.read_bytes())
    assert sort_rows(rows) == sort_rows(map(padded, training))
    assert {type(row) for row in rows} == {dict}
    assert {type(number) for row in rows for numbers in row.values() for number in numbers} == {int}

    dataset = open_dataset("--data", report.folder, verify=True)
    assert sorted(stream_documents(dataset.train)) == sorted(training)
    assert sorted(stream_documents(dataset.validation)) == sorted(documents()[text] for text in held)
    assert dataset.source_names == ("wikitext", "alpaca")
    assert np.bincount(dataset.train.document_sources).tolist() == [3, 3]

    lengths = np.array([len(document) for document in training])
    assert report.tokens == lengths.sum()
    assert report.rows == dataset.train.num_rows
    assert report.fill == pytest.approx(lengths.sum() / (report.rows * LENGTH))
    assert report.padding_share == pytest.approx(np.maximum(LENGTH - lengths, 0).sum() / (LENGTH * len(lengths)))
    assert report.cut_share == pytest.approx(np.maximum(lengths - LENGTH, 0).sum() / lengths.sum())
    assert [(s.name, s.available, s.documents, s.validation_documents) for s in report.sources] == [
        ("wikitext", 6, 6, 3), ("alpaca", 6, 6, 3),
    ]  # fmt: skip
    assert len(report.notes) == 2
    assert "wikitext has only 6 of the 22,000 samples asked for" in report.notes[0]


def test_the_test_split_is_another_part_that_no_training_file_holds(tmp_path):
    settings(tmp_path)
    texts = [f"the cat sat on the mat {number}" for number in range(500)]
    (tmp_path / "wiki.tokens").write_text("\n".join(texts))
    report = prepare(settings(tmp_path, alpaca_samples=0))
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(b"held out\0" + text.encode()).digest())
    dataset = open_dataset("--data", report.folder, verify=True)
    places = {name: [texts[n] for n in split.document_numbers] for name, split in dataset.splits.items()}
    assert sorted(places["validation"]) == sorted(by_hash[:5])
    assert sorted(places["test"]) == sorted(by_hash[5:10])
    assert sorted(places["train"]) == sorted(by_hash[10:])
    assert len(pickle.loads(report.pickle.read_bytes())) == report.padded_rows == 490
    source = dataset.manifest["sources"][0]
    assert (source["documents"], source["validation_documents"], source["test_documents"]) == (500, 5, 5)
    assert (report.test_rows, report.test_tokens) == (dataset.test.num_rows, dataset.test.num_tokens)
    assert "held out: 5 for validation, 5 for the test" in prepare_summary(report)
    assert "\ntest: " in describe(report.folder)
    shown = show_rows(report.folder, ShowSettings(split="test", rows=9))
    assert shown.count("wikitext ") >= 5
    few = prepare(settings(tmp_path, wikitext_samples=0, output=tmp_path / "few" / "m.pkl"))
    assert (few.test_rows, open_dataset("--data", few.folder).test) == (0, None)
    with pytest.raises(UserError, match="--split: got test; must be one of the dataset's splits"):
        show_rows(few.folder, ShowSettings(split="test"))


# Three of them as plain numbers, by counting in the tiny tokenizer's list of words; cut or padded to 13.
NUMBERS = [
    ([4, 1, 3, 5, 8, 2, 2, 2, 2, 2, 2, 2, 2], 6),  # the cat sat .
    ([4, 9, 10, 11, 14, 15, 18, 16, 8, 9, 13, 11, 17], 13),  # Add 2 and 3. -> 5; its EOS is cut off
    ([4, 1, 19, 21, 20, 30, 2, 2, 2, 2, 2, 2, 2], 7),  # the <unk> dog
]


def all_padded_rows(report, length):
    """The rows of the pickle, and those that the held-out documents would give, as (ids, real tokens)."""
    validation = stream_documents(open_dataset("--data", report.folder).validation)
    rows = [((document + [2] * length)[:length], min(len(document), length)) for document in validation]
    for row in pickle.loads(report.pickle.read_bytes()):
        real = sum(row["attention_mask"])
        assert row["attention_mask"] == [1] * real + [0] * (length - real)
        rows.append((row["input_ids"], real))
    return rows


def test_three_samples_number_by_number(tmp_path):
    rows = all_padded_rows(prepare(settings(tmp_path)), LENGTH)
    for expected in NUMBERS:
        assert rows.count(expected) == 1, expected


def test_the_same_bytes_by_seed(tmp_path):
    chosen = settings(tmp_path, wikitext_samples=5, alpaca_samples=4)

    def run(name, **changes):
        report = prepare(chosen.model_copy(update={"output": tmp_path / name / "m.pkl"} | changes))
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return report, {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files}

    (first, first_files), (_, again) = run("first"), run("again")
    assert again == first_files
    assert [(s.available, s.documents) for s in first.sources] == [(6, 5), (6, 4)]
    assert first.notes == ()
    everything = {"wikitext_samples": 6, "alpaca_samples": 6}
    shuffled = [pickle.loads(run(f"seed {seed}", seed=seed, **everything)[1]["m.pkl"]) for seed in range(5)]
    assert all(sort_rows(rows) == sort_rows(shuffled[0]) for rows in shuffled), (
        "the seed does not choose what is held out"
    )
    assert len({json.dumps(rows) for rows in shuffled}) > 1


def test_a_seed_draws_the_same_on_every_numpy():
    # PCG64's raw stream is promised for good; these are the ranks of its first five numbers for seed [7, 0].
    raw = [int(number) for number in np.random.PCG64([7, 0]).random_raw(5)]
    assert random_order(5, 7, 0).tolist() == sorted(range(5), key=raw.__getitem__)
    assert sorted(random_order(101, 3, 1).tolist()) == list(range(101))
    assert random_order(101, 3, 1).tolist() != random_order(101, 4, 1).tolist()
    random_order(3, 2**63 - 1, 2)


def test_one_source_alone_needs_no_other(tmp_path):
    report = prepare(settings(tmp_path, alpaca="missing.json", alpaca_samples=0))
    assert [source.name for source in report.sources] == ["wikitext"]
    assert open_dataset("--data", report.folder).source_names == ("wikitext",)


def test_the_pickle_opens_as_a_dataset(tmp_path):
    report = prepare(settings(tmp_path))
    dataset = open_dataset("--data", report.pickle, str(tmp_path / "tokenizer"))
    assert dataset.train.num_rows + dataset.validation.num_rows == report.padded_rows == 6


LOSSY = {
    "spaces": (Whitespace(), ["line breaks", "runs of spaces"]),
    "nothing": (Split(Regex("."), "isolated"), []),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_what_a_tokenizer_loses_is_told(tmp_path, capsys, kind):
    cut, lost = LOSSY[kind]
    letters = [chr(number) for number in range(32, 127)] + ["\n", "é", "ж", "漢", "😀"]
    words = ["<unk>", "<s>", "</s>", *letters, "one", "Two", "three"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = cut, Fuse()
    (tmp_path / "own").mkdir()
    backend.save(str(tmp_path / "own" / "tokenizer.json"))
    prepare(settings(tmp_path, tokenizer=str(tmp_path / "own")))
    said = capsys.readouterr().err
    if lost:
        assert (
            f"--tokenizer {tmp_path / 'own'} does not keep {', '.join(lost)} of a text; instructions and code" in said
        )
    else:
        assert "does not keep" not in said


@pytest.mark.parametrize(("unknown", "warned"), [(1, False), (9, True)])
def test_text_that_becomes_the_unknown_token_is_told(tmp_path, capsys, unknown, warned):
    """Of 5,000 tokens (4 words, BOS and EOS in each document), 1 in 1,000 may be unknown: 5."""
    settings(tmp_path)
    lines = ["the cat sat on"] * 833 + ["the zebra sat on"] * unknown
    (tmp_path / "own.txt").write_text("\n".join(lines))
    given = {"wikitext_samples": 0, "alpaca_samples": 0, "text": (str(tmp_path / "own.txt"),)}
    report = prepare(settings(tmp_path, **given))
    said = capsys.readouterr().err
    assert ("own: " in said and "% of the tokens are <unk>, which stands for text that" in said) == warned
    if warned:
        share = unknown / sum(source.tokens for source in report.sources)
        assert f"{share:.1%} of the tokens" in said
        splits = [split for split in ("train", "validation", "test") if (report.folder / split).is_dir()]
        shown = "".join(show_rows(report.folder, ShowSettings(rows=10_000, split=split)) for split in splits)
        assert shown.count("<s>the <unk> sat on</s>") == unknown


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_replaces_the_first_but_nobody_elses_folder(tmp_path):
    chosen = settings(tmp_path)
    prepare(chosen)
    report = prepare(chosen.model_copy(update={"max_length": 9}))
    assert open_dataset("--data", report.folder).row_length == 9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mixed", "mixed.pkl", "mixed.pkl.json"]
    (report.folder / "manifest.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="not a prepared dataset"):
        prepare(chosen)
    assert snapshot(tmp_path) == before


BAD = [
    ({"wikitext": "missing.tokens"}, "--wikitext", "missing.tokens"),
    ({"alpaca": "missing.json"}, "--alpaca", "missing.json"),
    ({"tokenizer": "missing/tokenizer.json"}, "--tokenizer", "missing"),
    ({"wikitext_samples": 0, "alpaca_samples": 0}, "--wikitext-samples", "0"),
    ({"wikitext_samples": 1, "alpaca_samples": 0}, "--wikitext", "2 different documents"),
    ({"output": "mixed"}, "--output", "must end in .pkl"),
    ({"output": "wiki.tokens/mixed.pkl"}, "--output", "can be written"),
    ({"output": "/proc/mixed.pkl"}, "--output", "/proc"),
]


@pytest.mark.parametrize(("changes", "field", "word"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, changes, field, word):
    chosen = settings(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(chosen)
    assert caught.value.field == field
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_the_old_files(tmp_path, monkeypatch):
    chosen = settings(tmp_path)
    prepare(chosen)
    before = snapshot(tmp_path)

    def full(*arguments, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(dataset, "save_npy", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(chosen.model_copy(update={"max_length": 9}))
    assert snapshot(tmp_path) == before


def shrink(monkeypatch):
    """Make everything that is done in parts need many of them."""
    from indraquantum.data import large_arrays, padded, records, tokenizer
    from indraquantum.data import prepare as preparation

    for module, name, size in (
        (preparation, "WINDOW_DOCUMENTS", 40), (tokenizer, "CHUNK_DOCUMENTS", 7), (preparation, "CHUNK_ROWS", 5),
        (large_arrays, "CHUNK_ENTRIES", 64), (padded, "CHUNK_ROWS", 3), (records, "TABLE_ROWS", 6),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)


def test_parts_make_the_same_whole(tmp_path, monkeypatch):
    """Small parts change which documents share a row, and nothing else."""
    settings(tmp_path)
    words = [*"abcdef", "the", "cat", "sat", "on", "mat", "dog", "ran", "red"]
    texts = [" ".join(words[(n * k) % 14] for k in range(1, 2 + n % 31)) + f" {n}" for n in range(300)]
    (tmp_path / "wiki.tokens").write_text("\n".join(texts))
    whole = prepare(settings(tmp_path, output=tmp_path / "whole" / "m.pkl"))
    shrink(monkeypatch)
    parts = prepare(settings(tmp_path, output=tmp_path / "parts" / "m.pkl"))
    assert pickle.loads(parts.pickle.read_bytes()) == pickle.loads(whole.pickle.read_bytes())
    one, other = (open_dataset("--data", report.folder, verify=True) for report in (whole, parts))
    for split in ("train", "validation"):
        for name in ("tokens", "document_offsets", "document_sources", "document_numbers"):
            assert np.array_equal(getattr(getattr(one, split), name), getattr(getattr(other, split), name))
    assert parts.rows >= whole.rows
    assert parts.fill > 0.9


def test_long_texts_are_encoded_few_at_a_time(tmp_path, monkeypatch):
    from indraquantum.data import tokenizer

    settings(tmp_path)
    texts = [f"{n} " + "the cat sat on the mat " * (n % 9) for n in range(90)]
    (tmp_path / "wiki.tokens").write_text("\n".join(texts))
    whole = prepare(settings(tmp_path, output=tmp_path / "whole" / "m.pkl"))
    sizes, encode = [], tokenizer.TextTokenizer.encode_documents

    def counted(self, chunk):
        sizes.append(sum(map(len, chunk)))
        return encode(self, chunk)

    monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(tokenizer.TextTokenizer, "encode_documents", counted)
    parts = prepare(settings(tmp_path, output=tmp_path / "parts" / "m.pkl"))
    assert max(sizes) <= 300
    assert pickle.loads(parts.pickle.read_bytes()) == pickle.loads(whole.pickle.read_bytes())


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    shrink(monkeypatch)
    chosen = settings(tmp_path, alpaca_samples=0, wikitext_weight=1, max_length=256)

    def peak(documents):
        with open(tmp_path / "wiki.tokens", "w") as file:
            file.writelines(f"{n} " + "the cat sat on the mat and ran " * 30 + "\n" for n in range(documents))
        tracemalloc.start()
        prepare(chosen)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # imports are done
    small, large = peak(100), peak(600)
    assert large - small < 200 * 500, "500 documents of 1 kB and 211 tokens, one a row"


@pytest.mark.parametrize("amount", [{"wikitext_weight": 1}, {"wikitext_samples": 4_000}])
def test_memory_for_each_document_is_bounded(tmp_path, monkeypatch, amount):
    """5 GB of WikiText are 8.7 million paragraphs and must fit in 1 GiB: at 64 bytes each they take 0.56 GB."""
    shrink(monkeypatch)
    monkeypatch.setattr("indraquantum.data.padded.CHUNK_ROWS", 64)
    chosen = settings(tmp_path, alpaca_samples=0, max_length=8, **amount)

    def peak(documents):
        (tmp_path / "wiki.tokens").write_text("".join(f"{n} the cat sat on\n" for n in range(documents)))
        tracemalloc.start()
        report = prepare(chosen)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.rows > report.sources[0].documents / 2, "rows take memory too"
        return found

    peak(100)  # imports are done
    small, large = peak(500), peak(4_500)
    assert large - small < 64 * 4_000, (large - small) / 4000


# Ids from SentencePiece itself on the texts written out, BOS 1 before and EOS 2 behind; cut or padded with 2 to 24.
SHARED_ROWS = {
    ("Add 2 and 3.", "", "5"): (
        [1, 835, 2799, 4080, 29901, 13, 2528, 29871, 29906, 322, 29871, 29941, 29889, 13, 13, 2277, 29937, 13291, 29901,
         13, 29945, 2, 2, 2],
        22,
    ),
    ("Translate to French.", "cheese", "fromage"): (
        [1, 835, 2799, 4080, 29901, 13, 4300, 9632, 304, 5176, 29889, 13, 13, 2277, 29937, 10567, 29901, 13, 1173, 968,
         13, 13, 2277, 29937],
        24,
    ),
    "The <unk> cat </s> @-@ sat . <s>": (
        [1, 450, 529, 2960, 29958, 6635, 1533, 29879, 29958, 732, 29899, 29992, 3290, 869, 529, 29879, 29958, 2, 2, 2,
         2, 2, 2, 2],
        18,
    ),
}  # fmt: skip


@pytest.mark.shared
def test_three_padded_samples_under_the_real_tokenizer(tmp_path, shared):
    tokenizer = str(shared / "tokenizer")
    chosen = settings(tmp_path, tokenizer=tokenizer, max_length=24)
    items = [dict(zip(("instruction", "input", "output"), key, strict=True)) for key in SHARED_ROWS if len(key) == 3]
    # Which of them are held out is up to their hashes, so the padded rows are taken from both sides.
    (tmp_path / "alpaca.json").write_text(json.dumps(items))
    (tmp_path / "wiki.tokens").write_text(list(SHARED_ROWS)[2] + "\n")
    report = prepare(chosen)
    assert sorted(all_padded_rows(report, 24)) == sorted(SHARED_ROWS.values())


@pytest.mark.shared
def test_real_text_round_trips(tmp_path, shared):
    report = prepare(
        PrepareSettings(
            wikitext=str(shared / "data/wikitext/wiki.valid.tokens"),
            alpaca=str(shared / "data/alpaca/alpaca_data.json"),
            tokenizer=str(shared / "tokenizer"),
            wikitext_samples=400,
            alpaca_samples=600,
            output=tmp_path / "mixed.pkl",
        )
    )
    dataset = open_dataset("--data", report.folder)
    items = json.loads((shared / "data/alpaca/alpaca_data.json").read_text(encoding="utf-8"))
    known = {full_text((item["instruction"], item["input"], item["output"])) for item in items}
    lines = (shared / "data/wikitext/wiki.valid.tokens").read_text(encoding="utf-8").split("\n")
    known |= {line.strip() for line in lines}
    for split in (dataset.train, dataset.validation):
        for document in stream_documents(split):
            assert document[0] == 1
            assert document[-1] == 2
            assert not {0, 1, 2} & set(document[1:-1]), "a control token inside a document"
            assert dataset.tokenizer.decode(document) in known
    assert report.fill >= 0.985
    assert [source.validation_documents for source in report.sources] == [4, 6]
    assert load_tokenizer("-", str(shared / "tokenizer")).sha256 == dataset.tokenizer.sha256
