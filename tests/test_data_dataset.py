"""The prepared dataset: batches against a slow reference, folders and pickles opened, damage refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.data.dataset import open_dataset, write_dataset
from indraquantum.data.held_out import TEST, TRAIN, VALIDATION, choose_held_out
from indraquantum.data.packing import pack
from indraquantum.data.padded import write_padded
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import SEAL, write_manifest_json
from tiny_tokenizer import BOS, EOS, IDS, save_tiny_tokenizer


def make_split(documents, sources, row_length):
    """Pack lists of ids."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    packing = pack(lengths, row_length)
    pieces = packing.pieces.copy()
    pieces[:, 0] += offsets[packing.documents]
    return Split(
        tokens=np.concatenate([np.array(document, dtype=np.uint16) for document in documents]),
        document_offsets=offsets,
        document_sources=np.array(sources, dtype=np.uint8),
        pieces=pieces,
        row_pieces=packing.row_pieces,
        row_length=row_length,
        padding_id=EOS,
    )


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=23), st.integers(0, 2)), min_size=1, max_size=20
    ),
    st.integers(2, 11),
    st.randoms(use_true_random=False),
)
def test_batch_against_a_reference(documents, row_length, draw):
    texts, sources = [document for document, _ in documents], [source for _, source in documents]
    split = make_split(texts, sources, row_length)
    document_of = [number for number, text in enumerate(texts) for _ in text]
    rows = draw.sample(range(split.num_rows), draw.randint(1, split.num_rows))
    batch = split.batch(np.array(rows))
    used = []
    for b, row in enumerate(rows):
        column = 0
        before = sum(
            int(length) for r in range(row) for _, length in split.pieces[split.row_pieces[r] : split.row_pieces[r + 1]]
        )
        for segment, (start, length) in enumerate(split.pieces[split.row_pieces[row] : split.row_pieces[row + 1]]):
            for position in range(length):
                stream = int(start) + position
                document = document_of[stream]
                used.append(stream)
                inside = stream - int(split.document_offsets[document])
                following = texts[document][inside + 1] if inside + 1 < len(texts[document]) else -100
                expected = (texts[document][inside], following, position, segment, sources[document], before + column)
                assert tuple(int(array[b, column]) for array in batch) == expected
                column += 1
        for padding in range(column, row_length):
            assert tuple(int(array[b, padding]) for array in batch) == (EOS, -100, 0, -1, -1, -1)
    assert len(set(used)) == len(used)
    if len(rows) == split.num_rows:
        assert sorted(used) == list(range(split.num_tokens)), "each token exactly once"
    assert all(array.dtype == np.int64 and array.shape == (len(rows), row_length) for array in batch)


def test_batch_by_hand():
    # One document of 8 tokens over rows of 5, one of 2: rows [10..14], [15 16 17 | 20 21].
    split = make_split([[10, 11, 12, 13, 14, 15, 16, 17], [20, 21]], [1, 0], 5)
    by_row = {int(batch.input_ids[0, 0]): batch for batch in (split.batch(np.array([row])) for row in range(2))}
    assert by_row[10].labels.tolist() == [[11, 12, 13, 14, 15]], (
        "a piece's end is followed by its document's next token"
    )
    mixed = by_row[20]
    assert mixed.input_ids.tolist() == [[20, 21, 15, 16, 17]]
    assert mixed.labels.tolist() == [[21, -100, 16, 17, -100]]
    assert mixed.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert mixed.segments.tolist() == [[0, 0, 1, 1, 1]]
    assert mixed.sources.tolist() == [[0, 0, 1, 1, 1]]


@pytest.fixture
def tokenizer_folder(tmp_path):
    return save_tiny_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer("-", str(tokenizer_folder))
    documents = [[BOS, *range(5, 5 + length), EOS] for length in (3, 11, 2, 7, 1)]
    splits = {"train": make_split(documents, [0, 0, 1, 1, 1], 7), "validation": make_split(documents[:2], [0, 1], 7)}
    splits["test"] = make_split(documents[1:4], [0, 0, 1], 7)
    write_dataset(tmp_path / "mixed", splits, [{"name": "wiki"}, {"name": "alpaca"}], tokenizer, {"seed": 3})
    return tmp_path / "mixed"


