import pytest
from starlette.exceptions import HTTPException

from jaxserve import errors
from serve import errors as serve_errors
from serve.http.errors import _STATUSES, HttpError, error_answer
from serve.http.strict_json import JsonError


def test_every_code_of_the_common_table_has_a_status():
    assert set(_STATUSES) == set(serve_errors._CODES.values())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequestError("top_p", 2, "in (0, 1]"), 400),
        (serve_errors.MalformedRequestError("x"), 400),
        (serve_errors.NoTokenizerError("x"), 400),
        (JsonError("x"), 400),
        (serve_errors.WrongModelError("x"), 404),
        (serve_errors.DuplicateRequestError("x"), 409),
        (HttpError(413, "x"), 413),
        (errors.OverloadedError("x"), 429),
        (serve_errors.ClientGoneError("x"), 499),
        (errors.IntegrityError("canary"), 500),
        (errors.JaxserveError("canary"), 500),
        (ZeroDivisionError("canary"), 500),
        (errors.DrainingError("x"), 503),
        (errors.EngineDeadError("x"), 503),
        (HTTPException(405, "x", {"Allow": "GET"}), 405),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_status_and_object(error, status):
    found, body, headers = error_answer(error)
    assert found == status
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "canary" not in str(body)
    assert (b"retry-after" in dict(headers)) == (status in (429, 503))


def test_what_cannot_be_shown_is_not_sent_back():
    _, body, _ = error_answer(errors.InvalidRequestError("a\x1b[31m\ud800", "\x00", "b\r\nc"))
    assert body["error"]["param"] == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"
    assert all(c.isprintable() for c in body["error"]["message"])
