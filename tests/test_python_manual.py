"""The embedded corpus: prose without its markup, questions with honest answers, and always the same."""

from __future__ import annotations

import json
import os
import sys

import pytest

from indraquantum.config import PrepareSettings
from indraquantum.data import python_manual
from indraquantum.data.instructions import alpaca_samples
from indraquantum.data.prepare import prepare
from indraquantum.data.python_manual import docstring_questions, manual_paragraphs, write_manual_corpus
from indraquantum.data.sources import is_heading, read_wikitext
from indraquantum.errors import UserError
from tiny_tokenizer import save_tiny_tokenizer

TOPIC = """The "assert" statement
**********************

Assert statements are a convenient way to insert post-
mortem checks
into a program:

   assert_stmt ::= "assert" expression ["," expression]

The simple form is short.

   if __debug__:
       if not expression: raise AssertionError(expression)

* A bullet holds a sentence as well, long enough to keep. [4]

+-------+----------------------------------------------+
| Table | with a sentence in it that is long enough.   |
+-------+----------------------------------------------+

   A description is set in, and it is prose
   all the same.
"""


def test_paragraphs_by_hand(monkeypatch):
    from pydoc_data import topics

    monkeypatch.setattr(topics, "topics", {"b": TOPIC, "a": "Another page says this, in more than forty letters.\n\n"})
    assert manual_paragraphs() == [
        "Another page says this, in more than forty letters.",
        "Assert statements are a convenient way to insert post-mortem checks into a program:",
        "A bullet holds a sentence as well, long enough to keep. [4]",
        "A description is set in, and it is prose all the same.",
    ]


def test_the_real_manual_is_prose():
    paragraphs = manual_paragraphs()
    assert sum(map(len, paragraphs)) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any("\n" in text or "::=" in text or is_heading(text) or text != text.strip() for text in paragraphs)


MODULE = '''"""Tools that are shown to everybody."""

def add(a, b=2, *, c: int = 3):
    """Add numbers, which is what this does.

    Second paragraph.

    >>> add(1)
    """

def again():
    """Add numbers, which is what this does.

    Second paragraph.
    """

def short():
    """Too short."""

def _private():
    """Private, however long the text may be."""

class Box:
    """A box that holds whatever is put in it."""

    def open(self):
        """Open the box, as far as it will go."""
        def inner():
            """An inner function that nobody can reach."""

    class Lid:
        """The lid of a box, a class of its own."""

async def wait():
    """Wait for something that may never come."""
'''


def test_questions_by_hand(tmp_path):
    (tmp_path / "pack" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text(MODULE)
    (tmp_path / "posixpath.py").write_text('def join(a, *p):\n    """Join two or more pathname components."""\n')
    for hidden in ("_private.py", "pack/_hidden.py", "pack/test/thing.py", "site-packages/other.py", "ntpath.py"):
        (tmp_path / hidden).write_text('"""A text that nobody should be asked about."""\n')
    (tmp_path / "broken.py").write_text('"""A text that ends too')
    (tmp_path / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Caf\xe9 and other words in Latin letters."""\n')
    samples = list(docstring_questions(tmp_path))
    asked = [(sample.input or sample.instruction, sample.output) for sample in samples]
    names = ["latin", "os.path.join", "pack", "pack.Box", "pack.Box.Lid", "pack.Box.open", "pack.add", "pack.wait"]
    assert len(asked) == len(names)
    assert all(name in question for (question, _), name in zip(asked, names, strict=True))
    answers = dict(zip(names, (answer for _, answer in asked), strict=True))
    assert answers["pack.add"] == "Add numbers, which is what this does.\n\nSecond paragraph."
    assert answers["latin"] == "Café and other words in Latin letters."
    assert answers["os.path.join"] == "Join two or more pathname components."


def test_signatures_are_asked_about_as_inputs(tmp_path):
    names = [f"f{number}" for number in range(40)]
    functions = [f'def {name}(a, b=2, *, c: int=3):\n    """Answer number {name} of forty."""\n' for name in names]
    (tmp_path / "m.py").write_text("".join(functions))
    samples = list(docstring_questions(tmp_path))
    with_input = [sample for sample in samples if sample.input]
    assert 3 <= len(with_input) <= 20
    assert all(sample.input.endswith("(a, b=2, *, c: int=3)") for sample in with_input)
    assert len({sample.instruction.replace(name, "") for sample in samples for name in names[:1]}) > 3


def test_long_docstrings_end_at_a_paragraph(tmp_path):
    (tmp_path / "m.py").write_text('"""' + "\n\n".join(["x" * 300] * 5) + '"""\n')
    (sample,) = docstring_questions(tmp_path)
    assert sample.output == "\n\n".join(["x" * 300] * 2)


def test_the_files_serve_the_readers_and_are_the_same_each_time(tmp_path):
    corpus = write_manual_corpus(tmp_path / "a", limit=29)
    again = write_manual_corpus(tmp_path / "b", limit=29)
    assert [corpus.text.name, corpus.instructions.name] == ["manual.txt", "questions.json"]
    assert corpus.text.read_bytes() == again.text.read_bytes()
    assert corpus.instructions.read_bytes() == again.instructions.read_bytes()
    assert (corpus.paragraphs, corpus.answers) == (29, 29)
    assert read_wikitext("--wikitext", str(corpus.text)) == manual_paragraphs()[:29]
    assert len(list(alpaca_samples("--alpaca", str(corpus.instructions)))) == 29
    assert len(json.loads(corpus.instructions.read_text(encoding="utf-8"))) == 29
    tokenizer = save_tiny_tokenizer(tmp_path / "tokenizer")
    report = prepare(
        PrepareSettings(
            wikitext=str(corpus.text), alpaca=str(corpus.instructions), tokenizer=str(tokenizer),
            output=tmp_path / "m.pkl",
        )
    )  # fmt: skip
    assert [source.documents for source in report.sources] == [29, 29]


def test_nothing_is_imported(tmp_path):
    (tmp_path / "loud.py").write_text('"""A module that would shout if it were run."""\nraise SystemExit("ran")\n')
    before = set(sys.modules)
    assert len(list(docstring_questions(tmp_path))) == 1
    assert "loud" not in set(sys.modules) - before


def test_a_python_without_its_manual_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="missing from this Python"):
        write_manual_corpus(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(python_manual.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="must hold Python's source files"):
        write_manual_corpus(tmp_path / "out")
    assert os.listdir(tmp_path) == []
