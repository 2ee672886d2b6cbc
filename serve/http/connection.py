"""One connection: uvicorn's h11 protocol, with an end to what it would wait for without one.

    a head that does not come, or not to its end     closed after HEAD_TIMEOUT_S
    a client that takes nothing                      cut off after the write time-out, which frees its buffer and its request

h11 and not httptools: that one took a head of 100 MB, and requests with two Host headers (ADR 0012).
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0

GRACE_S = 1.0
"""After the write time-out, for the request to end by itself and say why in the log [s]."""


def bounded_protocol(write_timeout_s: float) -> type[H11Protocol]:
    """The class of a server's connections."""

    class BoundedH11(H11Protocol):
        _head_deadline: asyncio.TimerHandle | None = None
        _write_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_deadline = _cancelled(self._head_deadline)
            self._write_deadline = _cancelled(self._write_deadline)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_deadline = self.loop.call_later(write_timeout_s + GRACE_S, self.transport.abort)

        def resume_writing(self) -> None:
            self._write_deadline = _cancelled(self._write_deadline)
            super().resume_writing()

        def _watch_head(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._head_deadline = _cancelled(self._head_deadline)
            elif self._head_deadline is None:
                self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    return BoundedH11


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
