"""What form a completion must have: `StructuredOutputsParams`, checked on its own.

Plain data, with vLLM's names, defaults and conditions. Whether a schema or a grammar can be compiled is found out by
`structured.compiler`, which needs a tokenizer.
"""

import json as json_text
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxserve.errors import InvalidRequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of which exactly one is given."""

_REPEATS = re.compile(r"\{\d*,?\d*\}")
_WHITE_SPACE = re.compile(r"(?:[ \t\n\r]|\\[tnr ]|[][(){}|?*+])*")

PREFIX = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a completion: exactly one of six kinds, and options for JSON.

    Attributes:
        json: a JSON schema, as a dict or as text; kept as text.
        regex: the whole completion matches it (the syntax of Rust's `regex`, which is Python's but for lookarounds and
            back-references).
        choice: the completion is one of these strings.
        grammar: a context-free grammar, in GBNF (`root ::= ...`, llama.cpp's EBNF) or in Lark (`start: ...`).
        json_object: any JSON object.
        structural_tag: free text in which each `begin` is followed by JSON of a schema and an `end`, as JSON text:
            `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`.
        disable_any_whitespace: JSON without white space between its tokens.
        disable_additional_properties: objects with `properties` or `patternProperties` have no others, unless the schema
            itself says something about it.
        whitespace_pattern: a regular expression of the white space that JSON may have between its tokens.

    Raises:
        InvalidRequestError: names the field, what was given and what is allowed.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)  # what is put is plain and hashable, whatever was given
        if self.json_object is False:  # asks for nothing
            put("json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            shown = " and ".join(given) or "none"
            raise InvalidRequestError(PREFIX, shown, f"exactly one of {', '.join(KINDS)}")
        if self.json is not None and not isinstance(self.json, str):
            put("json", _schema_text(self.json))
        if self.choice is not None:
            put("choice", _choices(self.choice))
        for name in ("json", "regex", "grammar", "structural_tag"):
            _check_text(name, getattr(self, name))
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern)
            if not _WHITE_SPACE.fullmatch(_REPEATS.sub("", self.whitespace_pattern)):
                raise InvalidRequestError(
                    f"{PREFIX}.whitespace_pattern",
                    self.whitespace_pattern,
                    "an expression of JSON's white space: space, \\t, \\n, \\r, in classes, groups and repetitions",
                    "In place of \\s write [ \\t\\n\\r].",
                )
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{PREFIX}.{name}", getattr(self, name), "True or False")
        if self.json_object is not None and self.json_object is not True:
            raise InvalidRequestError(f"{PREFIX}.json_object", self.json_object, "True, False or None")

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)


def _schema_text(schema: Any) -> str:
    allowed = "a JSON schema: a dict, or its text"
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{PREFIX}.json", schema, allowed)
    try:
        return json_text.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{PREFIX}.json", schema, f"{allowed} ({error})") from None


def _choices(choice: Any) -> tuple[str, ...]:
    allowed = "a list of at least one string"
    if isinstance(choice, (str, bytes, Mapping)) or not isinstance(choice, Iterable):
        raise InvalidRequestError(f"{PREFIX}.choice", choice, allowed)
    strings = tuple(choice)
    if not strings or any(not isinstance(text, str) for text in strings):
        raise InvalidRequestError(f"{PREFIX}.choice", choice, allowed)
    for text in strings:
        _check_unicode("choice", text)
    return strings


def _check_text(name: str, text: Any) -> None:
    if text is None:
        return
    may_be_blank = name in ("regex", "whitespace_pattern")
    if not isinstance(text, str) or not (text if may_be_blank else text.strip()):
        raise InvalidRequestError(f"{PREFIX}.{name}", text, "a string that is not empty")
    _check_unicode(name, text)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{PREFIX}.{name}", text, "text that can be written as UTF-8", f"Remove the lone surrogate at {error.start}."
        ) from None
