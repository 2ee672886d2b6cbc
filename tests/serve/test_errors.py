import re

import grpc
import pytest
from google.rpc import error_details_pb2

import serve.errors
from jaxserve import errors
from serve import errors as serve_errors
from serve import generation
from serve.errors import code_of, status_of


def tree(root=errors.JaxserveError):
    return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]


def test_every_error_of_the_tree_has_a_status_of_its_own():
    """A new class of jaxserve.errors needs a decision; what only the client side raises needs none."""
    ours = {kind for kind in tree() if kind.__module__ in ("jaxserve.errors", "serve.errors")}
    inherit = {errors.UnknownModelError}
    assert ours - set(serve.errors._CODES) == inherit
    assert len(ours) > 10
    assert generation.RemoteError not in ours


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequestError("top_p", 2, "in (0, 1]"), "INVALID_ARGUMENT"),
        (errors.ConstraintError("x"), "INVALID_ARGUMENT"),
        (errors.UnknownModelError("x"), "FAILED_PRECONDITION"),
        (errors.ModelNotFoundError("x"), "NOT_FOUND"),
        (errors.CheckpointError("x"), "FAILED_PRECONDITION"),
        (errors.OverloadedError("x"), "RESOURCE_EXHAUSTED"),
        (errors.DrainingError("x"), "UNAVAILABLE"),
        (errors.EngineDeadError("x"), "UNAVAILABLE"),
        (errors.IntegrityError("x"), "INTERNAL"),
        (serve_errors.DuplicateRequestError("x"), "ALREADY_EXISTS"),
        (serve_errors.NoTokenizerError("x"), "FAILED_PRECONDITION"),
        (ZeroDivisionError("x"), "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_code(error, code):
    assert code_of(error).name == code
    assert status_of(error).code == getattr(grpc.StatusCode, code).value[0]


def test_an_invalid_field_is_in_the_details():
    status = status_of(errors.InvalidRequestError("sampling.top_p", 2, "in (0, 1]", "Lower it."))
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert bad.field_violations[0].field == "sampling.top_p"
    assert bad.field_violations[0].description == status.message == "sampling.top_p must be in (0, 1], got 2. Lower it."


def test_retry_hints_are_jittered_around_what_was_asked():
    delays = set()
    for _ in range(50):
        hint = error_details_pb2.RetryInfo()
        assert status_of(errors.OverloadedError("x", retry_after_s=10.0)).details[0].Unpack(hint)
        delays.add(hint.retry_delay.ToTimedelta().total_seconds())
    assert min(delays) >= 8
    assert max(delays) <= 12
    assert len(delays) > 10


def test_an_internal_error_tells_its_id_and_nothing_else(caplog):
    status = status_of(RuntimeError("canary /etc/secret"))
    assert "canary" not in str(status)
    [error_id] = re.findall(r"error_id=([0-9a-f]{12})", status.message)
    assert error_id in caplog.text
    assert "canary" in caplog.text
    assert not status.details


def test_a_message_is_short_and_one_line():
    status = status_of(errors.OverloadedError("a\nb\x1b[31m\ud800" + "ü" * 5000))
    assert len(status.message) == serve_errors.MAX_MESSAGE_CHARS
    assert status.message.startswith("a�b�[31m�")
