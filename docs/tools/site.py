"""Builds the documentation site: `make docs`, which writes build/site.

    python docs/tools/site.py [--serve]

The pages are the Markdown files of the repository, with README.md as the front page. This script copies them to
build/pages, together with every file that a page links to, such as pictures and reports. It adds the page of all
options, which options_page.py makes from the command line. Then zensical builds the site; a warning is an error.
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
    """The files of the repository that `page` links to, without links to the web and to generated pages.

    Raises:
        SystemExit: a file is missing. zensical would not report a missing picture.
    """
    targets = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    paths = [Path(os.path.normpath(page.parent / target)) for target in targets if "://" not in target]
    paths = [path for path in paths if path != ROOT / OPTIONS]
    missing = [path.relative_to(ROOT).as_posix() for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"{page.relative_to(ROOT)} links to files that do not exist: {', '.join(missing)}")
    return paths


def files() -> set[Path]:
    """The front page, the pages of docs/, and all files that they link to, directly or through other pages."""
    found: set[Path] = set()
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += linked(path) if path.suffix == ".md" else []
    return found


def stage() -> None:
    """Empty build/pages and copy all pages there."""
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
        print("The site is in build/site. Its search works only through a server, such as this one:")
        print("python3 -m http.server --directory build/site    (then open http://localhost:8000)")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
