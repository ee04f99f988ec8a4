"""A small web server for this machine: it answers known paths only, and refuses what other sites could send.

It stands on the standard library's http.server, so that `indra monitor` needs no package more. That server is meant for
a few trusted readers, which is what we have; what it lacks is here: limits on sizes and connections, and the checks
below. The page is same-origin, static and without secrets, so no framework is needed.

- A wrong Host header is refused. Otherwise another site could let its own name point to this machine (DNS rebinding).
- A request from another origin is refused. Otherwise any page in your browser could send one.
- The browser may load nothing from elsewhere, and runs no script but ours (Content-Security-Policy).
- No part of a path is ever used as a file name.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from indraquantum.errors import IndraError, UserError, reason
from indraquantum.progress import warn

MOST_CONNECTIONS = 64
MOST_BYTES = 1 << 16  # of a request's body
SECONDS_TO_READ = 30
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


@dataclass(frozen=True)
class Answer:
    """The body of an answer and its type."""

    content: bytes
    kind: str


Query = dict[str, list[str]]


@dataclass(frozen=True)
class Site:
    """What the server answers.

    Attributes:
        files: the content of static files by path.
        get: functions that answer GET requests, by path. They get the query.
        post: functions that answer POST requests, by path. They get the JSON object of the body.
    """

    files: dict[str, Answer]
    get: dict[str, Callable[[Query], Any]]
    post: dict[str, Callable[[dict[str, Any]], Any]]


class PageServer(ThreadingHTTPServer):
    """Serves a site in threads. `url` is where.

    Args:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        site: what to answer.

    Raises:
        UserError: the address can't be used.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, site: Site) -> None:
        self.site = site
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = found[0]
            super().__init__(found[4][:2], _Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            allowed = f"must be a free port on an address of this machine ({reason}); give another --port or --host"
            raise UserError("--port", f"{host}:{port}", allowed) from None
        self.is_local = ipaddress.ip_address(self.server_address[0]).is_loopback
        self._names = LOCAL_NAMES | {host.lower()} | (set() if self.is_local else {socket.gethostname().lower()})
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_port}/"

    def server_bind(self) -> None:
        """Bind without asking a name server for our own name, as http.server would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about connections that broke."""

    def knows(self, host: str) -> bool:
        """Return whether a request may call this server `host`, as its Host header does.

        Any port is allowed, because a tunnel changes it. An address is allowed where the server is open to others: only
        a name can be made to point here.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        return name in self._names or (not self.is_local and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "indra", ""
    timeout = SECONDS_TO_READ

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request would hide what matters."""

    def _respond(self, method: Callable[[str, Query], Answer]) -> None:
        try:
            asked = _asked(self.path)
            self._check(asked.path)
            status, answer = 200, method(asked.path, asked.query)
        except Refused as refused:
            status, answer = refused.status, _json({"error": refused.reason})
        except IndraError as error:
            status, answer = 400, _json({"error": str(error)})
        except OSError as error:
            status, answer = 500, _json({"error": f"a file can't be read: {error.strerror or reason(error)}"})
        except Exception as error:  # such as of torch; the page says which, and the next request is answered
            failure = f"{type(error).__name__}: {reason(error)}"
            warn(f"warning: {self.command} {asked.path} failed: {failure}")
            status, answer = 500, _json({"error": f"the monitor failed: {failure}"})
        if status != 200:
            self.close_connection = True  # the body may not have been read
        self._send(status, answer)

    def _send(self, status: int, answer: Answer) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.content)

    def _check(self, path: str) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(403, "this server is not known by that name; open it by its address, as it was printed")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{hosts[0]}":
            raise Refused(403, "requests from other sites are refused")
        if path.startswith("/api/") and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(403, "requests from other sites are refused")

    def _get(self, path: str, query: Query) -> Answer:
        site = self.server.site
        if path in site.files:
            return site.files[path]
        if path not in site.get:
            raise Refused(405 if path in site.post else 404, "there is nothing at this address")
        return _json(site.get[path](query))

    def _post(self, path: str, _: Query) -> Answer:
        site = self.server.site
        if path not in site.post:
            raise Refused(405 if path in site.get or path in site.files else 404, "there is nothing at this address")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body must be JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the length of the body must be given")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise Refused(413, f"the body must have at most {MOST_BYTES:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body must be JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return _json(site.post[path](body))


class _Asked(NamedTuple):
    """What a request asks for."""

    path: str
    query: Query


def _asked(target: str) -> _Asked:
    """Read the target of a request.

    Raises:
        Refused: it is no address.
    """
    try:
        parts = urlsplit(target)
        return _Asked(parts.path, parse_qs(parts.query, max_num_fields=100))
    except ValueError as error:
        raise Refused(400, f"the request can't be read: {error}") from None


def whole_number(name: str, text: str) -> int:
    """Return the whole number that a request gives as `name`.

    Raises:
        Refused: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise Refused(400, f"{name} must be a whole number") from None


def _json(value: Any) -> Answer:
    try:
        content = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # as of a NaN; the request is right
        raise RuntimeError(f"the answer is no JSON: {error}") from None
    return Answer(content.encode(), "application/json")
