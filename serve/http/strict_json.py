"""JSON in and out, stricter than the standard library: one meaning for every text, and nothing in it that is no JSON.

Refused are duplicate keys, NaN and Infinity, numbers beyond a double, and what is nested too deeply. Knows nothing of HTTP.
"""

import json
import math
from typing import Any

from jaxserve.errors import JaxserveError

MAX_DEPTH = 64


class JsonError(JaxserveError):
    """A text that is no JSON object; says where.

    Attributes:
        field: the key at fault, where that is what is known.
    """

    def __init__(self, message: str, field: str | None = None):
        self.field = field
        super().__init__(message)


class _NotFinite:
    """Stands for a number that JSON or a double has not, until its key is known."""

    __slots__ = ("why",)

    def __init__(self, why: str):
        self.why = why

    def error(self, field: str | None) -> JsonError:
        where = "The body" if field is None else field
        return JsonError(f"{where} has {self.why}; numbers must be finite.", field)


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that the bytes hold.

    Raises:
        JsonError: they hold none.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
    except UnicodeDecodeError as error:
        raise JsonError(f"The body is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"The body is not JSON: {error}.") from None
    except ValueError:  # int() refuses to read it
        raise JsonError("The body has a number with too many digits.") from None
    except RecursionError:
        raise JsonError(f"The body is nested more than {MAX_DEPTH} deep.") from None
    if isinstance(value, _NotFinite):
        raise value.error(None)
    if not isinstance(value, dict):
        raise JsonError(f"The body must be a JSON object, got {type(value).__name__}.")
    _check_depth(value)
    return value


def dump(value: Any) -> bytes:
    """The value on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    for key, value in pairs:
        _check_finite(key, value)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"The body has the key {twice!r} twice in one object; keep one of them.", twice)
    return content


def _check_finite(key: str, value: Any) -> None:
    """Objects have been checked when they were made, the lists in them have not."""
    if isinstance(value, _NotFinite):
        raise value.error(key)
    if isinstance(value, list):
        for member in value:
            if isinstance(member, (_NotFinite, list)):
                _check_finite(key, member)


def _constant(name: str) -> _NotFinite:
    return _NotFinite(f"{name}, which is no JSON")


def _number(text: str) -> float | _NotFinite:
    number = float(text)
    return number if math.isfinite(number) else _NotFinite(f"{text[:40]}, which is larger than any double")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise JsonError(f"The body is nested more than {MAX_DEPTH} deep.")
