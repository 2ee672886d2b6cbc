"""One log line a call: who, how it ended, how much and how long. Never what was said: no prompts, no texts.

Knows names and formats; the numbers are the callers'.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxserve.outputs import TokenDelta
from serve.errors import ClientGoneError, code_of
from serve.metrics import ServiceMetrics

log = logging.getLogger("serve.requests")


@dataclass(slots=True)
class CallRecord:
    """What will be logged of a call, filled in as it becomes known; a call with several prompts has their sums.

    Attributes:
        x_request_id: what the client calls it, on a door where that need not be unique.
        arrived_s: when the call came in [s, time.monotonic].
        queue_s: the longest time that one of its prompts waited in the engine [s].
        first_token_s: from arrival to the first deltas handed to the door [s].
    """

    request_id: str = "-"
    x_request_id: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    arrived_s: float = 0.0
    queue_s: float | None = None
    first_token_s: float | None = None

    def add(self, deltas: Sequence[TokenDelta]) -> None:
        """Counts what is about to be written."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.arrived_s
        self.num_completion_tokens += sum(len(delta.token_ids) for delta in deltas)
        last = deltas[-1]
        if last.finish_reason is None:
            return
        if last.finish_reason not in self.finish_reasons:
            self.finish_reasons.append(last.finish_reason)
        self.num_cached_tokens += last.num_cached_tokens
        if last.timings is not None and last.timings.scheduled is not None and last.timings.arrived is not None:
            self.queue_s = max(self.queue_s or 0.0, last.timings.scheduled - last.timings.arrived)

    def line(self, endpoint: str, status: str) -> str:
        fields = {
            "request_id": self.request_id,
            "x_request_id": self.x_request_id or "-",
            "endpoint": endpoint,
            "status": status,
            "finish_reason": ",".join(self.finish_reasons) or "-",
            "prompt_tokens": str(self.num_prompt_tokens),
            "cached_tokens": str(self.num_cached_tokens),
            "completion_tokens": str(self.num_completion_tokens),
            "queue_ms": _milliseconds(self.queue_s),
            "first_token_ms": _milliseconds(self.first_token_s),
            "total_ms": _milliseconds(time.monotonic() - self.arrived_s),
        }
        return " ".join(f"{name}={_escaped(value)}" for name, value in fields.items())


@contextlib.contextmanager
def call_record(
    endpoint: str, metrics: ServiceMetrics, ok: str = "OK", status_of: Callable[[Exception], str] = lambda e: code_of(e).name
) -> Iterator[CallRecord]:
    """Logs and counts the call when the block ends, with the status that the block's exception means.

    Args:
        endpoint: a name out of a closed set.
        ok: how this door calls success.
        status_of: how it calls an error.
    """
    record = CallRecord(arrived_s=time.monotonic())
    status = ok
    try:
        yield record
    except asyncio.CancelledError:
        status = status_of(ClientGoneError())
        raise
    except Exception as error:
        status = status_of(error)
        raise
    finally:
        log.info("%s", record.line(endpoint, status))
        metrics.observe_call(endpoint, status)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _escaped(value: str) -> str:
    """The value as one word of printable ASCII: nothing in it can begin a line, a field or a terminal's command."""
    return re.sub(r"[^!-~]|[\\=]", lambda match: f"\\u{ord(match[0]):04x}", value[:128])
