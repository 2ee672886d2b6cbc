"""From an exception to the one status that answers it, on every door, and how gRPC carries it: with google.rpc details.

Knows the tree of `jaxserve.errors` and the table in `jaxserve.proto`; knows nothing of requests. A new error class needs a line
in `_CODES`; HTTP follows from the code (`serve.http.errors`).
"""

import logging
import random
import re
import uuid
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jaxserve import errors

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1024
"""Longest text of a status: it travels in HTTP/2 headers, of which a client takes 8 KB, percent-encoded [characters]."""

RETRY_ELSEWHERE_S = 1.0
"""Retry hint of a server that drains: long enough for a balancer to have noticed [s]."""


class MalformedRequestError(errors.JaxserveError):
    """Bytes that are not the protobuf message that the method takes."""


class DuplicateRequestError(errors.JaxserveError):
    """A request id that belongs to a running request."""


class NoTokenizerError(errors.JaxserveError):
    """Text for, or from, an engine that has no tokenizer."""


class WrongModelError(errors.JaxserveError):
    """A model that is not the one served here."""


class ClientGoneError(errors.JaxserveError):
    """Nobody reads the answer any more."""


_CODES: dict[type[Exception], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConstraintError: grpc.StatusCode.INVALID_ARGUMENT,
    MalformedRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    WrongModelError: grpc.StatusCode.NOT_FOUND,
    ClientGoneError: grpc.StatusCode.CANCELLED,
    NoTokenizerError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DrainingError: grpc.StatusCode.UNAVAILABLE,
    errors.EngineDeadError: grpc.StatusCode.UNAVAILABLE,
    errors.IntegrityError: grpc.StatusCode.INTERNAL,
    errors.JaxserveError: grpc.StatusCode.INTERNAL,
}


def code_of(error: Exception) -> grpc.StatusCode:
    """The status code of an error: that of its nearest class with one; INTERNAL for what nobody raised on purpose."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is told of an error, on whichever door.

    Attributes:
        parameter: the field that is wrong, as the client spells it.
        retry_after_s: when it is worth trying again [s]; None if it never is.
    """

    code: grpc.StatusCode
    message: str
    parameter: str | None = None
    retry_after_s: float | None = None


def answer_to(error: Exception) -> Answer:
    """The answer to an error.

    An INTERNAL one says no more than an id: its cause goes to the log, under the same id.
    """
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        error_id = uuid.uuid4().hex[:12]
        log.error("error_id=%s", error_id, exc_info=error)
        return Answer(code, f"A fault of the server; its log has the cause under error_id={error_id}.")
    message = shown(str(error))
    if code is grpc.StatusCode.INVALID_ARGUMENT:  # bytes that make no sense have no field
        return Answer(code, message, parameter=shown(getattr(error, "parameter", "")))
    if isinstance(error, errors.OverloadedError):
        return Answer(code, message, retry_after_s=_jittered(error.retry_after_s))
    if code is grpc.StatusCode.UNAVAILABLE:
        return Answer(code, message, retry_after_s=_jittered(RETRY_ELSEWHERE_S))
    return Answer(code, message)


def relocated(error: errors.InvalidRequestError, path: str) -> errors.InvalidRequestError:
    """The same error, its parameter spelled as the client spells it."""
    error.args = (path + str(error).removeprefix(error.parameter),)
    error.parameter = path
    return error


def status_of(error: Exception) -> status_pb2.Status:
    """The gRPC status that answers an error."""
    answer = answer_to(error)
    details: list[Message] = []
    if answer.parameter is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=answer.parameter, description=answer.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if answer.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(answer.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(answer.code, answer.message, details)


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def _jittered(after_s: float) -> float:
    """By a fifth, so that clients refused together do not come back together."""
    return after_s * random.uniform(0.8, 1.2)


def shown(text: str) -> str:
    """The text without lone surrogates and control characters, which protobuf and terminals do not take, and not too long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"
