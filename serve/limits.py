"""Limits of a request that are the same on every front door, and do not depend on the model."""

import re
from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_stops(stop: Sequence[str], stop_token_ids: Sequence[int]) -> None:
    """Raises InvalidRequestError where there are too many of them, or too long ones."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for text in stop:
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                "stop", f"a string of {len(text)} characters", f"strings of at most {MAX_STOP_CHARS} characters"
            )
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError("stop_token_ids", f"{len(stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")


def check_bad_words(bad_words: Sequence[str]) -> None:
    """Raises InvalidRequestError where there are too many of them, or too long ones."""
    if len(bad_words) > MAX_BAD_WORDS:
        raise InvalidRequestError("bad_words", f"{len(bad_words)} strings", f"at most {MAX_BAD_WORDS} strings")
    for text in bad_words:
        if len(text) > MAX_BAD_WORD_CHARS:
            raise InvalidRequestError(
                "bad_words", f"a string of {len(text)} characters", f"strings of at most {MAX_BAD_WORD_CHARS} characters"
            )


def check_request_id(name: str, request_id: str) -> str:
    """The id; InvalidRequestError where it would not fit into a log line or a header."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(name, request_id, "1 to 128 characters out of A-Z a-z 0-9 . _ : -")
    return request_id
