"""The engine for asyncio: one async iterator a request.

Owns the mapping from request id to what its reader has not read yet, on one event loop; the engine thread reaches it by one
`call_soon_threadsafe` a step (ADR 0002).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from jaxserve.engine_client import EngineClient, EngineStats
from jaxserve.errors import InvalidRequestError, OverloadedError
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request


class _Pending:
    """What one request's reader has not read yet.

    It stays registered under the request's id until the engine has delivered its last delta, also when nobody reads any
    more: an id is free again only when the engine is done with it. Otherwise the last delta of an aborted request would end
    the next request of that id.
    """

    __slots__ = ("deltas", "has_overflowed", "has_reader", "is_complete", "is_ready", "num_tokens")

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.num_tokens = 0
        self.is_ready = asyncio.Event()
        self.has_reader = True
        self.is_complete = False
        self.has_overflowed = False

    def take(self) -> list[TokenDelta]:
        deltas, self.deltas, self.num_tokens = self.deltas, [], 0
        self.is_ready.clear()
        return deltas


class AsyncEngine:
    """Streams requests on the running event loop; made and used on that loop alone.

    Args:
        max_pending_tokens: most tokens kept for a reader that is slower than the engine; one more, and its request is
            aborted and its reader gets OverloadedError. None keeps them all.
    """

    def __init__(self, client: EngineClient, *, max_pending_tokens: int | None = None):
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._max_pending_tokens = max_pending_tokens
        self._pending: dict[str, _Pending] = {}

    def _listen(self, deltas: Sequence[TokenDelta]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed already: nobody is listening any more
            self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            pending = self._pending.get(delta.request_id)
            if pending is None:
                continue
            if delta.finish_reason is not None:
                pending.is_complete = True
                del self._pending[delta.request_id]
            if not pending.has_reader or pending.has_overflowed:
                continue
            pending.deltas.append(delta)
            pending.num_tokens += len(delta.token_ids)
            pending.is_ready.set()
            limit = self._max_pending_tokens
            if limit is not None and pending.num_tokens > limit and not pending.is_complete:
                pending.has_overflowed = True
                pending.deltas = []
                self._client.abort([delta.request_id])

    async def stream(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """Yields the request's deltas up to the last one; deltas that piled up meanwhile come one by one.

        Closing the iterator early, or cancelling the task that reads it, aborts the request. A reader that may stop
        between two deltas wraps it in `contextlib.aclosing`.

        Raises:
            InvalidRequestError: a request of the same id is running.
            OverloadedError: the reader is too slow, see max_pending_tokens.
            DrainingError, EngineDeadError: the engine takes nothing.
        """
        async with contextlib.aclosing(self.stream_batches(request)) as batches:
            async for batch in batches:
                for delta in batch:
                    yield delta

    async def stream_batches(self, request: Request) -> AsyncGenerator[list[TokenDelta], None]:
        """Like `stream`, but yields all deltas that are there at once: one list, at least one delta long."""
        if request.request_id in self._pending:
            raise InvalidRequestError("request_id", request.request_id, "unused by any running request")
        pending = self._pending[request.request_id] = _Pending()
        try:
            self._client.submit(request, self._listen)
        except BaseException:
            del self._pending[request.request_id]
            raise
        try:
            while True:
                await pending.is_ready.wait()
                if pending.has_overflowed:
                    raise OverloadedError(
                        f"{request.request_id} was aborted: its reader left more than {self._max_pending_tokens} tokens "
                        "unread. Read faster, or ask for fewer tokens."
                    )
                batch = pending.take()
                last = batch[-1]
                if last.error is not None:
                    if batch[:-1]:
                        yield batch[:-1]
                    raise last.error
                yield batch
                if last.finish_reason is not None:
                    return
        finally:
            pending.has_reader = False
            pending.deltas = []
            if not pending.is_complete and not pending.has_overflowed:
                self._client.abort([request.request_id])

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests: their iterators get a last delta with finish_reason "abort"."""
        self._client.abort(request_ids)

    def stats(self) -> EngineStats:
        return self._client.stats()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, waits for the running ones; returns whether all were done in time."""
        return await asyncio.to_thread(self._client.drain, timeout_s)
