"""What tests of exported pages share: packed npm packages that hold no program, and a server of files."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

from indraquantum.inference import browser_runtime


def pack_hollow(folder: Path, monkeypatch) -> dict[str, bytes]:
    """Write packed files with the right names into `folder`, and let the package expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    packages, contents = [], {}
    for package in browser_runtime.PACKAGES:
        with tarfile.open(folder / package.packed, "w:gz") as archive:
            for member, name in package.files.items():
                contents[name] = f"the content of {name}".encode()
                info = tarfile.TarInfo(member)
                info.size = len(contents[name])
                archive.addfile(info, io.BytesIO(contents[name]))
        digest = hashlib.sha512((folder / package.packed).read_bytes()).digest()
        packages.append(replace(package, sha512=base64.b64encode(digest).decode()))
    monkeypatch.setattr(browser_runtime, "PACKAGES", tuple(packages))
    return contents


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder: Path):
    """Serve the files of `folder`; yield the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
