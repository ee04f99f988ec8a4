"""Loads a model and serves it until a signal comes: the command `indra serve`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indraquantum.api_key import API_KEY, refused_key, usable_key
from indraquantum.config import ServeSettings
from indraquantum.device import choose_device
from indraquantum.errors import UserError, optional_package
from indraquantum.inference.load import Loaded, load
from indraquantum.interrupts import heeded
from indraquantum.model.decoder import PackedModel
from indraquantum.progress import tell, warn
from indraquantum.serving.engine import Engine

if TYPE_CHECKING:
    import uvicorn

BACKLOG = 512  # connections that the system accepts before we do
READER_SECONDS = 60  # after which a connection is cut whose reader takes nothing
STOP_SECONDS = 30  # that running answers get after the first signal
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def serve_checkpoint(path: Path, settings: ServeSettings) -> None:
    """Load the checkpoint or the exported folder at `path`, and serve it.

    Raises:
        UserError: a package is missing, the model can't be loaded, or the address can't be had.
    """
    for package in ("starlette", "uvicorn"):
        with optional_package("indra", "serve", package, "indraquantum[serve]"):
            importlib.import_module(package)
    with listening(settings) as listener:  # first, because loading takes longer
        loaded = load(path, choose_device(settings), settings.weights)
        packed = PackedModel(loaded.inference_model, gather=True)
        with Engine(packed, loaded.tokenizer.eos_id, settings.slots, settings.queue) as engine:
            asyncio.run(server_of(loaded, settings, engine, listener).serve(sockets=[listener]))
    tell("The server has stopped.")


@contextlib.contextmanager
def listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """Open the socket.

    Raises:
        UserError: the address does not exist here, the port is taken, or the system forbids it.
    """
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError("--host", settings.host, "must be an address of this machine, such as 127.0.0.1") from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                allowed = "is taken by another program; choose another one, or 0 for a free one"
                raise UserError("--port", settings.port, allowed) from None
            if error.errno == errno.EACCES:
                raise UserError("--port", settings.port, "must be one that you may use, such as 8000") from None
            raise UserError("--host", settings.host, "must be an address of this machine, such as 127.0.0.1") from None
        listener.listen(BACKLOG)
        yield listener


def model_name(path: Path) -> str:
    """Return the name of the model at `path`: its folder and its own name."""
    path = path.resolve()
    return f"{path.parent.name}/{path.stem if path.is_file() else path.name}".lstrip("/")


def server_of(loaded: Loaded, settings: ServeSettings, engine: Engine, listener: socket.socket) -> uvicorn.Server:
    """Return the server, and print where it will be found."""
    import uvicorn

    from indraquantum.serving.app import Application, Guard, Served

    host, port = listener.getsockname()[:2]
    option, given = ("--api-key", settings.api_key) if settings.api_key else (API_KEY, os.environ.get(API_KEY))
    key = usable_key(option, given) if given else None
    if key == "":  # blanks alone, which would let everybody in
        raise refused_key(option)
    local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    served = Served(
        engine=engine,
        tokenizer=loaded.tokenizer,
        name=settings.name or model_name(loaded.path),
        context=engine.packed.context,
        largest_body=settings.max_body << 20,
        started=int(time.time()),
    )
    allowed = LOOPBACK | {settings.host.lower()} if local else None
    config = uvicorn.Config(
        Guard(Application(served).starlette, allowed, key), http=_protocol(), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=STOP_SECONDS,
        limit_concurrency=settings.slots + settings.queue + 64, backlog=BACKLOG,
    )  # fmt: skip
    at = f"[{host}]" if ":" in host else host
    tell(f"Serving {served.name} at http://{at}:{port}/v1, context {served.context} tokens. Ctrl-C stops it.")
    if not local and key is None:
        warn("Every machine that can reach this one can use the server; --api-key sets a key.")
    # An answer that was cut short when the server stopped at once is no error.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: "ASGI callable returned without" not in record.getMessage()
    )
    return _server(config)


def _protocol() -> Any:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """uvicorn's HTTP, which cuts a connection whose reader takes nothing for a while."""

        cut: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self.cut = self.loop.call_later(READER_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cut is not None:
                self.cut.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.cut is not None:
                self.cut.cancel()
            super().connection_lost(exc)

    return Protocol


def _server(config: uvicorn.Config) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's server, for which a signal is the ordinary end, with exit status 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread
                for number in heeded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    loop.add_signal_handler(number, self._asked)
            yield

        def _asked(self) -> None:
            if not self.should_exit:
                tell("Stopping: running answers may end first. A second signal stops at once.")
            self.force_exit = self.should_exit
            self.should_exit = True

    return Server(config)
