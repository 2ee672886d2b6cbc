"""Checks a conversation and turns it into the plain data that a template may see.

Only str, int, float, bool, None, list and dict get through, copied: a template has no object of ours in its hands. User
text that looks like a special token is marked on the way (see `piece_tokenizer`), so that it stays text when the
rendered prompt is encoded.

Knows nothing of templates.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenization.piece_tokenizer import GUARD, alternation

_MAX_DEPTH = 64
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TextMarker:
    """Marks what looks like one of the special tokens, or could become one beside its neighbour."""

    def __init__(self, special_tokens: Iterable[str]):
        """Nothing is marked where there are none."""
        # A token of one character cannot be broken up; no known model has one.
        breakable = {token: 0 for token in special_tokens if len(token) > 1}
        self._pattern = alternation(breakable)
        self._starts = frozenset(token[:n] for token in breakable for n in range(1, len(token)))
        self._max_len = max(map(len, self._starts), default=0)

    def mark(self, text: str) -> str:
        """The text, with a guard in each special token and behind an unfinished one at its end."""
        if self._pattern is None:
            return text
        text = self._pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
        if any(text[-n:] in self._starts for n in range(1, min(self._max_len, len(text)) + 1)):
            text += GUARD
        return text


def plain_messages(messages: Any, marker: TextMarker) -> list[dict[str, Any]]:
    """The checked copy of a conversation.

    Raises:
        InvalidRequestError: not a list of messages with a role and text.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _invalid(messages, "a list of at least one {'role': …, 'content': …}")
    return [_message(message, f"messages[{n}]", marker) for n, message in enumerate(messages)]


def plain_tools(tools: Any, marker: TextMarker) -> list[dict[str, Any]] | None:
    """The checked copy of the tools' JSON schemas.

    Raises:
        InvalidRequestError: not a list of objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequestError("tools", tools, "a list of JSON objects", "Pass each tool's JSON schema, not a function.")
    return [_plain(tool, f"tools[{n}]", marker, 0) for n, tool in enumerate(tools)]


def text_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with each list of parts as one text, a line each: for templates that know no parts."""
    return [
        message | {"content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _message(message: Any, where: str, marker: TextMarker) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _invalid(message, f"a list of objects (see {where})")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _invalid(role, f"messages with a role (see {where}.role)", "Roles are system, user, assistant and tool.")
    content = message.get("content")
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", *_REASONING_FIELDS)):
            raise _invalid(content, f"messages with a content (see {where}.content)")
    elif not isinstance(content, str):
        _check_parts(content, where)
    checked = _plain(message, where, marker, 0) | {"role": _plain(role, f"{where}.role", TextMarker(()), 0)}
    reasoning = next((checked[key] for key in _REASONING_FIELDS if checked.get(key) is not None), None)
    # transformers gives a template the reasoning under its standard name, whatever it was called
    return checked if reasoning is None else {"thinking": reasoning, **checked, "reasoning_content": reasoning}


def _check_parts(parts: Any, where: str) -> None:
    if not isinstance(parts, (list, tuple)):
        raise _invalid(parts, f"messages whose content is text or a list of text parts (see {where}.content)")
    for n, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise _invalid(
                part,
                f"messages whose parts are {{'type': 'text', 'text': …}} (see {where}.content[{n}])",
                "Images and audio are not supported.",
            )


def _plain(value: Any, where: str, marker: TextMarker, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise _invalid(type(value).__name__, f"nested at most {_MAX_DEPTH} deep (see {where})")
    if isinstance(value, str):
        return marker.mark(_checked_text(str.__str__(value), where))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _invalid(value, f"finite numbers (see {where})")
        return float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _invalid(list(value), f"objects with str keys (see {where})")
        return {_plain(k, where, marker, depth): _plain(v, f"{where}.{k}", marker, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{n}]", marker, depth + 1) for n, item in enumerate(value)]
    raise _invalid(type(value).__name__, f"JSON data (see {where})")


def _checked_text(text: str, where: str) -> str:
    if "\x00" in text or GUARD in text:
        raise _invalid(text[:40], f"text without NUL and U+FDD0 (see {where})", "Remove these characters.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 8) : error.start + 8]
        raise _invalid(shown, f"text that can be written as UTF-8 (see {where})", "Remove lone surrogates.") from None
    return text


def _invalid(value: Any, allowed: str, remedy: str = "") -> InvalidRequestError:
    return InvalidRequestError("messages", value, allowed, remedy)
