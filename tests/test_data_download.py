"""Downloads, against a real HTTP server on loopback that also lies and breaks off."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading

import pytest

from indraquantum.data import download
from indraquantum.data.download import download_url, git_blob_id
from indraquantum.data.sources import AlpacaSample, read_alpaca
from indraquantum.errors import UserError

ITEMS = [{"instruction": f"Add {n}", "input": "2 3", "output": "5"} for n in range(2000)]
CONTENT = json.dumps(ITEMS).encode()
ETAG = '"first"'


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, each address with its own vice."""

    requests: list[tuple[str, int]] = []  # address and first byte asked for

    def do_GET(self):
        kind = self.path.strip("/").partition(".")[0]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.requests.append((kind, start))
        first = sum(known == kind for known, _ in self.requests) == 1
        if kind == "missing":
            self.send_error(404, "Not Found")
            return
        if kind == "refuses" and start:
            self.send_error(416)
            return
        content, etag = CONTENT, ETAG
        if kind == "changes" and not first:
            content, etag = CONTENT.replace(b"Add", b"Sum"), '"second"'
        known = (self.headers.get("If-Range") or "").removeprefix("W/")
        resumed = start and known == etag and kind != "ignores"
        if not resumed:
            start = 0
        body = content[start:]
        if kind == "weak" and start:
            body = body.swapcase()  # another spelling that is "equivalent"
        if kind == "elsewhere" and start:
            body = content
        self.send_response(206 if resumed else 200)
        if kind != "nameless":
            self.send_header("ETag", f"W/{etag}" if kind == "weak" else etag)
        if resumed:
            place = 0 if kind == "elsewhere" else start
            self.send_header("Content-Range", f"bytes {place}-{len(content) - 1}/{len(content)}")
        declared = len(body) + {"longer": 7, "shorter": -7}.get(kind, 0)
        self.send_header("Content-Length", str(declared))
        self.end_headers()
        if kind in ("drops", "changes", "ignores", "refuses", "elsewhere", "weak", "nameless") and first:
            body = body[: len(body) // 2]
        if kind == "trickles":
            body = body[:20_000]
        if kind == "stuck":
            body = body[:1000] if first else b""
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Handler, "requests", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def samples(word="Add"):
    return [AlpacaSample(f"{word} {n}", "2 3", "5") for n in range(2000)]


def test_alpaca_by_url(server):
    assert read_alpaca("--alpaca", f"{server}/alpaca.json") == samples()


def test_a_pinned_file_is_fetched_once_and_mended_when_damaged(server, monkeypatch):
    url = f"{server}/alpaca.json"
    # Git's own rule for a blob: sha1 of "blob <length>\0<content>".
    blob = hashlib.sha1(b"blob " + str(len(CONTENT)).encode() + b"\0" + CONTENT).hexdigest()
    monkeypatch.setitem(download.GIT_BLOBS, url, blob)
    path = download_url("--alpaca", url, "help")
    assert download_url("--alpaca", url, "help").read_bytes() == CONTENT
    assert len(Handler.requests) == 1
    path.write_bytes(b"damaged")
    assert download_url("--alpaca", url, "help").read_bytes() == CONTENT
    assert len(Handler.requests) == 2


def test_git_blob_id(tmp_path):
    (tmp_path / "hello").write_text("hello")
    # As `printf hello | git hash-object --stdin` prints it.
    assert git_blob_id(tmp_path / "hello") == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"


@pytest.mark.parametrize("kind", ["drops", "trickles"])
def test_a_dropped_connection_goes_on_where_it_was(server, kind):
    pin = hashlib.sha256(CONTENT).hexdigest()
    path = download_url("--alpaca", f"{server}/{kind}.json#sha256={pin}", "help")
    assert path.read_bytes() == CONTENT
    starts = [start for _, start in Handler.requests]
    assert starts == sorted(set(starts)), "no byte twice"
    assert len(starts) == (2 if kind == "drops" else -(-len(CONTENT) // 20_000))
    assert {path.name for path in path.parent.iterdir()} == {f"{kind}.json", ".lock"}


@pytest.mark.parametrize("kind", ["ignores", "refuses", "elsewhere", "weak", "nameless"])
def test_a_server_that_can_not_go_on_begins_again(server, kind):
    assert download_url("--alpaca", f"{server}/{kind}.json", "help").read_bytes() == CONTENT


def test_a_file_that_changes_in_between_is_never_mixed(server):
    assert read_alpaca("--alpaca", f"{server}/changes.json") == samples("Sum")


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    with pytest.raises(UserError, match=rf"ended after 1000 of {len(CONTENT)} bytes; the same command goes on"):
        download_url("--alpaca", f"{server}/stuck.json", "help")
    assert len(Handler.requests) == 1 + download.ATTEMPTS - 1
    assert {path.name for path in files_in(tmp_path)} == {".stuck.json.part", ".stuck.json.state", ".lock"}
    with pytest.raises(UserError):
        download_url("--alpaca", f"{server}/stuck.json", "help")
    assert Handler.requests[-1] == ("stuck", 1000)


@pytest.mark.parametrize(
    ("kind", "word"), [("longer", "ended after"), ("missing", "Not Found"), ("other", "not the pinned"),
                       ("shorter", "not the pinned")]
)  # fmt: skip
def test_a_bad_download_never_gets_its_name(server, tmp_path, kind, word):
    pin = hashlib.sha256(CONTENT if kind == "shorter" else b"other").hexdigest()
    fragment = f"#sha256={pin}" if word == "not the pinned" else ""
    with pytest.raises(UserError, match=word) as caught:
        download_url("--alpaca", f"{server}/{kind}.json{fragment}", "give a file with --alpaca PATH")
    assert "--alpaca PATH" in str(caught.value)
    assert all(path.name.startswith(".") for path in files_in(tmp_path))


def test_a_file_cut_by_a_server_that_hides_it_is_no_json(server):
    with pytest.raises(UserError, match="must be JSON"):
        read_alpaca("--alpaca", f"{server}/shorter.json")


def test_a_pin_must_be_one(server):
    for fragment in ("sha256=12", "md5=" + "0" * 64, "top"):
        with pytest.raises(UserError, match="#sha256="):
            download_url("--alpaca", f"{server}/alpaca.json#{fragment}", "help")
    assert Handler.requests == []


def test_no_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"could not be downloaded .*--alpaca PATH"):
        read_alpaca("--alpaca", f"http://127.0.0.1:{port}/alpaca.json")
    with pytest.raises(UserError, match="could not be downloaded"):
        read_alpaca("--alpaca", "http://127.0.0.1:port/alpaca.json")
    assert {path.name for path in files_in(tmp_path)} <= {".lock"}


@pytest.mark.shared
def test_the_default_urls_pin(shared):
    """The id's form only: the full file is not here, and the part that is must not pass for it."""
    (pin,) = download.GIT_BLOBS.values()
    part = shared / "data/alpaca/alpaca_data.json"
    assert len(pin) == len(git_blob_id(part)) == 40
    assert git_blob_id(part) != pin
