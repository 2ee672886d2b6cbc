"""The front doors as one: gRPC always, HTTP unless it is turned off. Knows their order, and what each needs to serve."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.errors import ConfigError, InvalidRequestError
from serve.rpc.server import RpcServer
from serve.rpc.service import GenerationService
from serve.running import RunningRequests
from serve.settings import ServerConfig

if TYPE_CHECKING:
    from serve.http.server import HttpServer

STOP_GRACE_S = 0.5
"""For what is being written when the doors close [s]."""


class Endpoints(NamedTuple):
    """Where clients connect to, host and port.

    Attributes:
        http: None where this door is turned off.
    """

    grpc: str
    http: str | None


class Doors:
    """Ports that are taken, and the servers behind them; made by `open_doors`."""

    def __init__(self, config: ServerConfig, rpc: RpcServer, http: "HttpServer | None", chat_template: str | None):
        self.endpoints = Endpoints(rpc.endpoint, None if http is None else http.endpoint)
        self._config = config
        self._rpc = rpc
        self._http = http
        self._chat_template = chat_template

    async def start(self, running: RunningRequests) -> None:
        """Serves; both say that they are ready from now on."""
        if self._http is not None:
            from serve.http.app import Served

            self._http.app.serve(Served(running, self._config.step_timeout_s, self._chat_template))
        await self._rpc.start(GenerationService(running), with_reflection=self._config.reflection)

    async def set_draining(self) -> None:
        """gRPC's health says NOT_SERVING from now on; HTTP's asks the running requests."""
        await self._rpc.set_draining()

    async def stop(self) -> None:
        """Frees the ports; what is open after the grace is cut off."""
        stops = [self._rpc.stop(STOP_GRACE_S)]
        if self._http is not None:
            stops.append(self._http.stop(STOP_GRACE_S))
        await asyncio.gather(*stops)


async def open_doors(config: ServerConfig) -> Doors:
    """Takes the ports. HTTP answers from now on, with 503; gRPC lets its clients wait.

    Raises:
        ConfigError: a port that cannot be bound, or a chat template that cannot be used.
    """
    chat_template = None if config.chat_template is None else _read_template(Path(config.chat_template))
    http = None
    if config.http:
        from serve.http.server import HttpServer

        http = HttpServer(config.host, config.http_port, write_timeout_s=config.write_timeout_s)
    try:
        rpc = RpcServer(config.host, config.grpc_port)
    except ConfigError:
        if http is not None:
            await http.stop(0.0)
        raise
    if http is not None:
        await http.start()
    return Doors(config, rpc, http, chat_template)


def _read_template(path: Path) -> str:
    from jaxserve.tokenization.chat_template import render_chat

    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from None
    try:
        render_chat(template, [{"role": "user", "content": "Hello"}])
    except InvalidRequestError as error:
        if error.parameter == "chat_template":  # else it refuses this conversation, and may take others
            raise ConfigError(f"--chat-template {path}: {error}") from None
    return template
