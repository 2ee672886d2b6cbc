"""What stands in front of every route: heads that two readers could understand differently, and bodies that are too much.

Pure ASGI. The connection's own limits (a head that never ends, a client that takes nothing) are `connection`'s.
"""

import asyncio
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.errors import InvalidRequestError
from serve.errors import ClientGoneError
from serve.http.errors import HttpError, error_answer
from serve.http.strict_json import dump
from serve.limits import check_request_id

MAX_HEAD_BYTES = 32 * 2**10
MAX_HEADERS = 100
MAX_BODY_BYTES = 4 * 2**20
MAX_DISCARDED_BYTES = 64 * 2**20
"""Of a body that is refused: read and thrown away, because a client that still sends does not read our answer [bytes]."""
BODY_TIMEOUT_S = 30.0
"""For a whole body to arrive [s]."""

_CLOSE = (b"connection", b"close")


class Guard:
    """Passes on what is sound, with two ids in `scope["state"]`: `request_id`, which every answer carries and which is the
    client's where it sent one (`has_sent_id`), and `call_id`, which is unique.

    The connection ends with an answer that refuses the head, or that is sent before the body was read: what follows is not taken
    for a request.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        is_last = _has_body(scope)  # of its connection, unless the body is read

        async def guarded_receive() -> Message:
            nonlocal is_last
            message = await receive()
            is_last = is_last and message["type"] == "http.request" and message.get("more_body", False)
            return message

        call_id = request_id = uuid.uuid4().hex

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if is_last:
                    message["headers"].append(_CLOSE)
            await send(message)

        try:
            sent_id = _check_head(scope)
        except (HttpError, InvalidRequestError) as error:
            is_last = True
            await send_error(guarded_send, error)
            return
        request_id = sent_id or request_id
        scope.setdefault("state", {}).update(call_id=call_id, request_id=request_id, has_sent_id=sent_id is not None)
        await self._app(scope, guarded_receive, guarded_send)


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body.

    Raises:
        HttpError: it is too large (413) or too slow (408).
        ClientGoneError: the client went away before its end.
    """
    announced = _announced_length(scope)
    if announced > MAX_DISCARDED_BYTES:
        raise _too_large(f"{announced}")
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if max(num_bytes, announced) <= MAX_BODY_BYTES:
                    chunks.append(chunk)
                else:
                    chunks.clear()
                if not message.get("more_body", False) or num_bytes > MAX_DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise HttpError(408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s.", "request_timeout") from None
    if num_bytes > MAX_BODY_BYTES:
        raise _too_large(f"{num_bytes}")
    return b"".join(chunks)


async def send_error(send: Send, error: Exception) -> None:
    status, body, headers = error_answer(error)
    await send_json(send, status, dump(body), headers)


async def send_json(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    length = (b"content-length", b"%d" % len(body))
    head = [(b"content-type", b"application/json"), length, *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _check_head(scope: Scope) -> str | None:
    """The request id that the client sent.

    Raises:
        HttpError, InvalidRequestError: a head that is not taken.
    """
    headers = scope["headers"]
    num_bytes = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
    if len(headers) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES:
        allowed = f"at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes"
        raise HttpError(431, f"The head must be {allowed}, got {len(headers)} headers and {num_bytes} bytes.")
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and (b"content-length" in names or names.count(b"transfer-encoding") > 1):
        raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other: send one of them, once.")
    if scope["http_version"] not in ("1.0", "1.1"):  # h11 takes any; of these two it has checked the Host
        raise HttpError(505, "This version of HTTP is not spoken here: use 1.1.")
    encodings = [value for name, value in headers if name == b"content-encoding"]
    if encodings and encodings != [b"identity"]:
        raise HttpError(415, "A body with a Content-Encoding is not taken: send it as it is.")
    ids = [value.decode("latin-1") for name, value in headers if name == b"x-request-id"]
    if len(ids) > 1:
        raise InvalidRequestError("X-Request-Id", ids, "there once")
    return check_request_id("X-Request-Id", ids[0]) if ids else None


def _announced_length(scope: Scope) -> int:
    """What Content-Length says; h11 has checked that it is a number, and one."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


def _has_body(scope: Scope) -> bool:
    return _announced_length(scope) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


def _too_large(got: str) -> HttpError:
    return HttpError(413, f"The body must be at most {MAX_BODY_BYTES} bytes, got {got}.", "request_too_large")