def test_a_folder_comes_back_memory_mapped(folder, tokenizer_folder):
    dataset = open_dataset("--data", folder, str(tokenizer_folder))
    assert isinstance(dataset.train.tokens, np.memmap)
    assert dataset.source_names == ("wiki", "alpaca")
    assert (dataset.row_length, dataset.train.num_documents, dataset.train.num_tokens) == (7, 5, 34)
    assert dataset.tokenizer.sha256 == load_tokenizer("-", str(tokenizer_folder)).sha256
    assert (dataset.tokenizer.bos_id, dataset.tokenizer.eos_id) == (BOS, EOS)
    assert dataset.manifest["options"] == {"seed": 3}
    assert open_dataset("--data", folder, verify=True).content_sha256 == dataset.content_sha256
    for name, facts in dataset.manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *dataset.manifest["files"], "manifest.json",
    }  # fmt: skip


def refused(path, *words, tokenizer=None, field="--data", verify=False):
    with pytest.raises(UserError) as caught:
        open_dataset("--data", path, tokenizer, verify=verify)
    message = str(caught.value)
    assert caught.value.field == field
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest.pop(SEAL)
    write_manifest_json(path, manifest)


def test_other_folders_are_refused(folder, tmp_path):
    refused(tmp_path / "missing", "does not exist")
    refused(tmp_path, "manifest.json")
    for version in (1, 4):
        change_manifest(folder, format_version=version)
        refused(folder, f"format version {version}", "reads 2 and 3")
    change_manifest(folder, format_version=3, files=None)
    refused(folder, "manifest.json", "is damaged")
    (folder / "manifest.json").write_text("[]")
    refused(folder, "manifest.json")


NONSENSE = [
    ({"row_length": "64"}, "row_length '64'"),
    ({"row_length": 0}, "row_length '0'"),
    ({"row_length": True}, "row_length 'True'"),
    ({"bos_id": -1}, "bos_id '-1'"),
    ({"bos_id": len(IDS)}, f"bos_id must be below vocabulary_size {len(IDS)}"),
    ({"bos_id": IDS["cat"]}, "does not begin with bos_id"),
    ({"eos_id": None}, "eos_id 'None'"),
    ({"eos_id": IDS["cat"]}, "does not end with eos_id"),
    ({"vocabulary_size": 1.5}, "vocabulary_size '1.5'"),
    ({"tokenizer_sha256": "0" * 63}, "tokenizer_sha256"),
    ({"content_sha256": 7}, "content_sha256 '7'"),
    ({"options": []}, "options"),
    ({"versions": {"numpy": 2}}, "versions.numpy '2'"),
    ({"sources": []}, "sources"),
    ({"sources": [{"name": "wiki"}, {"name": "wiki"}]}, "different names"),
    ({"sources": [{"name": 1}, {"name": "alpaca"}]}, "sources.0.name '1'"),
    ({"sources": [{"name": "wiki", "tokens": -1}, {"name": "alpaca"}]}, "sources.0.tokens '-1'"),
    ({"largest_ids": {"train": 3}}, "largest_ids.validation"),
    ({"largest_ids": {"train": -3, "validation": 3}}, "largest_ids.train '-3'"),
    ({"largest_ids": {"train": 3, "validation": 3, "test": None}}, "largest_ids.test 'None'"),
    ({"files": {}}, "list of files lacks tokenizer.json"),
]


@pytest.mark.parametrize(("changes", "word"), NONSENSE, ids=[case[1] for case in NONSENSE])
def test_nonsense_in_a_manifest_whose_hash_is_mended_is_refused_by_name(folder, changes, word):
    change_manifest(folder, **changes)
    refused(folder, word, verify=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "train/../../outside", "train//tokens.npy", "a\\b", ""])
def test_names_outside_the_folder_are_refused(folder, name):
    (folder.parent / "outside").write_text("x")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    content = hashlib.sha256(b"x").hexdigest()
    change_manifest(folder, files=files | {name: {"sha256": content, "bytes": 1}})
    refused(folder, "manifest.json", "is damaged: files")


