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

CONTENT = json.dumps([{"instruction": "Add", "input": "2 3", "output": "5"}]).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/missing.json":
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) + (7 if self.path == "/short.json" else 0)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


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


def test_alpaca_by_url(server):
    assert read_alpaca("--alpaca", f"{server}/alpaca.json") == [AlpacaSample("Add", "2 3", "5")]


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


def test_git_blob_id():
    # As `printf hello | git hash-object --stdin` prints it.
    assert git_blob_id(b"hello") == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"


@pytest.mark.parametrize(
    ("name", "word"), [("short.json", "ended after"), ("missing.json", "Not Found"), ("other.json", "not the pinned")]
)
def test_a_bad_download_leaves_nothing(server, tmp_path, monkeypatch, name, word):
    url = f"{server}/{name}"
    if name == "other.json":
        monkeypatch.setitem(download.GIT_BLOBS, url, "0" * 40)
    with pytest.raises(UserError, match=word) as caught:
        download_url("--alpaca", url, "give a file with --alpaca PATH")
    assert "--alpaca PATH" in str(caught.value)
    assert files_in(tmp_path) == []


def test_no_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"could not be downloaded .*--alpaca PATH"):
        read_alpaca("--alpaca", f"http://127.0.0.1:{port}/alpaca.json")
    with pytest.raises(UserError, match="could not be downloaded"):
        read_alpaca("--alpaca", "http://127.0.0.1:port/alpaca.json")
    assert files_in(tmp_path) == []


@pytest.mark.shared
def test_the_default_urls_pin(shared):
    """The id's form only: the full file is not here, and the part that is must not pass for it."""
    (pin,) = download.GIT_BLOBS.values()
    part = (shared / "data/alpaca/alpaca_data.json").read_bytes()
    assert len(pin) == len(git_blob_id(part)) == 40
    assert git_blob_id(part) != pin
