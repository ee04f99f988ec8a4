"""`indra data info|verify|show`: figures by hand, boundaries visible, damage found; opening reads next to nothing."""

from __future__ import annotations

import numpy as np
import pytest

from indraquantum import cli
from indraquantum.data.dataset import open_dataset, write_dataset
from indraquantum.data.padded import write_checksum, write_padded
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from test_data_dataset import make_split
from tiny_tokenizer import BOS, EOS, ids, save_tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = load_tokenizer("-", str(save_tiny_tokenizer(tmp_path / "tokenizer")))
    texts = ("the cat sat on the mat .", "a dog ran", "Name it red")
    documents = [[BOS, *ids(text), EOS] for text in texts]  # 9, 5 and 5 tokens, in rows of 7
    train, validation = make_split(documents, [0, 1, 1], 7), make_split(documents[:1], [0], 7)
    train.document_numbers.resize(3, refcheck=False)
    train.document_numbers[:] = 11, 5, 8
    sources = [{"name": "wiki"}, {"name": "alpaca"}]
    write_dataset(tmp_path / "mixed", {"train": train, "validation": validation}, sources, tokenizer, {"seed": 3})
    return tmp_path / "mixed"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def test_info_by_hand(folder, capsys):
    status, out, _ = run(capsys, "data", "info", folder)
    assert status == 0
    assert "train: 3 rows of 7, 90.48% filled; 19 tokens of 3 documents, 5 to 9 long, mean 6.3" in out
    assert "  wiki: 1 documents, 9 tokens\n  alpaca: 2 documents, 10 tokens" in out
    assert "seed 3" in out


def test_show_marks_where_documents_begin_and_end(folder, capsys):
    status, out, _ = run(capsys, "data", "show", folder, "--rows", "9")
    assert status == 0
    assert "  wiki 11, tokens 0 to 7 of 9\n    <s>the cat sat on the mat..." in out
    assert "  wiki 11, tokens 7 to 9 of 9\n    ....</s>" in out
    assert "  alpaca 5, tokens 0 to 5 of 5\n    <s>a dog ran</s>" in out
    assert out.count("row ") == 3
    status, _, err = run(capsys, "data", "show", folder, "--first", "3")
    assert (status, err.count("\n")) == (2, 1)
    assert "train has 3 rows" in err


def test_verify_finds_one_flipped_bit_in_any_file(folder, capsys):
    assert run(capsys, "data", "verify", folder)[0] == 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        status, out, err = run(capsys, "data", "verify", folder)
        assert (status, out, err.count("\n")) == (2, "", 1), path
        assert str(path if path.suffix == ".json" else path.parent) in err
        path.write_bytes(whole)


def test_verify_of_a_pickle_needs_its_checksum(tmp_path, capsys):
    path = tmp_path / "m.pkl"
    write_padded(path, [np.array([4, 9, 2])], 5, 2)
    status, _, err = run(capsys, "data", "verify", path)
    assert (status, err.count("\n")) == (2, 1)
    assert "must have its checksum in m.pkl.json beside it" in err
    write_checksum(path, sha256_of(path))
    assert run(capsys, "data", "verify", path)[0] == 0
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert run(capsys, "data", "verify", path)[0] == 2


def test_a_damaged_tokenizer_is_noticed_at_its_first_use(folder):
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"cat"', b'"bat"'))
    dataset = open_dataset("--data", folder)
    with pytest.raises(UserError, match=r"tokenizer\.json; is damaged"):
        dataset.tokenizer.decode([5])


def test_opening_reads_neither_tokens_nor_tokenizer(tmp_path):
    """So it takes milliseconds, and damage that only a full reading would notice goes unnoticed."""
    tokenizer = load_tokenizer("-", str(save_tiny_tokenizer(tmp_path / "tokenizer")))
    split = make_split([[BOS, EOS]] * 10, [0] * 10, 8)
    write_dataset(tmp_path / "m", {"train": split, "validation": split}, [{"name": "a"}], tokenizer, {})
    dataset = open_dataset("--data", tmp_path / "m")
    assert "backend" not in vars(dataset.tokenizer), "the tokenizer is parsed at its first use"
    path = tmp_path / "m" / "train" / "tokens.npy"
    tokens = np.load(path)
    tokens[9] = 999
    np.save(path, tokens)
    assert open_dataset("--data", tmp_path / "m").train.tokens[9] == 999
