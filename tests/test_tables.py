"""Tables of plain text."""

from indraquantum.tables import text_table


def test_columns_are_as_wide_as_their_longest_cell():
    table = text_table(["source", "nats"], [["all", "12.5"], ["wikitext-103", "3"]])
    assert table == "source        nats\nall           12.5\nwikitext-103     3"


def test_columns_can_be_aligned_to_the_left_and_have_no_names():
    assert text_table((), [["a", "1", "goal"], ["long", "22", ""]], left=(0, 2)) == "a      1  goal\nlong  22"
