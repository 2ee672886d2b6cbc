"""Which path is answered by what. The endpoints that generate are `generation`'s; the small ones are here."""

import time
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import jaxserve
from jaxserve.errors import DrainingError, EngineDeadError, JaxserveError
from serve.errors import WrongModelError
from serve.http import chat, completions
from serve.http.errors import error_answer
from serve.http.generation import GenerationEndpoint
from serve.http.guard import Guard
from serve.http.strict_json import dump
from serve.running import RunningRequests


@dataclass(frozen=True, slots=True)
class Served:
    """What there is to answer with, once the engine is ready.

    Attributes:
        step_timeout_s: when the lifecycle gives up an engine that makes no step [s]; health says so from half of it on.
        chat_template: the server's; None takes the model's own.
    """

    running: RunningRequests
    step_timeout_s: float
    chat_template: str | None = None
    since_s: int = field(default_factory=lambda: int(time.time()))


class HttpApp:
    """The ASGI application of the front door; answers 503 until `serve` is called."""

    def __init__(self) -> None:
        self._served: Served | None = None
        handlers: dict[Any, Any] = dict.fromkeys((HTTPException, JaxserveError, Exception), _answer_error)
        self._app = Guard(Starlette(routes=self._routes(), exception_handlers=handlers))

    def serve(self, served: Served) -> None:
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _routes(self) -> list[Route]:
        def running() -> RunningRequests:
            return self._need().running

        def read_chat(body: dict[str, Any], call_id: str, running: RunningRequests) -> Any:
            return chat.read_call(body, call_id, running, self._need().chat_template)

        complete = GenerationEndpoint(completions.ENDPOINT, completions.ID_PREFIX, running, completions.read_call)
        converse = GenerationEndpoint(chat.ENDPOINT, chat.ID_PREFIX, running, read_chat)
        return [
            Route(completions.ENDPOINT, complete, methods=["POST"]),
            Route(chat.ENDPOINT, converse, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/health", self._health),
            Route("/ping", self._health, methods=["GET", "POST"]),
            Route("/version", self._version),
            Route("/metrics", self._metrics),
        ]

    def _need(self) -> Served:
        if self._served is None:
            raise DrainingError("The server is starting; its model is not loaded yet.")
        return self._served

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card(self._need())]})

    async def _model(self, request: Request) -> Response:
        served = self._need()
        asked, name = request.path_params["model"], served.running.config.model_name
        if asked != name:
            raise WrongModelError(f"model {asked[:80]!r} is not served here; this is {name!r}.")
        return _json(self._card(served))

    def _card(self, served: Served) -> dict[str, Any]:
        config = served.running.config
        return {
            "id": config.model_name,
            "object": "model",
            "created": served.since_s,
            "owned_by": "jaxserve",
            "max_model_len": config.max_model_len,
        }

    async def _health(self, _: Request) -> Response:
        """200 where requests should be sent: the engine lives, makes progress, and takes new ones."""
        served = self._need()
        served.running.check_open()
        stats = served.running.stats()
        if not stats.is_alive:
            raise EngineDeadError("The engine has stopped after an error.")
        if stats.stalled_s > served.step_timeout_s / 2:
            raise EngineDeadError(f"The engine has work and has made no step for {stats.stalled_s:.0f} s.")
        return _json({"status": "ok"})

    async def _version(self, _: Request) -> Response:
        return _json({"version": jaxserve.__version__})

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._need().running.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(content), status, headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # the router's own words do not say what it looked for
        what = f"{request.method} {request.url.path} is not served here"
        error = HTTPException(error.status_code, f"{what} ({error.detail}).", headers=error.headers)
    status, body, headers = error_answer(error)
    return _json(body, status, {name.decode(): value.decode() for name, value in headers})
