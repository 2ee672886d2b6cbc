"""Whether there is room for one more request: a permit at once, or a refusal with a retry hint. Nobody waits here.

Owns the counts of permits and of their prompt tokens; lives on the event loop and needs no lock. Knows nothing of gRPC.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from jaxserve.errors import OverloadedError

MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0
_WEIGHT = 0.1
"""Of the newest request in the running mean of durations: about the last 20 count."""


class Permit:
    """Room for one request, for as long as the `with` block lasts."""

    __slots__ = ("_admission", "_started_s", "num_tokens")

    def __init__(self, admission: "Admission", started_s: float):
        self._admission = admission
        self._started_s = started_s
        self.num_tokens = 0

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._admission._release(self, self._started_s)

    def take_tokens(self, num_tokens: int) -> None:
        """Counts the request's prompt, once its length is known.

        Raises:
            OverloadedError: the prompts of all requests together would be too long.
        """
        self._admission._take_tokens(self, num_tokens)


class Admission:
    """Hands out permits.

    Args:
        max_requests: most permits at a time: those that run and those that wait [requests].
        max_tokens: most prompt tokens of all of them; a lone request may exceed it. None is no limit.
        setting: the flag that raises max_requests, for the message of a refusal.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int | None = None,
        *,
        setting: str = "--max-queued-requests",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._setting = setting
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._num_requests = 0
        self._num_tokens = 0
        self._mean_duration_s = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_requests(self) -> int:
        """Permits that are out."""
        return self._num_requests

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the permits that are out."""
        return self._num_tokens

    @property
    def retry_after_s(self) -> float:
        """When a permit should be free, by Little's law: mean duration over requests in flight [s]."""
        return min(max(self._mean_duration_s / max(self._num_requests, 1), MIN_RETRY_S), MAX_RETRY_S)

    def permit(self) -> Permit:
        """Returns a permit; use it in a `with` statement.

        Raises:
            OverloadedError: there are max_requests of them already.
        """
        if self._num_requests >= self._max_requests:
            raise OverloadedError(
                f"{self._num_requests} requests run or wait already, and no more are taken ({self._setting}).",
                self.retry_after_s,
            )
        self._num_requests += 1
        self._idle.clear()
        return Permit(self, self._clock())

    async def wait_idle(self) -> None:
        """Returns when no permit is out."""
        await self._idle.wait()

    def _take_tokens(self, permit: Permit, num_tokens: int) -> None:
        if self._max_tokens is not None and self._num_tokens and self._num_tokens + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"The prompts that run or wait have {self._num_tokens} tokens; {num_tokens} more would exceed "
                f"{self._max_tokens} (--max-queued-tokens).",
                self.retry_after_s,
            )
        permit.num_tokens += num_tokens
        self._num_tokens += num_tokens

    def _release(self, permit: Permit, started_s: float) -> None:
        self._num_requests -= 1
        self._num_tokens -= permit.num_tokens
        permit.num_tokens = 0
        self._mean_duration_s += _WEIGHT * (self._clock() - started_s - self._mean_duration_s)
        if not self._num_requests:
            self._idle.set()