def test_a_manifest_with_half_a_surrogate_pair_is_shown_anywhere_and_is_damaged(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["text"] = "wik\u00ef\ud800"
    path.write_text(json.dumps(manifest))
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "indraquantum", "data", "info", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert "wik\u00ef\\ud800".encode(encoding, "backslashreplace") in done.stdout
    refused(folder, "manifest.json", "is damaged", verify=True)


def test_a_manifest_without_a_field_names_it(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in [name for name in manifest if name not in ("format", "format_version", SEAL)]:
        write_manifest_json(path, {key: value for key, value in manifest.items() if key not in (name, SEAL)})
        refused(folder, f"is damaged: {name}: Field required")


def test_another_tokenizer_is_refused(folder, tokenizer_folder):
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    description["model"]["vocab"]["new"] = len(IDS)
    (tokenizer_folder / "tokenizer.json").write_text(json.dumps(description))
    refused(folder, "must be the tokenizer of the dataset", tokenizer=str(tokenizer_folder), field="--tokenizer")


def test_missing_and_short_files_are_refused(folder):
    tokens = folder / "train" / "tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    refused(folder, "tokens.npy", f"{len(whole)} bytes, but it has {len(whole) - 1}")
    tokens.unlink()
    refused(folder, "tokens.npy", "but it is missing")


def test_one_flipped_bit_is_found_by_verify(folder):
    tokens = folder / "validation" / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-2] ^= 1
    tokens.write_bytes(content)
    open_dataset("--data", folder)
    refused(folder, "validation/tokens.npy", "SHA-256", verify=True)


WRONG = [
    ("tokens", lambda a: np.where(np.arange(len(a)) == 4, len(IDS), a).astype(a.dtype), f"id {len(IDS)}"),
    ("tokens", lambda a: a.astype(np.int32), "uint16 or uint32"),
    ("document_sources", lambda a: a + np.uint8(1), "source is unknown"),
    ("document_offsets", lambda a: np.where(a == a[1], a[2], a), "a document is empty"),
    ("document_offsets", lambda a: a + (a > 0), "do not cover"),
    ("pieces", lambda a: a + np.array([0, 1]), "damaged"),
    ("pieces", lambda a: a * np.array([-1, 1]), "out of range"),
    ("pieces", lambda a: a[:, 0], "wrong shape"),
    ("row_pieces", lambda a: a[::2], "damaged"),
]


@pytest.mark.parametrize(("name", "change", "word"), WRONG, ids=[f"{case[0]} {case[2]}" for case in WRONG])
def test_arrays_that_do_not_fit_are_refused(folder, name, change, word):
    path = folder / "train" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][f"train/{name}.npy"] = {"bytes": path.stat().st_size, "sha256": digest}
    change_manifest(folder, files=manifest["files"])
    refused(folder, "train", word, verify=True)


