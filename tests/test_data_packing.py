"""Packing: every token once, nothing split that fits, rows full, always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.data.packing import pack


def check(lengths, row_length):
    """Check every promise of a packing but its fill; return it."""
    packing = pack(np.array(lengths), row_length)
    starts, sizes = packing.pieces[:, 0], packing.pieces[:, 1]
    covered = {
        (document, token)
        for document, start, size in zip(packing.documents, starts, sizes, strict=True)
        for token in range(start, start + size)
    }
    assert len(covered) == sizes.sum() == sum(lengths), "a token is missing or used twice"
    assert covered == {(document, token) for document, length in enumerate(lengths) for token in range(length)}
    pieces_of = np.bincount(packing.documents, minlength=len(lengths))
    for document, length in enumerate(lengths):
        assert length > row_length or pieces_of[document] == 1, "a document that fits was split"
    assert packing.row_pieces[0] == 0
    assert packing.row_pieces[-1] == len(sizes)
    rows = [sizes[a:b].sum() for a, b in zip(packing.row_pieces[:-1], packing.row_pieces[1:], strict=True)]
    assert all(0 < row <= row_length for row in rows)
    return packing


@given(st.lists(st.integers(1, 97), min_size=1, max_size=60), st.integers(2, 31))
def test_invariants(lengths, row_length):
    packing = check(lengths, row_length)
    again = pack(np.array(lengths), row_length)
    assert all(np.array_equal(a, b) for a, b in zip(packing, again, strict=True))


def test_by_hand():
    # 7 alone fills a row; 5 takes 2; 4 takes 3. Of the 17, 14 tokens fill two rows and the last 3 begin a new one.
    packing = check([5, 2, 7, 17, 3, 4], 7)
    rows = [
        [(int(packing.documents[i]), *map(int, packing.pieces[i])) for i in range(a, b)]
        for a, b in zip(packing.row_pieces[:-1], packing.row_pieces[1:], strict=True)
    ]
    assert sorted(rows) == sorted(
        [[(2, 0, 7)], [(0, 0, 5), (1, 0, 2)], [(5, 0, 4), (4, 0, 3)], [(3, 0, 7)], [(3, 7, 7)], [(3, 14, 3)]]
    )


def test_a_long_document_fills_the_gaps():
    # Rows of 97 + 31 are impossible: each 97 leaves a gap of 31, and the long document is cut to fill one of them.
    packing = check([97, 97, 128 + 60], 128)
    assert len(packing.row_pieces) - 1 == 3 + 0
    assert sorted(map(tuple, packing.pieces[packing.documents == 2].tolist())) == [(0, 128), (128, 31), (159, 29)]


def test_no_crumbs():
    # A gap of 5 is left alone: a piece of 5 tokens sees almost nothing of its document.
    packing = check([123, 128 + 60], 128)
    assert packing.pieces[packing.documents == 1][:, 1].tolist() == [128, 60]


def test_rows_are_full_on_lengths_like_the_real_ones():
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.5, 0.8, 20_000), 3, 1500).astype(int)
    for row_length in (128, 512, 2048):
        rows = len(pack(lengths, row_length).row_pieces) - 1
        assert lengths.sum() / (rows * row_length) >= 0.985


@pytest.mark.shared
def test_rows_are_full_on_real_text(shared):
    import json

    from indraquantum.data.prompt import format_alpaca
    from indraquantum.data.sources import read_wikitext
    from indraquantum.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("--tokenizer", str(shared / "teacher"))
    items = json.loads((shared / "data/alpaca/alpaca_data.json").read_text())[::7]
    texts = read_wikitext("--wikitext", str(shared / "data/wikitext/wiki.valid.tokens"))[::2]
    texts += [format_alpaca(item["instruction"], item["input"], item["output"]) for item in items]
    lengths = np.array([len(document) for document in tokenizer.encode_documents(texts)])
    for row_length in (128, 512, 2048):
        rows = len(pack(lengths, row_length).row_pieces) - 1
        assert lengths.sum() / (rows * row_length) >= 0.985
