"""The server of `indra monitor`: what it answers, and what it refuses."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import threading

import pytest

from indraquantum import cli
from indraquantum.config import MonitorSettings
from indraquantum.errors import UserError
from indraquantum.live import details, watched
from indraquantum.live.monitor import FILES, monitor, site_of
from indraquantum.live.server import MOST_BYTES, PageServer, Site
from indraquantum.metrics import FIELDS, _line
from indraquantum.monitor.curves import Follower
from indraquantum.web import FOLDER, asset

HOSTILE = "<img src=x onerror=alert(1)>"


def write_run(folder, steps=5, **settings) -> None:
    folder.mkdir(parents=True)
    lines = [_line(dict.fromkeys(FIELDS) | {"step": n, "tokens": n, "loss": 5.0 - n}) for n in range(steps)]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    (folder / "run.json").write_text(json.dumps({"settings": {"output": str(folder), **settings}, "total_steps": 9}))


@pytest.fixture
def logs(tmp_path):
    write_run(tmp_path / "logs" / "one", seed=1)
    write_run(tmp_path / "logs" / HOSTILE, seed=2)
    write_run(tmp_path / "outside")
    return tmp_path / "logs"


@pytest.fixture
def serve():
    """Return a function that serves a site until the test ends."""
    servers = []

    def start(site: Site, host: str = "127.0.0.1") -> PageServer:
        server = PageServer(host, 0, site)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, path, method="GET", body=None, **headers) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def told(server, path, **headers):
    status, _, content = ask(server, path, **headers)
    assert status == 200, content
    return json.loads(content)


def test_runs_curves_and_details_are_those_of_the_files(logs, serve):
    server = serve(site_of(logs))
    runs = {run["name"]: run for run in told(server, "/api/runs")["runs"]}
    assert set(runs) == {"one", HOSTILE}
    assert (runs["one"]["steps"], runs["one"]["total_steps"], runs["one"]["loss"]) == (4, 9, 1.0)
    run = runs["one"]["id"]
    curves = told(server, f"/api/curves?run={run}&series=loss,nonsense,kd")
    assert (curves["steps"], curves["series"]) == ([0, 1, 2, 3, 4], {"loss": [5, 4, 3, 2, 1]})
    with (logs / "one" / "metrics.jsonl").open("ab") as file:
        file.write(_line(dict.fromkeys(FIELDS) | {"step": 5, "loss": 0.1234567891}))
    later = told(server, f"/api/curves?run={run}&series=loss&key={curves['key']}&first={curves['complete']}")
    assert (later["first"], later["steps"], later["series"]) == (5, [5], {"loss": [0.1234568]})
    assert told(server, f"/api/details?run={run}")["settings"]["--seed"] == "1"
    ids = "&".join(f"run={found['id']}" for found in runs.values())
    assert [row[0] for row in told(server, f"/api/differences?{ids}")["rows"]] == ["--seed"]


def test_a_run_that_appears_and_one_that_is_removed(logs, serve, monkeypatch):
    monkeypatch.setattr("indraquantum.live.watched.SECONDS_BETWEEN_LISTS", 0)
    server = serve(site_of(logs))
    write_run(logs / "deep" / "new")
    runs = {run["name"]: run["id"] for run in told(server, "/api/runs")["runs"]}
    assert "deep/new" in runs
    (logs / "deep" / "new" / "metrics.jsonl").unlink()
    assert ask(server, f"/api/curves?run={runs['deep/new']}")[0] == 404
    assert len(told(server, "/api/runs")["runs"]) == 2


def test_names_that_no_url_can_carry(logs, serve):
    write_run(logs / os.fsdecode(b"\xff\xfe"))
    server = serve(site_of(logs))
    run = next(run for run in told(server, "/api/runs")["runs"] if "\udcff" in run["name"])
    assert told(server, f"/api/curves?run={run['id']}&series=loss")["series"]["loss"][0] == 5


def test_a_disk_that_fails_or_is_slow_does_not_stop_the_page(logs, serve, monkeypatch):
    """While a file hangs, the list is answered; an error of the system is told, and other runs are shown."""
    server, read, hangs = serve(site_of(logs)), Follower.read, threading.Event()
    runs = {run["name"]: run["id"] for run in told(server, "/api/runs")["runs"]}

    def failing(follower, seconds):
        if follower._path.parent.name == "one":
            raise OSError(5, "Input/output error")
        return read(follower, seconds)

    monkeypatch.setattr(Follower, "read", failing)
    status, _, content = ask(server, f"/api/curves?run={runs['one']}&series=loss")
    assert (status, json.loads(content)) == (500, {"error": "a file can't be read: Input/output error"})
    assert told(server, f"/api/curves?run={runs[HOSTILE]}&series=loss")["steps"]
    monkeypatch.setattr(Follower, "read", lambda *_: hangs.wait(20))
    waiting = threading.Thread(target=ask, args=(server, f"/api/curves?run={runs['one']}"))
    waiting.start()
    assert len(told(server, "/api/runs")["runs"]) == 2
    assert waiting.is_alive()
    hangs.set()
    waiting.join()


def test_a_run_on_a_drive_that_is_gone_hides_no_other_run(logs, serve, monkeypatch):
    fingerprint = watched._fingerprint

    def failing(path):
        if path.parent.name == "one":
            raise OSError(errno.ESTALE, "Stale file handle")
        return fingerprint(path)

    monkeypatch.setattr(watched, "_fingerprint", failing)
    runs = {run["name"]: run for run in told(serve(site_of(logs)), "/api/runs")["runs"]}
    assert (runs["one"]["state"], runs["one"]["problem"]) == ("damaged", "can't be read (Stale file handle)")
    assert runs[HOSTILE]["steps"] == 4


def failing_with(error):
    def fail(_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (failing_with(RuntimeError("no memory\nat all")), "RuntimeError: no memory at all"),
        (failing_with(ValueError("the logits are NaN")), "ValueError: the logits are NaN"),
        (lambda _: {"figure": float("nan")}, "RuntimeError: the answer is no JSON"),
    ],
    ids=["error", "value", "NaN"],
)
def test_a_failure_in_here_is_told_to_the_page_and_on_stderr(serve, capsys, answer, reason):
    server = serve(Site({}, {"/api/x": answer}, {"/api/y": answer}))
    status, _, content = ask(server, "/api/x?a=1")
    assert (status, reason in json.loads(content)["error"]) == (500, True)
    status, _, content = ask(server, "/api/y", "POST", b"{}", Content_Type="application/json")
    assert (status, reason in json.loads(content)["error"]) == (500, True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(reason)[0] for line in lines] == [
        "warning: GET /api/x failed: ", "warning: POST /api/y failed: ",
    ]  # fmt: skip


def test_checkpoints_are_listed_with_the_steps_of_their_manifests(logs, serve):
    for name, step in (("checkpoint_v4_epoch_1", 7), ("checkpoint_v4_step_3", None), ("other", 1)):
        (logs / "one" / f"{name}.pt").write_bytes(b"12345")
        if step:
            (logs / "one" / f"{name}.json").write_text(json.dumps({"step": step}))
    server = serve(site_of(logs))
    run = next(run["id"] for run in told(server, "/api/runs")["runs"] if run["name"] == "one")
    found = told(server, f"/api/details?run={run}")["checkpoints"]
    assert {(one["name"], one["step"], one["bytes"]) for one in found} == {
        ("checkpoint_v4_epoch_1.pt", 7, 5), ("checkpoint_v4_step_3.pt", None, 5),
    }  # fmt: skip


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(logs, monkeypatch):
    folder = logs / "one"
    (folder / "checkpoint_v4_epoch_1.pt").write_bytes(b"12345")
    (folder / "checkpoint_v4_epoch_2.pt").symlink_to(folder / "gone")  # removed between the list and its time

    def names():
        return [found["name"] for found in details.details_of(folder / "metrics.jsonl")["checkpoints"]]

    assert names() == ["checkpoint_v4_epoch_1.pt"]
    listed = details.checkpoints_of  # removed between its time and its size
    monkeypatch.setattr(details, "checkpoints_of", lambda record: [folder / "gone.pt", *listed(record)])
    assert names() == ["checkpoint_v4_epoch_1.pt"]


@pytest.mark.parametrize("path", [
    "/../run.json", "/%2e%2e/run.json", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/vendor/../monitor.js",
    "/__init__.py", "/vendor/", "/api/", "/api/curves/../runs", "/%00", "/monitor.js%00.html", "/etc/passwd",
    "http://127.0.0.1/etc/passwd",
])  # fmt: skip
def test_there_is_nothing_at_paths_that_lead_elsewhere(logs, serve, path):
    assert ask(serve(site_of(logs)), path)[0] == 404


@pytest.mark.parametrize(
    "run", ["../outside", "one", "%2e%2e%2foutside", "", "0" * 16, "one%00", "%ff", "a&run=b"], ids=repr
)
def test_a_run_is_no_path(logs, serve, run):
    server = serve(site_of(logs))
    for what in ("curves", "details"):
        assert ask(server, f"/api/{what}?run={run}")[0] in (400, 404)
    assert ask(server, f"/api/differences?run={run or 1}")[0] == 404


@pytest.mark.parametrize("query", ["first=x", "first=-1", "first=9999", "first=1&first=2", "key=x&first=3"])
def test_questions_that_make_no_sense_harm_nothing(logs, serve, query):
    server = serve(site_of(logs))
    run = told(server, "/api/runs")["runs"][0]["id"]
    assert ask(server, f"/api/curves?run={run}&series=loss&{query}")[0] in (200, 400)
    assert told(server, f"/api/curves?run={run}&series=loss")["first"] == 0


ALLOWED_HOSTS = ["localhost", "localhost:9999", "127.0.0.1:1", "[::1]:80", "LOCALHOST"]
REFUSED_HOSTS = ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil.example", "192.0.2.1",
                 "localhost.", "[::1", "127.1"]  # fmt: skip


@pytest.mark.parametrize("host", ALLOWED_HOSTS + REFUSED_HOSTS)
def test_only_names_of_this_machine_are_answered(logs, serve, host):
    server = serve(site_of(logs))
    for path in ("/", "/monitor.js", "/api/runs"):
        status = ask(server, path, Host=host)[0]
        assert status == (200 if host in ALLOWED_HOSTS else 403)


def raw(server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(request)
        return connection.recv(1 << 16)


def test_no_host_and_two_hosts_are_refused(logs, serve):
    server = serve(site_of(logs))
    assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\n\r\n")
    assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
    assert b" 400 " in raw(server, b"GET / nonsense\r\n\r\n")
    assert b" 414 " in raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
    assert b" 501 " in raw(server, b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost:1234"}, 200), ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Origin": "https://localhost:1234"}, 403),
        ({"Origin": "http://localhost:1235"}, 403), ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)  # fmt: skip
def test_other_sites_can_ask_nothing(logs, serve, headers, status):
    assert ask(serve(site_of(logs)), "/api/runs", Host="localhost:1234", **headers)[0] == status


def test_what_a_body_may_be(serve):
    got = []
    server = serve(Site({}, {}, {"/api/x": lambda body: got.append(body) or {"ok": True}}))
    json_type = {"Content_Type": "application/json"}
    assert ask(server, "/api/x", "POST", b'{"a": 1}', **json_type)[0] == 200
    assert ask(server, "/api/x", "POST", b'{"a": 1}')[0] == 415  # as a form of another site could send it
    assert ask(server, "/api/x", "POST", b'{"a": 1}', Content_Type="text/plain")[0] == 415
    for body in (b"[1]", b"{", b"\xff", b"[" * 60_000):
        assert ask(server, "/api/x", "POST", body, **json_type)[0] == 400
    assert ask(server, "/api/x", "POST", b" " * (MOST_BYTES + 1), **json_type)[0] == 413
    assert ask(server, "/api/x", "POST", b"{}", Content_Length="-1", **json_type)[0] == 411
    assert ask(server, "/api/x")[0] == 405
    assert ask(server, "/api/y", "POST", b"{}", **json_type)[0] == 404
    assert got == [{"a": 1}]


def test_headers_let_a_browser_load_nothing_from_elsewhere(logs, serve):
    _, headers, content = ask(serve(site_of(logs)), "/")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"<script>" not in content
    for name in [*FILES, "monitor.html"]:
        if not name.startswith("vendor/"):
            own = asset(name).decode().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in own
            assert "https://" not in own
    assert (FOLDER / "vendor" / "uPlot.LICENSE").is_file()


def test_an_address_that_is_taken_is_one_line(logs, serve, capsys):
    server = serve(site_of(logs))
    with pytest.raises(UserError, match="must be a free port"):
        monitor(logs, MonitorSettings(port=server.server_port))
    with pytest.raises(SystemExit) as left:
        cli.main(["monitor", str(logs), "--port", str(server.server_port)])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_runs_waits_for_the_first(tmp_path, serve):
    server = serve(site_of(tmp_path / "nothing"))
    assert told(server, "/api/runs")["runs"] == []


def test_a_file_is_no_folder_of_logs_and_a_missing_folder_is_told(logs, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"LOGS: got .*must be the folder of the logs"):
        monitor(logs / "one" / "metrics.jsonl", MonitorSettings(port=0))
    monkeypatch.setattr(PageServer, "serve_forever", lambda self: None)
    monitor(tmp_path / "lgos", MonitorSettings(port=0))
    assert "lgos does not exist yet" in capsys.readouterr().err
    monitor(logs, MonitorSettings(port=0))
    assert "exist" not in capsys.readouterr().err