def test_objects_in_arrays_are_never_unpickled(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (eval, (f"__import__('os').mkdir({str(tmp_path / 'canary')!r})",))

    path = folder / "train" / "tokens.npy"
    np.save(path, np.array([Hostile()], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["train/tokens.npy"]["bytes"] = path.stat().st_size
    change_manifest(folder, files=manifest["files"])
    refused(folder, "tokens.npy", "is damaged")
    assert not (tmp_path / "canary").exists()


# Pickles of padded rows.

ROWS = [{"input_ids": [BOS, 5 + n, 6 + n, EOS, EOS], "attention_mask": [1, 1, 1, 1, 0]} for n in range(13)]


def save_rows(path, rows):
    path.write_bytes(pickle.dumps(rows))
    return path


def test_a_pickle_is_one_document_a_row(tmp_path, tokenizer_folder, capsys):
    rows = [*ROWS, {"input_ids": [BOS, 7, 8, 9, 10], "attention_mask": [1] * 5, "more": 3, "labels": [-100] * 5}]
    path = save_rows(tmp_path / "p.pkl", rows)
    dataset = open_dataset("--data", path, str(tokenizer_folder))
    said = capsys.readouterr().err
    assert f"note: {path}: 1 rows have 'labels', which is not used; every real token is a label\n" in said
    assert f"note: {path}: 1 rows have 'more', which is not used\n" in said
    assert dataset.manifest["sources"][0]["unused_fields"] == {"more": 1, "labels": 1}
    assert (dataset.validation.num_rows, dataset.train.num_rows) == (4, 10)
    seen = []
    for split in (dataset.train, dataset.validation):
        batch = split.batch(np.arange(split.num_rows))
        seen += [
            {"input_ids": ids.tolist(), "attention_mask": (segment >= 0).astype(int).tolist()}
            for ids, segment in zip(batch.input_ids, batch.segments, strict=True)
        ]
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.segments >= 0, strict=True):
            real = int(mask.sum())
            # A real EOS is learned; what pads, the same id, is not.
            assert labels.tolist() == [*ids[1:real].tolist(), *[-100] * (6 - real)]
    key = json.dumps
    assert sorted(map(key, seen)) == sorted(key({k: row[k] for k in ROWS[0]}) for row in rows)
    again = open_dataset("--data", save_rows(tmp_path / "q.pkl", rows), str(tokenizer_folder))
    assert again.content_sha256 == dataset.content_sha256
    other = open_dataset("--data", save_rows(tmp_path / "q.pkl", rows[1:]), str(tokenizer_folder))
    assert other.content_sha256 != dataset.content_sha256


def test_write_padded_by_hand(tmp_path):
    documents = [np.array(document) for document in ([4, 9, 8, 2], [4, 5, 6, 7, 8, 9, 2], [4, 2])]
    write_padded(tmp_path / "p.pkl", documents, 5, 2)
    assert pickle.loads((tmp_path / "p.pkl").read_bytes()) == [
        {"input_ids": [4, 9, 8, 2, 2], "attention_mask": [1, 1, 1, 1, 0]},
        {"input_ids": [4, 5, 6, 7, 8], "attention_mask": [1, 1, 1, 1, 1]},
        {"input_ids": [4, 2, 2, 2, 2], "attention_mask": [1, 1, 0, 0, 0]},
    ]


def test_write_padded_in_chunks_and_with_wide_ids(tmp_path, monkeypatch):
    from indraquantum.data import padded

    monkeypatch.setattr(padded, "CHUNK_ROWS", 3)
    documents = [np.arange(start, start + length) for start, length in ((0, 3), (250, 9), (65_530, 7), (70_000, 1))] * 5
    write_padded(tmp_path / "p.pkl", iter(documents), 8, 300)
    expected = [
        {
            "input_ids": (document.tolist() + [300] * 8)[:8],
            "attention_mask": [int(place < len(document)) for place in range(8)],
        }
        for document in documents
    ]
    assert pickle.loads((tmp_path / "p.pkl").read_bytes()) == expected


ONES = [1] * 5
BAD_ROWS = [
    ({"input_ids": [1]}, "list of at least one row"),
    ([], "list of at least one row"),
    ([*ROWS, 3], "row 13 must be a dict"),
    ([*ROWS, {"input_ids": ONES}], "row 13", "attention_mask"),
    ([*ROWS, {"input_ids": "texts", "attention_mask": ONES}], "row 13", "input_ids", "integers"),
    ([*ROWS, {"input_ids": [1, 1, 1, 1, 1.0], "attention_mask": ONES}], "row 13", "integers"),
    ([*ROWS, {"input_ids": [1, 1, 1, 1, True], "attention_mask": ONES}], "row 13", "integers"),
    ([*ROWS, {"input_ids": [1, 1, 1, 1, 2**70], "attention_mask": ONES}], "row 13", "64 bits"),
    ([*ROWS, {"input_ids": [1] * 4, "attention_mask": [1] * 4}], "row 13", "5 long"),
    ([*ROWS, {"input_ids": ONES, "attention_mask": [1] * 4}], "row 13", "5 long"),
    ([*ROWS, {"input_ids": ONES, "attention_mask": [0, 1, 1, 1, 1]}], "row 13", "one or more ones, followed by zeros"),
    ([*ROWS, {"input_ids": ONES, "attention_mask": [0] * 5}], "row 13", "one or more ones, followed by zeros"),
    ([*ROWS, {"input_ids": ONES, "attention_mask": [1, 1, 2, 0, 0]}], "row 13", "one or more ones, followed by zeros"),
    ([*ROWS, {"input_ids": [1, 1, 1, 1, len(IDS)], "attention_mask": ONES}], "row 13", f"token id {len(IDS)}"),
    ([*ROWS, {"input_ids": [1, 1, 1, 1, -1], "attention_mask": ONES}], "row 13", "token id -1"),
    ([ROWS[0], ROWS[0]], "2 different rows"),
    ([{"input_ids": [number, 1], "attention_mask": [1, 0]} for number in range(9)], "at least 2 tokens among those"),
]


@pytest.mark.parametrize(("rows", "words"), [(case[0], case[1:]) for case in BAD_ROWS])
def test_pickles_of_another_shape_are_refused(tmp_path, tokenizer_folder, rows, words):
    refused(save_rows(tmp_path / "p.pkl", rows), "p.pkl", *words, tokenizer=str(tokenizer_folder))


def test_a_pickle_needs_a_tokenizer(tmp_path):
    refused(save_rows(tmp_path / "p.pkl", ROWS), "--tokenizer", "p.pkl", field="--tokenizer")


def test_held_out_documents_are_the_smallest_hashes_and_take_their_copies_along():
    texts = [f"text {number}".encode() for number in range(1000)]
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(b"held out\0" + text).digest())
    (parts,) = choose_held_out([texts])
    for part, expected in ((VALIDATION, by_hash[:10]), (TEST, by_hash[10:20])):
        assert {text for text, of_text in zip(texts, parts, strict=True) if of_text == part} == set(expected)
    (backwards,) = choose_held_out([texts[::-1]])
    assert np.array_equal(backwards[::-1], parts)
    # Copies of the chosen ones, in their own source and in another, are held out as well.
    copies = [*by_hash[:3], *by_hash[10:12]]
    others = [f"other {n}".encode() for n in range(30)]
    others.sort(key=lambda text: hashlib.sha256(b"held out\0" + text).digest())
    both = choose_held_out([texts + copies, [by_hash[0], *others], [by_hash[10]]])
    assert np.bincount(both[0]).tolist() == [981, 13, 11]
    assert both[1].tolist() == [VALIDATION] * 4 + [TEST] * 4 + [0] * 23
    assert both[2].tolist() == [TRAIN], "a source of one document stays, and so do the copies of its text"
    assert both[0][texts.index(by_hash[10])] == both[0][-2] == TRAIN


@pytest.mark.parametrize(
    ("count", "validation", "test"),
    [(1, 0, 0), (2, 1, 0), (5, 2, 0), (7, 3, 0), (9, 4, 0), (10, 4, 1), (16, 4, 4), (400, 4, 4), (401, 5, 5)],
)
def test_how_many_are_held_out(count, validation, test):
    (parts,) = choose_held_out([[str(number).encode() for number in range(count)]])
    assert np.bincount(parts, minlength=3).tolist() == [count - validation - test, validation, test]


def test_a_dataset_of_version_2_opens_without_a_test_split(folder):
    """Its content hash, which signals and checkpoints name, is still over the two splits that it has."""
    dataset = open_dataset("--data", folder, verify=True)
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert dataset.test.num_documents == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(json.dumps([manifest["tokenizer_sha256"], ["wiki", "alpaca"]]).encode())
    for name in ("train", "validation"):
        digest.update(json.dumps([name, 7, EOS]).encode())
        arrays = ("tokens", "document_offsets", "document_sources", "document_numbers", "pieces", "row_pieces")
        for array in arrays:
            values = np.load(folder / name / f"{array}.npy")
            digest.update(json.dumps([array, values.dtype.str, values.shape]).encode() + values.tobytes())
    shutil.rmtree(folder / "test")
    files = {name: facts for name, facts in manifest["files"].items() if not name.startswith("test/")}
    largest = {name: manifest["largest_ids"][name] for name in ("train", "validation")}
    change_manifest(folder, format_version=2, files=files, largest_ids=largest, content_sha256=digest.hexdigest())
    dataset = open_dataset("--data", folder, verify=True)
    assert dataset.test is None
    assert list(dataset.splits) == ["train", "validation"]


def test_splits_are_frozen():
    split = make_split([[1, 2]], [0], 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.row_length = 5
