"""Builds the documentation site: `make docs`, which writes build/site.

    python docs/tools/site.py [--serve]

The pages are the Markdown files of the repository: README.md is the front page, and every file that a page links to
comes along, pictures and reports included. They are copied to build/pages with their paths, together with the page of
all options, which options_page.py makes from the command line; zensical then builds them, and a warning is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ROOT / "build" / "pages"
OPTIONS = "docs/options.md"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def linked(page: Path) -> list[Path]:
    """Files of the repository that `page` links to; what is generated, or on the web, is none.

    Raises:
        SystemExit: one is missing; zensical says nothing of a picture that is.
    """
    targets = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    paths = [Path(os.path.normpath(page.parent / target)) for target in targets if "://" not in target]
    paths = [path for path in paths if path != ROOT / OPTIONS]
    missing = [path.relative_to(ROOT).as_posix() for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"{page.relative_to(ROOT)} links to files that do not exist: {', '.join(missing)}")
    return paths


def files() -> set[Path]:
    """The front page, the pages of docs/, and whatever they lead to."""
    found: set[Path] = set()
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += linked(path) if path.suffix == ".md" else []
    return found


def stage() -> None:
    """Lay the pages out anew in build/pages."""
    from options_page import page

    shutil.rmtree(PAGES, ignore_errors=True)
    for path in files():
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (PAGES / OPTIONS).write_text(page(), encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "tools" / "site.css", PAGES / "site.css")


def main(arguments: list[str]) -> int:
    """Build the site, or show it at http://localhost:8000 with `--serve`."""
    stage()
    tools = str(Path(__file__).parent)  # where zensical finds the extension that makes MathML
    command = ["serve"] if "--serve" in arguments else ["build", "--clean", "--strict"]
    environment = {**os.environ, "PYTHONPATH": tools}
    status = subprocess.run([sys.executable, "-m", "zensical", *command], cwd=ROOT, env=environment).returncode
    if status == 0:
        print("The site is in build/site. To read it: python3 -m http.server --directory build/site")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
