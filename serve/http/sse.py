"""Server-sent events as OpenAI's clients read them: `data:` and one line of JSON an event, `[DONE]` behind the last."""

from collections.abc import Iterable, Mapping
from typing import Any

from serve.http.strict_json import dump

DONE = b"data: [DONE]\n\n"

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def events(objects: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join([b"data: " + dump(one) + b"\n\n" for one in objects])
