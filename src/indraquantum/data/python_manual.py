"""The corpus of the demo: Python's own manual, which comes with every Python.

`pydoc_data.topics` gives paragraphs of English prose, and the docstrings of the standard library give questions with
answers. The sources are read with `ast` and never imported. Nothing of them is redistributed: each machine makes the
corpus from its own Python. The licence of the text is the PSF's.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from indraquantum.data.instructions import AlpacaSample
from indraquantum.errors import UserError
from indraquantum.files import make_folder, write_text

# Tests and demonstrations have no documentation, and ntpath repeats posixpath.
SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
)
SKIPPED_MODULES = frozenset({"ntpath", "macpath", "antigravity", "this"})
ALIASES = {"posixpath": "os.path"}  # the name under which everybody knows it
SHORTEST_DOCSTRING = 20
SHORTEST_PARAGRAPH = 40
LONGEST_ANSWER = 800  # characters; whole paragraphs are kept, and the first one always

QUESTIONS = {
    "module": ("What is the Python module {name} for?", "Describe the Python module {name}."),
    "class": ("What is the Python class {name}?", "Describe the Python class {name}.", "What is {name} used for?"),
    "function": ("What does {name} do?", "Explain what the Python function {name} does.", "What is {name} for?"),
}
WITH_INPUT = "What does this Python function do?"  # its signature is the input: both forms of the prompt are learned


class ManualCorpus(NamedTuple):
    """The two files of the corpus."""

    text: Path  # a paragraph a line
    instructions: Path  # a JSON list in Alpaca's form
    paragraphs: int  # how many there are
    answers: int


class _Module(NamedTuple):
    name: str  # dotted
    path: Path


class _Entry(NamedTuple):
    name: str  # qualified, such as os.path.join
    kind: str  # module, class or function
    signature: str  # of a function
    docstring: str


def write_manual_corpus(folder: Path, limit: int | None = None) -> ManualCorpus:
    """Write the corpus into `folder`; the same Python gives the same bytes.

    Args:
        folder: The folder for manual.txt and questions.json; it is created if it is missing.
        limit: Keep only the first paragraphs and questions, this many of each.

    Raises:
        UserError: the folder can't be written, or this Python was installed without its manual or source files.
    """
    paragraphs = list(itertools.islice(manual_paragraphs(), limit))
    questions = list(itertools.islice(docstring_questions(Path(sysconfig.get_path("stdlib"))), limit))
    if not questions:
        where = sysconfig.get_path("stdlib")
        raise UserError("standard library", where, "must hold Python's source files; install Python with them")
    make_folder("--output", folder)
    corpus = ManualCorpus(folder / "manual.txt", folder / "questions.json", len(paragraphs), len(questions))
    content = json.dumps([question._asdict() for question in questions], ensure_ascii=False, indent=1)
    for path, text in ((corpus.text, "\n".join(paragraphs)), (corpus.instructions, content)):
        write_text(path, text + "\n")
    return corpus


def manual_paragraphs() -> list[str]:
    """Return the different paragraphs of prose of Python's manual, in the order of its topics.

    Raises:
        UserError: this Python has no `pydoc_data`.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        allowed = "is missing from this Python; install the complete standard library, or give your own texts"
        raise UserError("pydoc_data", "no module", allowed) from None
    blocks = (block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name]))
    # Topics overlap: the page on compound statements contains that on `if`. A dict keeps the first of each, in order.
    return list(dict.fromkeys(text for block in blocks if (text := _prose(block))))


def _prose(block: str) -> str | None:
    """Return a block of lines as one line; None if it is not prose but a heading, code, grammar or a table."""
    lines = block.strip("\n").split("\n")
    # `**` below a heading, `+--` and `|` in tables, `::=` in grammars, `>>>` in examples.
    if any(re.fullmatch(r"\s*([^\w\s])\1{2,}\s*|\s*[+|].*|.*::=.*|\s*>>>.*", line) for line in lines):
        return None
    text = re.sub(r"(?<=\w)-\n\s*", "-", block)  # a word broken at its own hyphen
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^(\* |\d+\. |\[\d+\] )", "", text)
    # A sentence ends in a full stop and the like, even where a footnote's number follows; code rarely does.
    sentence = re.search(r"[.?!:][\"”)’]*( \[\d+\])?$", text)
    return text if sentence and text[:1].isalpha() | (text[:1] in '"“(*') and len(text) >= SHORTEST_PARAGRAPH else None


def docstring_questions(library: Path) -> Iterator[AlpacaSample]:
    """Yield a question and its answer for each documented public name of a library.

    Args:
        library: Folder of Python sources, such as the standard library's.

    Yields:
        Samples in the order of the modules' names and, within a module, of the qualified names. No answer comes twice.
    """
    seen: set[str] = set()
    for name, path in sorted(_modules(library)):
        for entry in _entries(name, path):
            answer = _answer(entry.docstring)
            if len(answer) >= SHORTEST_DOCSTRING and answer not in seen:
                seen.add(answer)
                yield _question(entry, answer)


def _modules(library: Path) -> Iterator[_Module]:
    """Yield the public modules below a folder. Folders that are skipped, such as site-packages, are not searched."""
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if _is_public(name)]
        parts = Path(folder).relative_to(library).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and (stem == "__init__" or _is_public(stem)):
                name = ".".join(parts if stem == "__init__" else (*parts, stem))
                if name and name not in SKIPPED_MODULES:
                    yield _Module(ALIASES.get(name, name), Path(folder, file))


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name not in SKIPPED


def _entries(module: str, path: Path) -> list[_Entry]:
    """Return the documented public names of one module, sorted; none if it can't be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old escapes in these files are not for our readers
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = {entry.name: entry for entry in reversed(list(_walk(module, tree)))}  # the first of each name
    return [found[name] for name in sorted(found)]


def _walk(name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[_Entry]:
    """Yield a node and, below modules and classes, its public members."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        kind = "function" if is_function else "class" if isinstance(node, ast.ClassDef) else "module"
        yield _Entry(name, kind, f"{name}({ast.unparse(node.args)})" if is_function else "", docstring)
    if isinstance(node, ast.Module | ast.ClassDef):
        yield from _members(name, node.body)


def _members(name: str, body: Iterable[ast.stmt]) -> Iterator[_Entry]:
    for child in body:
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not child.name.startswith("_"):
            yield from _walk(f"{name}.{child.name}", child)


def _answer(docstring: str) -> str:
    """Return the docstring's prose: whole paragraphs up to its first example or LONGEST_ANSWER."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip()):
        if ">>>" in paragraph or (kept and sum(map(len, kept)) + len(paragraph) > LONGEST_ANSWER):
            break
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def _question(entry: _Entry, answer: str) -> AlpacaSample:
    """Ask about a name in one of several ways, chosen by a hash of the name."""
    ways = QUESTIONS[entry.kind]
    way = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[8:16])
    if entry.kind == "function" and way % (len(ways) + 1) == len(ways):
        return AlpacaSample(WITH_INPUT, entry.signature, answer)
    return AlpacaSample(ways[way % len(ways)].format(name=entry.name), "", answer)
