"""Imports point downwards only, so that nothing below knows what is above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "indraquantum"
# A module may import from its own level and from those before it.
LEVELS = (
    {"config", "errors", "files", "memory", "strategy", "yaml_settings", "__init__"},
    {"device", "metrics", "trackers", "processes", "progress", "smoothing"},
    {"kernels", "model"},
    {"data", "loss_v2"},
    {"learner", "teacher"},
    {"training", "evaluation", "monitor", "bench", "bench_step"},
    {"demo", "ablation"},
    {"cli", "__main__"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# The model's forward computes its own loss when it is given labels, as transformers' models do.
EXCEPTIONS = {("model/modeling.py", "loss_v2")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    inside = path.relative_to(PACKAGE)
    own = inside.parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("indraquantum."):
            other = node.module.split(".")[1]
            if (inside.as_posix(), other) not in EXCEPTIONS:
                assert LEVEL_OF[other] <= LEVEL_OF[own], f"line {node.lineno} imports {node.module}"
