"""Writes the model's code as one file, with which transformers loads an exported folder without this package.

The file is made of this package's own modules, so there is no second version of the model to maintain. Each module
gives a section: its docstring as a comment, then its code. Imports are gathered at the top. Three things are left out:
what only training and the commands need, the registration with the Auto classes (the folder's config.json does that),
and the fused objective, in whose place the file computes plain cross-entropy.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from indraquantum import __version__

PACKAGE = Path(__file__).resolve().parent.parent
CODE_NAME = "modeling_indraquantum.py"
LONGEST_LINE = 120
HEAD = f'''# SPDX-License-Identifier: Apache-2.0
"""IndraQuantumPhase2 in one file, made from the package indraquantum {__version__}.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)

The package itself is needed only to train with a teacher's signals.
"""

from __future__ import annotations
'''


@dataclass(frozen=True)
class Part:
    """A module of the package, and which of its names go into the file."""

    module: str  # its path in the package, without .py
    only: frozenset[str] = frozenset()  # names to take; empty: all
    without: frozenset[str] = frozenset()  # names of functions and methods to leave out


PARTS = (
    Part(
        "files",
        only=frozenset({"sha256_of", "SUMS_NAME", "_SUM", "read_sums", "damaged_file", "NOT_ITS_SUM"}),
    ),
    Part("model/shape", without=frozenset({"from_values"})),
    Part("model/configuration", without=frozenset({"from_settings"})),
    Part("model/projector"),
    Part("kernels/born", only=frozenset({"BORN_EPSILON", "conjugate_turn", "born_logits"})),
    Part("model/head"),
    Part("model/readout"),
    Part("model/masks"),
    Part("model/core"),
    Part("model/kept_table"),
    Part("model/vocabulary"),
    Part("model/output"),
    Part("model/cross_entropy"),  # in place of model/objective
    Part("model/modeling", without=frozenset({"parameter_groups"})),
)


def standalone_code() -> str:
    """Return the file's text."""
    sections = [_Section(part) for part in PARTS]
    body = "\n\n".join(section.text() for section in sections)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    return f"{HEAD}\n{_imports((node for section in sections for node in section.imports), used)}\n\n{body}"


class _Section:
    """What one module gives to the file."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.source = (PACKAGE / f"{part.module}.py").read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)
        self.imports = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]

    def text(self) -> str:
        """Return the section: a comment from the module's docstring, and its code."""
        about = (ast.get_docstring(self.tree) or "").splitlines()
        if self.part.only:  # the docstring is about the whole module
            about = about[:1]
        wrapped = (part for line in about for part in textwrap.wrap(line, LONGEST_LINE - 2) or [""])
        comment = "\n".join(f"# {line}".rstrip() for line in ["-" * (LONGEST_LINE - 2), *wrapped])
        statements = [node for node in self.tree.body[1:] if self._is_kept(node)]
        return "\n".join([comment, *self._code(statements)]).rstrip() + "\n"

    def _is_kept(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_for_types(node) or _is_registration(node):
            return False
        names = set(_defined(node))
        return bool(names & self.part.only) if self.part.only else not names & self.part.without

    def _code(self, statements: Iterable[ast.stmt]) -> Iterator[str]:
        """Yield the lines of the statements, with the comments above them and the blank lines of the module."""
        after_block = True
        for node in statements:
            first, is_block = self._first_line(node), isinstance(node, ast.FunctionDef | ast.ClassDef)
            if after_block or is_block:
                yield from ["", ""]
            elif not self.lines[first - 2].strip():
                yield ""
            yield from self._without(node, first)
            after_block = is_block

    def _without(self, node: ast.stmt, first: int) -> list[str]:
        """Return the lines of a statement from line `first` on; of a class, without the methods to leave out."""
        dropped: set[int] = set()
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if set(_defined(method)) & self.part.without:
                    # with the blank line above it
                    dropped |= set(range(self._first_line(method) - 1, (method.end_lineno or 0) + 1))
        kept = (number for number in range(first, (node.end_lineno or 0) + 1) if number not in dropped)
        return [self.lines[number - 1] for number in kept]

    def _first_line(self, node: ast.stmt) -> int:
        """Return the line at which a statement begins, with its decorators and the comments right above it."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        while self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    for target in getattr(node, "targets", []) or [getattr(node, "target", None)]:
        if isinstance(target, ast.Name):
            yield target.id


def _is_for_types(node: ast.stmt) -> bool:
    """Return whether a statement is `if TYPE_CHECKING:` with imports."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_registration(node: ast.stmt) -> bool:
    """Return whether a statement is a call such as `AutoConfig.register(...)`."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register"


def _imports(nodes: Iterable[ast.Import | ast.ImportFrom], used: set[str]) -> str:
    """Return the imports of other packages whose names are used, each once: the standard library's first."""
    plain: set[str] = set()
    names_of: dict[str, set[str]] = {}
    for node in nodes:
        kept = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in used]
        texts = {f"{alias.name} as {alias.asname}" if alias.asname else alias.name for alias in kept}
        if isinstance(node, ast.Import):
            plain |= texts
        elif node.module not in (None, "__future__") and not str(node.module).startswith("indraquantum"):
            names_of.setdefault(str(node.module), set()).update(texts)
    lines = [(name.split()[0], f"import {name}") for name in sorted(plain)]
    lines += [(module, _from(module, names)) for module, names in sorted(names_of.items()) if names]
    groups: list[list[str]] = [[], []]
    for module, line in lines:
        groups[module.split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)


def _from(module: str, names: Iterable[str]) -> str:
    """Return an import of `names`, on as many lines as ruff would use."""
    listed = sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    line = f"from {module} import {', '.join(listed)}"
    if len(line) <= LONGEST_LINE:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in listed), ")"])
