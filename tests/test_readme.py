"""What the README says is so: its tree is the tracked tree, its commands are commands, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from indraquantum.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
SCRIPTS = {"prepare_mixed_data.py": "prepare", "train_phase2_v4_unified.py": "train", "test_phase2.py": "test"}
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("indra ", "python scripts/"))]


def tree_of(text: str) -> set[str]:
    """Files that the README's tree names; folders end in / and indent what they hold by two blanks."""
    files, folders = set(), []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.add("".join(folders) + name)
    return files


def test_the_tree_is_the_tracked_tree():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    (tree,) = [block for block in BLOCKS if "pyproject.toml" in block]
    assert tree_of(tree) == {name for name in listing.stdout.split() if not name.startswith("results/")}
    assert "\nresults/ " in tree
    assert all(len(line.split(maxsplit=1)) == 2 for line in tree.splitlines()), "each line says what it is"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    arguments = words[1:] if words[0] == "indra" else [SCRIPTS[Path(words[1]).name], *words[2:]]
    app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_the_three_commands_are_there():
    assert [c for c in COMMANDS if c.startswith("python")] == [
        "python scripts/prepare_mixed_data.py",
        "python scripts/train_phase2_v4_unified.py",
        "python scripts/test_phase2.py checkpoints/phase2_v4_unified/checkpoint_v4_epoch_1.pt "
        '--prompt "The future of AI is"',
    ]


def test_make_knows_the_two_commands():
    for target in ("demo", "test"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
