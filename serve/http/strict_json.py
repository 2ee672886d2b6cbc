"""JSON in and out, stricter than the standard library: one meaning for every text, and nothing in it that is no JSON.

Refused are duplicate keys, NaN and Infinity, numbers beyond a double, and what is nested too deeply. Knows nothing of HTTP.
"""

import json
import math
from typing import Any

from jaxserve.errors import JaxserveError

MAX_DEPTH = 64


class JsonError(JaxserveError):
    """A text that is no JSON object; says where."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that the bytes hold.

    Raises:
        JsonError: they hold none.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"The body is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"The body is not JSON: {error}.") from None
    except ValueError:  # int() refuses to read it
        raise JsonError("The body has a number with too many digits.") from None
    except RecursionError:
        raise JsonError(f"The body is nested more than {MAX_DEPTH} deep.") from None
    if not isinstance(value, dict):
        raise JsonError(f"The body must be a JSON object, got {type(value).__name__}.")
    _check_depth(value)
    return value


def dump(value: Any) -> bytes:
    """The value on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"The body has the key {twice!r} twice in one object; keep one of them.")
    return content


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"The body has {name}, which is no JSON; numbers must be finite.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise JsonError(f"The body has {text[:40]}, which is larger than any double; numbers must be finite.")
    return number


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
