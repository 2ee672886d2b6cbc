"""From an exception to a status and OpenAI's error object. Which class is which case is `serve.errors`' table, for every door.

Knows nothing of sockets.
"""

import math
from typing import Any

import grpc
from starlette.exceptions import HTTPException

from jaxserve.errors import JaxserveError
from serve.errors import WrongModelError, answer_to, code_of, shown
from serve.http.strict_json import JsonError

Headers = list[tuple[bytes, bytes]]

_STATUSES: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error", None),
    grpc.StatusCode.NOT_FOUND: (404, "invalid_request_error", None),
    grpc.StatusCode.ALREADY_EXISTS: (409, "conflict_error", None),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.CANCELLED: (499, "client_closed_request", None),
    grpc.StatusCode.UNAVAILABLE: (503, "service_unavailable_error", None),
    grpc.StatusCode.INTERNAL: (500, "server_error", None),
}
"""gRPC's code -> HTTP's status, and OpenAI's type and code."""


class HttpError(JaxserveError):
    """What only HTTP knows: a status of its own, such as 413.

    Attributes:
        status: 4xx.
        code: OpenAI's `code`.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status = status
        self.code = code
        super().__init__(message)


def http_status(error: Exception) -> int:
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, JsonError):
        return 400
    return _STATUSES[code_of(error)][0]


def error_answer(error: Exception) -> tuple[int, dict[str, Any], Headers]:
    """The status, the body, and what else belongs into the head."""
    status = http_status(error)
    if isinstance(error, (HttpError, JsonError)):
        code = error.code if isinstance(error, HttpError) else "invalid_json"
        field = error.field if isinstance(error, JsonError) else None
        return status, _body(shown(str(error)), "invalid_request_error", field and shown(field), code), []
    if isinstance(error, HTTPException):  # of the router
        headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
        return status, _body(error.detail, "invalid_request_error", None, None), headers
    answer = answer_to(error)
    _, kind, code = _STATUSES[answer.code]
    if isinstance(error, WrongModelError):
        code = "model_not_found"
    headers = []
    if answer.retry_after_s is not None:
        headers = [
            (b"retry-after", b"%d" % math.ceil(answer.retry_after_s)),  # the standard has whole seconds
            (b"retry-after-ms", b"%d" % max(1, round(1000 * answer.retry_after_s))),  # the official client knows this, too
        ]
    parameter = "model" if isinstance(error, WrongModelError) else answer.parameter
    return status, _body(answer.message, kind, parameter, code), headers


def _body(message: str, kind: str, parameter: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
