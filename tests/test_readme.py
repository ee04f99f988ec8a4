"""What the README says is so: its tree names the folders, its commands are commands, its links lead somewhere."""

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
    """Folders that the README's tree names; two blanks indent what a folder holds."""
    folders, path = set(), []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], line.split()[0].rstrip("/")]
        folders.add("/".join(path))
    return folders


def test_the_tree_names_every_folder():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    (tree,) = [block for block in BLOCKS if block.startswith("src/indraquantum/\n")]
    parents = [Path(name).parent for name in listing.stdout.split()]
    package = {parent for parent in parents if parent.parts[:2] == ("src", "indraquantum")}
    others = {Path(parent.parts[0]) for parent in parents if parent.parts and parent.parts[0] not in ("src", ".ci")}
    assert tree_of(tree) == {folder.as_posix() for folder in package | others}
    for line in tree.splitlines()[1:]:
        assert len(line.split(maxsplit=1)) == 2, f"{line}: must say what it is"


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
