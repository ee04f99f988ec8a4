"""What the README and the documentation say is true: they name all folders, their commands parse, and links work."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from indraquantum import __version__
from indraquantum.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The log has commands of earlier versions, so it is left out.
BLOCKS = {
    page: [block for language, block in FENCED.findall(text) if not language]
    for page, text in TEXTS.items()
    if page != "docs/LOG.md"
}
SCRIPTS = {"prepare_mixed_data.py": "prepare", "train_phase2_v4_unified.py": "train", "test_phase2.py": "test"}
GENERATED = {"docs/options.md"}  # by docs/tools/options_page.py when the site is built


def commands_of(blocks: list[str]) -> list[str]:
    """Return the lines of `blocks` that call `indra` or one of our scripts, also under torchrun."""
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(indra|torchrun|python scripts/\S+)(\s|$)", line)]


COMMANDS = [(page, command) for page, blocks in BLOCKS.items() for command in commands_of(blocks)]


def arguments_of(command: str) -> list[str]:
    """Return the arguments that `indra` gets from a line of a shell."""
    words = shlex.split(command, comments=True)
    place = next(i for i, word in enumerate(words) if word in ("indra", "indraquantum") or word.startswith("scripts/"))
    own = [SCRIPTS[Path(words[place]).name]] if words[place].startswith("scripts/") else []
    return [*own, *words[place + 1 :]]


def tree_of(text: str) -> set[str]:
    """Return the folders that a tree names. Two blanks indent the content of a folder."""
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
    (tree,) = [block for block in BLOCKS["CONTRIBUTING.md"] if block.startswith("src/indraquantum/\n")]
    parents = [Path(name).parent for name in listing.stdout.split()]
    package = {parent for parent in parents if parent.parts[:2] == ("src", "indraquantum")}
    others = {Path(parent.parts[0]) for parent in parents if parent.parts and parent.parts[0] not in ("src", ".ci")}
    assert tree_of(tree) == {folder.as_posix() for folder in package | others}
    for line in tree.splitlines()[1:]:
        assert len(line.split(maxsplit=1)) == 2, f"{line}: must say what it is"


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command):
    app.parse_args(arguments_of(command), exit_on_error=False, print_error=False)


def test_commands_are_found_on_every_page_that_has_some():
    assert {page for page, _ in COMMANDS} >= {
        "README.md",
        *(f"docs/{p}.md" for p in ("tutorial", "your-data", "cluster")),
    }
    assert arguments_of("RAY_ADDRESS=auto indra capture --workers 16  # all") == ["capture", "--workers", "16"]
    assert arguments_of("torchrun --x 2 scripts/test_phase2.py a.pt") == ["test", "a.pt"]


def test_the_three_commands_are_there():
    assert [c for page, c in COMMANDS if page == "README.md" and c.startswith("python")] == [
        "python scripts/prepare_mixed_data.py",
        "python scripts/train_phase2_v4_unified.py",
        "python scripts/test_phase2.py checkpoints/phase2_v4_unified/checkpoint_v4_epoch_1.pt "
        '--prompt "The future of AI is"',
    ]


def test_make_knows_its_commands():
    named = {
        target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)$", text, re.M)
    }
    targets = {one or other for one, other in named}
    assert targets >= {"demo", "test", "docs"}
    for target in sorted(targets):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_python_of_the_loss_prints_what_it_says():
    code, output = (dict(FENCED.findall(TEXTS["docs/python.md"]))[language] for language in ("python", "text"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "docs/python.md", "exec"), {})
    assert said.getvalue() == output


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub and the site make of headings: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = TEXTS[page]
    definitions = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", FENCED.sub("", text))) == definitions.keys()
    links = [f"({target})" for target in definitions.values()] + re.findall(r"\](\([^)\s]*\))", text)
    for target, anchor in re.findall(r"\(([^)#\s]*)#?([^)\s]*)\)", " ".join(links)):
        path = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        if "://" in target or path.relative_to(ROOT).as_posix() in GENERATED:
            continue
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_half_merged(page):
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", TEXTS[page], re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/LOG.md"])
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:src|tests|docs|configs|benchmarks|scripts|notebooks)/[\w/.-]+)`", TEXTS[page]):
        assert "NAME" in path or (ROOT / path).exists(), f"{page} names {path}"


def test_the_citation_file_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert {"message", "title", "authors"} <= citation.keys()
