"""One log line a request: who, how it ended, how much and how long. Never what was said: no prompts, no texts.

Knows names and formats; the numbers are the callers'.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxserve.outputs import TokenDelta
from serve.errors import code_of

log = logging.getLogger("serve.requests")


@dataclass(slots=True)
class RequestLine:
    """What will be logged; filled in as it becomes known.

    Attributes:
        first_token_s: from the call's arrival to the first deltas handed to its door [s]; None before it.
    """

    request_id: str = "-"
    finish_reason: str = "-"
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    arrived_s: float = 0.0
    first_token_s: float | None = None

    def add(self, deltas: Sequence[TokenDelta]) -> None:
        """Counts what is about to be written."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.arrived_s
        self.num_completion_tokens += sum(len(delta.token_ids) for delta in deltas)
        last = deltas[-1]
        if last.finish_reason is not None:
            self.finish_reason = last.finish_reason
            self.num_cached_tokens += last.num_cached_tokens


@contextlib.contextmanager
def request_line(method: str) -> Iterator[RequestLine]:
    """Logs the line when the block ends, with the status that the block's exception means."""
    line = RequestLine(arrived_s=time.monotonic())
    status = "OK"
    try:
        yield line
    except asyncio.CancelledError:
        status = "CANCELLED"
        raise
    except Exception as error:
        status = code_of(error).name
        raise
    finally:
        first_ms = "-" if line.first_token_s is None else f"{1e3 * line.first_token_s:.1f}"
        log.info(
            "%s request_id=%s status=%s finish_reason=%s prompt_tokens=%d cached_tokens=%d completion_tokens=%d "
            "first_token_ms=%s total_ms=%.1f",
            method,
            line.request_id,
            status,
            line.finish_reason,
            line.num_prompt_tokens,
            line.num_cached_tokens,
            line.num_completion_tokens,
            first_ms,
            1e3 * (time.monotonic() - line.arrived_s),
        )
