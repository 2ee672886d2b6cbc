"""The filters and the methods of str that a chat template may use, and what they pay in advance.

Those that can make much out of little (replace, join, indent, batch, …) are priced before they run; the others after,
because they make no more than a small multiple of what was paid for already.
"""

import json
from collections.abc import Callable, Iterable
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2.filters
from jinja2.exceptions import SecurityError

from jaxserve.tokenization.template_budget import Budget, current_budget, shallow_price

_MAX_SMALL = 1000  # widths, fill counts, sets of characters to strip, digits to read
_MAX_PRECISION = 32

# What a str can do that is of use in a template and makes no more than it is given; replace and join pay in advance.
STR_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower"
    " isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind"
    " rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
# Left out, because they format, pad or search without bound: center, filesizeformat, format, pprint, striptags, urlize,
# wordwrap, xmlattr; and random, because a prompt is a function of the request.
_KEPT = (
    "abs attr batch capitalize count d default dictsort e escape first float forceescape groupby indent int items join"
    " last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort"
    " string sum title trim truncate unique upper urlencode wordcount".split()
)


def paying_filters() -> dict[str, Callable]:
    """jinja2's filters as far as they are kept, and Hugging Face's `tojson`."""
    kept = {name: _paying(jinja2.filters.FILTERS[name], _PREPAID.get(name)) for name in _KEPT}
    return kept | {"tojson": tojson}


def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """`json.dumps` without HTML escapes, as Hugging Face has it; stops when the budget is spent."""
    _check_small("indent", indent)
    current_budget().spend_whole([x, separators])
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=True
    )
    parts = []
    for part in encoder.iterencode(x):
        current_budget().spend(len(part))
        parts.append(part)
    return "".join(parts)


def check_str_method(method: BuiltinMethodType, args: tuple, kwargs: dict) -> None:
    """Pays for a str's method where it makes or searches more than its text."""
    text, arguments = str(method.__self__), [*args, *kwargs.values()]
    name = method.__name__
    if name == "replace" and len(arguments) >= 2:
        _pay_replace(text, arguments[0], arguments[1])
    elif name == "join" and arguments:
        _pay_join(arguments[0], text)
    elif name in ("strip", "lstrip", "rstrip"):
        for argument in arguments:
            _check_small("characters to strip", argument)


def _paying(function: Callable, prepay: Callable | None) -> Callable:
    """The filter with its price; `wraps` keeps the marks by which jinja2 knows what to pass."""
    passes_context = hasattr(function, "jinja_pass_arg")

    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.spend(1)
        given = args[1:] if passes_context else args
        if prepay is not None:
            given = prepay(*given, **kwargs)
            args = (args[0], *given) if passes_context else given
            kwargs = {}
        elif given and isinstance(given[0], (list, tuple, dict)) and function in _PRINTING:
            budget.spend_whole(given[0])
        result = function(*args, **kwargs)
        budget.spend(shallow_price(result))
        return result

    return paying


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> tuple:
    s, old, new = str(_printable(s)), str(old), str(new)
    _pay_replace(s, old, new)
    return s, old, new, count


def _join(value: Iterable, d: str = "", attribute: Any = None) -> tuple:
    value = list(value)
    _pay_join(value, str(d))
    return value, d, attribute


def _indent(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> tuple:
    s = s if isinstance(s, str) else str(_printable(s))
    _check_small("width", width)
    each = len(width) if isinstance(width, str) else int(width)
    current_budget().spend(each * (s.count("\n") + 2))
    return s, width, first, blank


def _batch(value: Iterable, linecount: int, fill_with: Any = None) -> tuple:
    _check_small("linecount", linecount)
    if fill_with is not None:
        current_budget().spend(linecount * current_budget().spend_whole(fill_with))
    return value, linecount, fill_with


def _slice(value: Iterable, slices: int, fill_with: Any = None) -> tuple:
    return _batch(value, slices, fill_with)


def _sum(iterable: Iterable, attribute: Any = None, start: Any = 0) -> tuple:
    if not isinstance(start, (int, float)):
        raise SecurityError("sum adds numbers only")
    return iterable, attribute, start


def _round(value: Any, precision: int = 0, method: str = "common") -> tuple:
    if not isinstance(precision, int) or abs(precision) > _MAX_PRECISION:
        raise SecurityError(f"round takes a precision of at most {_MAX_PRECISION}")
    return value, precision, method


def _int(value: Any, default: Any = 0, base: int = 10) -> tuple:
    _check_small("number", value)
    return value, default, base


def _trim(value: Any, chars: str | None = None) -> tuple:
    _check_small("characters to trim", chars)
    return _printable(value), chars


_PREPAID = {
    "replace": _replace,
    "join": _join,
    "indent": _indent,
    "batch": _batch,
    "slice": _slice,
    "sum": _sum,
    "round": _round,
    "int": _int,
    "trim": _trim,
}
_PRINTING = {
    jinja2.filters.FILTERS[name]
    for name in "capitalize e forceescape lower safe string title truncate upper urlencode wordcount".split()
}


def _printable(value: Any) -> Any:
    """The value, paid for where printing it is more than handing it on."""
    if isinstance(value, (list, tuple, dict)):
        current_budget().spend_whole(value)
    return value


def _check_small(what: str, value: Any) -> None:
    size = len(value) if isinstance(value, str) else value
    if isinstance(size, int) and abs(size) > _MAX_SMALL:
        raise SecurityError(f"{what} of more than {_MAX_SMALL} is not allowed")


def _pay_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        current_budget().spend(len(text) + text.count(old) * len(new))


def _pay_join(parts: Any, separator: str) -> None:
    budget: Budget = current_budget()
    if isinstance(parts, (list, tuple, str, dict)):
        budget.spend(len(separator) * len(parts))
        budget.spend_whole(parts)
