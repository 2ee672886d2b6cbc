"""The HTTP server: its address, and its place in the service's life. Knows nothing of what the routes do."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn

from jaxserve.errors import ConfigError
from serve.addresses import join, listening_socket, warn_if_open
from serve.http.app import HttpApp
from serve.http.connection import bounded_protocol
from serve.http.guard import MAX_HEAD_BYTES

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 30
"""For the next request of an idle connection [s]."""


class HttpServer:
    """A port that is taken at once, so that a clash shows before a model is loaded.

    After `start` it answers; with 503 until its app is told what it serves.
    """

    def __init__(self, host: str, port: int, *, write_timeout_s: float):
        try:
            self._socket = listening_socket(host, port)
        except OSError as error:
            raise ConfigError(
                f"http_port: {join(host, port)} cannot be bound ({error.strerror or error}). Stop what listens there, change "
                "--host or --http-port, or turn this door off with --no-http."
            ) from None
        self.port = self._socket.getsockname()[1]
        self.endpoint = join(host, self.port)
        self.app = HttpApp()
        self._server = _Server(
            uvicorn.Config(
                self.app,
                http=bounded_protocol(write_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.ERROR,  # below it are lines about what clients do wrong
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        log.info("HTTP listens on %s, without TLS", self.endpoint)
        warn_if_open(self.endpoint, host)

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.is_listening.wait()

    async def stop(self, grace_s: float) -> None:
        """Frees the port; what is open after the grace is cut off."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=grace_s)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving


class _Server(uvicorn.Server):
    """Says when it listens, and leaves the signals to the lifecycle."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
