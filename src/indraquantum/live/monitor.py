"""The command `indra monitor`: a page on this machine that follows runs while they train.

    indra monitor logs

trackio's and Gradio's dashboards are made for this field; we looked at trackio 0.43.0 and Gradio 6.31.0. trackio shows
its own database: each run would be stored twice, and lines can get lost when a process is killed (docs/FORMATS.md).
Gradio is a package of 31 MB that needs pandas and FastAPI. Neither knows thresholds of a collapse, or a state with a
phase. This page is a list and curves, so it is small and our own: uPlot draws the curves (50 kB, MIT, no dependencies,
kept in web/vendor), and http.server serves it.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

from indraquantum.config import MonitorSettings
from indraquantum.errors import UserError
from indraquantum.live.details import details_of, differences_of
from indraquantum.live.explorer import Explorer
from indraquantum.live.server import Answer, PageServer, Query, Refused, Site, whole_number
from indraquantum.live.watched import Watched
from indraquantum.progress import tell, warn
from indraquantum.web import asset

KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = (
    "monitor.css", "monitor.js", "charts.js", "explorer.js", "state.css", "state.js", "vendor/uPlot.iife.min.js",
    "vendor/uPlot.min.css", "icon.svg",
)  # fmt: skip
MOST_AT_ONCE = 20  # runs that are compared


def monitor(logs: Path, settings: MonitorSettings) -> None:
    """Serve the page for the runs below `logs` until the command is interrupted.

    Raises:
        UserError: `logs` is a file, or the address can't be used.
    """
    if logs.exists() and not logs.is_dir():
        raise UserError("LOGS", logs, "must be the folder of the logs, such as logs")
    with PageServer(settings.host, settings.port, site_of(logs, settings)) as server:
        tell(f"The monitor of {logs} is at {server.url} (stop it with Ctrl-C)")
        if not logs.exists():
            warn(f"{logs} does not exist yet; the page shows its runs once training has begun.")
        if not server.is_local:
            warn("warning: everyone who can reach this address can read your runs and use your models.")
        if settings.open:
            webbrowser.open(server.url)
        server.serve_forever()


def site_of(logs: Path, settings: MonitorSettings | None = None) -> Site:
    """Return what the server answers for the runs below `logs`."""
    watched = Watched(logs)
    explorer = Explorer(watched, settings or MonitorSettings())
    files = {f"/{name}": _file(name) for name in FILES} | {"/": _file("monitor.html")}

    def runs(_: Query) -> dict[str, Any]:
        return {"logs": str(logs), "runs": watched.overviews()}

    def curves(query: Query) -> dict[str, Any]:
        first = whole_number("first", _one(query, "first", "0"))
        return watched.curves(_one(query, "run"), _one(query, "key", ""), first, _one(query, "series", "").split(","))

    def details(query: Query) -> dict[str, Any]:
        return details_of(watched.path(_one(query, "run")))

    def differences(query: Query) -> dict[str, Any]:
        return differences_of([watched.path(run) for run in query.get("run", [])[:MOST_AT_ONCE]], watched.root)

    get = {"/api/runs": runs, "/api/curves": curves, "/api/details": details, "/api/differences": differences}
    get |= {"/api/vocabulary": explorer.vocabulary}
    return Site(files, get, {"/api/write": explorer.write, "/api/row": explorer.row})


def _file(name: str) -> Answer:
    return Answer(asset(name), f"{KINDS[Path(name).suffix]}; charset=utf-8")


def _one(query: Query, name: str, default: str | None = None) -> str:
    found = query.get(name, [] if default is None else [default])
    if len(found) != 1:
        raise Refused(400, f"the request must give {name} once")
    return found[0]
