"""Imports run one way: a folder, or a module beside it, imports from those below it, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "indraquantum"
# A folder, or a module beside it, may import from those before its own line.
LEVELS = (
    {"errors", "launched", "lazy_names"},
    {
        "api_key",
        "files",
        "interrupts",
        "memory",
        "processes",
        "processor",
        "progress",
        "smoothing",
        "tables",
        "thresholds",
        "versions",
        "web",
    },
    {"trackers"},
    {"config", "metrics", "yaml_settings"},
    {"device", "strategy", "kernels"},
    {"loss_v2"},
    {"model", "data"},
    {"learner", "teacher"},
    {"evaluation", "monitor"},
    {"training"},
    {"inference", "trials", "doctor"},
    {"demo", "ablation", "api", "live", "serving"},
    {"cli", "__init__"},  # the package loads its names when they are first used
    {"__main__"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """The modules of this package that the one at `path` imports, in functions and for types too: `folder.module`.

    The package's own names, which it loads from above, count as `__init__`; its version is there from the start.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    names = [name.removeprefix("indraquantum.") for name in found if name.startswith("indraquantum.")]
    return [name if name in NAMES else name.rpartition(".")[0] or "__init__" for name in names if name != "__version__"]


def own_name(path: Path) -> str:
    """`folder.module` of the module at `path`, or the folder of an `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {own_name(path) for path in MODULES}


def require_no_circle(part: Callable[[str], str]) -> None:
    """Fail if imports between parts of the package form a circle, and name the circle."""
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        own = part(own_name(path))
        graph.setdefault(own, set()).update(part(name) for name in imports_of(path) if part(name) != own)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    own = own_name(path).split(".")[0]
    for name in imports_of(path):
        other = name.split(".")[0]
        assert other == own or LEVEL_OF[other] < LEVEL_OF[own], f"{own} imports {name}"


def test_no_circle_between_folders():
    require_no_circle(lambda name: name.split(".")[0])


def test_no_two_modules_need_each_other():
    require_no_circle(lambda name: name)


def test_each_form_of_an_import_is_seen(tmp_path):
    forms = {
        "from indraquantum.training.loop import train": "training.loop",
        "from indraquantum.training import loop": "training.loop",
        "from indraquantum import web": "web",
        "from indraquantum import load": "__init__",
        "import indraquantum.training.loop": "training.loop",
        "import os, indraquantum.training.loop as loop": "training.loop",
        "def later():\n    import indraquantum.training.loop": "training.loop",
    }
    for form, name in forms.items():
        (tmp_path / "x.py").write_text(form)
        assert imports_of(tmp_path / "x.py") == [name], form
    (tmp_path / "x.py").write_text("import os\nfrom os import path\nfrom indraquantum import __version__")
    assert imports_of(tmp_path / "x.py") == []
