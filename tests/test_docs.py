"""The documentation site: its page has every option, the tutorial runs, and the site builds without warnings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from test_cli import COMMANDS, option

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "docs" / "tools"
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def plain(text: str) -> str:
    """Return the text without blanks and Markdown signs."""
    return re.sub(r"[\\`\s]+|\(FORMATS\.md\)|\[Formats\]|docs/FORMATS\.md", "", text)


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    """Return the sections of the page of options, by command."""
    made = subprocess.run([sys.executable, TOOLS / "options_page.py"], capture_output=True, text=True, check=True)
    return dict(re.findall(r"^## indra (.*?)\n(.*?)(?=^## |\Z)", made.stdout, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page(options, command):
    section = options[command]
    for link in re.findall(r"every option of \[indra (\S+)\]", section):
        section += options[link]
    for name, field in COMMANDS[command].model_fields.items():
        label = option(name)
        (entry,) = re.findall(rf"^`{label}` (.*?)(?=^`|^#|^And|\Z)", section, re.DOTALL | re.MULTILINE)
        assert plain(field.description) in plain(entry)
        if field.default is not None and field.annotation is not bool:
            assert plain(f"default <code>{field.default}</code>") in plain(entry)


def test_the_page_says_what_is_allowed(options):
    assert "`--dropout` <small>number; default <code>0.0</code></small>" in options["train"]
    assert "training loss still falls. Allowed: at least 0 and below 1.\n" in options["train"]
    assert "<code>adamw</code> | <code>muon</code>; default <code>muon</code>" in options["train"]
    assert "`CHECKPOINT` <small>required</small>" in options["test"]
    assert r"such as \<noinput\> or Noinput" in options["prepare"]  # no tag that a browser would hide


def output_of(code: str, folder: Path, environment: dict[str, str]) -> str:
    """Return what a piece of Python prints in `folder`."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    """Run its commands and the README's Python in their order, on a demo of toy size."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    indra = [sys.executable, "-m", "indraquantum"]
    subprocess.run([*indra, "demo", "--tiny", "--output", "demo"], cwd=tmp_path, env=environment, check=True)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)
    shell = [line for language, block in blocks if not language for line in block.replace("\\\n", "").splitlines()]
    commands = [shlex.split(line)[1:] for line in shell if line.startswith("indra ")]
    assert [command[0] for command in commands] == ["data", "data", "runs", "eval", "test", "train", "runs", "export"]
    for command in commands:
        command = [word.replace("epoch_3", "epoch_4") if command[0] != "export" else word for word in command]
        subprocess.run([*indra, *command], cwd=tmp_path, env=environment, check=True)
    (code,) = [block for language, block in blocks if language == "python"]
    assert "The for statement is used to" in output_of(code, tmp_path, environment)
    said = output_of(
        re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("epoch_3", "epoch_4"), tmp_path, environment
    )
    assert re.fullmatch(
        r"held-out cross-entropy: \d\.\d\d nats per token\n.*\n(.*: confidence .* nats\n){3}", said, re.DOTALL
    )


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("zensical"), reason="`make docs` installs what builds the site")
def test_the_site_builds_without_warnings_and_needs_no_other_server():
    subprocess.run([sys.executable, TOOLS / "site.py"], cwd=ROOT, check=True)
    site = ROOT / "build" / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    named = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"{name}.html" for name in named if name != "README"} | {"index.html"} <= pages.keys()
    for name, page in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page), name
        for picture in re.findall(r"<img[^>]*src=\"([^\"]*)\"", page):
            assert (site / name).parent.joinpath(picture).is_file(), f"{name} shows {picture}"
        assert "arithmatex" not in page, f"{name}: a formula is still TeX"
    assert "<math" in pages["docs/mathematics.html"]
    assert "SemanticDistillationLoss" in pages["docs/python.html"]
