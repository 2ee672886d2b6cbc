"""The requests of every front door, from permit to last delta: who holds which id, who may still come, and how all of them end.

Knows no protocol. A door validates what it was sent, opens a request here, and writes what its batches bring. Lives on one event
loop; tokenization goes to threads, because a long text takes milliseconds.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from jaxserve.async_engine import AsyncEngine
from jaxserve.config import ResolvedConfig
from jaxserve.engine_client import EngineStats
from jaxserve.errors import DrainingError, InvalidRequestError, OverloadedError
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request
from jaxserve.request_factory import RequestFactory
from jaxserve.tokenization.tokenizer import Tokenizer
from serve.admission import Admission
from serve.errors import DuplicateRequestError, NoTokenizerError
from serve.metrics import ServiceMetrics
from serve.observability import CallRecord

Result = TypeVar("Result")

MAX_TOKENIZING = 64
"""Most calls of `off_loop` at a time: they share their threads with the requests [calls]."""


class _Holder:
    """Who holds a request id."""

    __slots__ = ("is_aborted", "is_submitted")

    def __init__(self) -> None:
        self.is_submitted = False
        self.is_aborted = False


class RunningRequests:
    """Owns the set of running requests.

    Args:
        metrics: told how each request goes.
        write_timeout_s: how long a client may leave a message unread before its request is ended [s].
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: RequestFactory,
        tokenizer: Tokenizer | None,
        config: ResolvedConfig,
        admission: Admission,
        metrics: ServiceMetrics,
        *,
        write_timeout_s: float = 30.0,
    ):
        self.requests = requests
        self.config = config
        self.metrics = metrics
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._write_timeout_s = write_timeout_s
        self._tokenizing = Admission(MAX_TOKENIZING, setting="a fixed limit")
        self._holders: dict[str, _Holder] = {}
        self._is_draining = False
        self._is_stopping = False

    # --- for the lifecycle ------------------------------------------------------------------------------------------

    def refuse_new(self) -> None:
        """From now on `check_open` and `open` raise DrainingError; running requests go on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        await self._admission.wait_idle()

    def stop(self) -> int:
        """Ends the running requests with DrainingError; returns how many they are."""
        self._is_draining = self._is_stopping = True
        return len(self.abort(list(self._holders)))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # --- for the doors ----------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises DrainingError where no new requests are taken, so that a door says so before it validates."""
        if self._is_draining:
            raise DrainingError("The server is shutting down and takes no new requests.")

    def need_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            NoTokenizerError: it has none.
        """
        if self._tokenizer is None:
            raise NoTokenizerError("The served model has no tokenizer: send token_ids, and read token_ids.")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @contextlib.asynccontextmanager
    async def open(
        self, request_id: str, make: Callable[[], Request], record: CallRecord, *, shares_prompt: bool = False
    ) -> AsyncIterator["RunningRequest"]:
        """Admits a request; its permit and its id are held for as long as the `async with` block lasts.

        Args:
            make: returns the request, of this very id; runs in a thread.
            record: gets what becomes known.
            shares_prompt: whether its prompt was counted with another request of the call: one of its n completions.

        Raises:
            DrainingError, OverloadedError: there is no room for it.
            DuplicateRequestError: the id is in use.
            InvalidRequestError: what make raised.
        """
        self.check_open()
        with self._admission.permit() as permit, self._holding(request_id) as holder:
            request = await asyncio.to_thread(make)
            if not shares_prompt:
                num_tokens = len(request.prompt_token_ids)
                record.num_prompt_tokens += num_tokens
                permit.take_tokens(num_tokens)
            yield RunningRequest(self, request, holder, record)

    def abort(self, request_ids: Sequence[str]) -> list[str]:
        """Ends requests: each gets a last delta with finish_reason "abort"; returns those of the ids that are running."""
        known = [request_id for request_id in request_ids if request_id in self._holders]
        for request_id in known:
            self._holders[request_id].is_aborted = True
        self._engine.abort([request_id for request_id in known if self._holders[request_id].is_submitted])
        return known

    async def off_loop(self, work: Callable[[], Result]) -> Result:
        """What work returns, from a thread; for what is no request and yet takes a while.

        Raises:
            OverloadedError: too many of them wait already.
        """
        with self._tokenizing.permit():
            return await asyncio.to_thread(work)

    @contextlib.contextmanager
    def _holding(self, request_id: str) -> Iterator[_Holder]:
        if request_id in self._holders:
            raise DuplicateRequestError(f"request_id {request_id!r} belongs to a request that is still running.")
        holder = self._holders[request_id] = _Holder()
        try:
            yield holder
        finally:
            del self._holders[request_id]


class RunningRequest:
    """One admitted request; made by `RunningRequests.open`."""

    def __init__(self, running: RunningRequests, request: Request, holder: _Holder, record: CallRecord):
        self.request = request
        self._running = running
        self._holder = holder
        self._record = record
        self._made_s: float | None = None  # its newest token

    async def batches(self) -> AsyncGenerator[list[TokenDelta], None]:
        """Submits the request and yields its deltas up to the last one, all that are there at once; see `AsyncEngine.stream`.

        Closing the iterator early aborts the request: wrap it in `contextlib.aclosing`.

        Raises:
            DrainingError: the server has shut down before it was finished.
            DuplicateRequestError, OverloadedError, EngineDeadError: it cannot be served, or not to its end.
        """
        if self._holder.is_aborted:  # while it was tokenized
            deltas = [self._checked(self._aborted())]
            self._record.add(deltas)
            yield deltas
            return
        self._holder.is_submitted = True
        end: str | None = "abort"  # of a reader that leaves
        timings = None
        try:
            async with contextlib.aclosing(self._running._engine.stream_batches(self.request)) as batches:
                async for deltas in batches:
                    self._measure(deltas)
                    self._record.add(deltas)
                    last = deltas[-1]
                    if last.finish_reason is not None:
                        end, timings = last.finish_reason, last.timings
                    self._checked(last)
                    yield deltas
        except InvalidRequestError as error:
            end = None  # the engine did not take it
            if error.parameter != "request_id":
                raise
            raise DuplicateRequestError(
                f"request_id {self.request.request_id!r} belongs to a request that is being aborted."
            ) from None
        except (OverloadedError, DrainingError):  # aborted
            raise
        except Exception:
            end = "error"
            raise
        finally:
            if end is not None:
                self._running.metrics.observe_end(end, self._record.arrived_s, timings)

    async def write(self, writing: Awaitable[None]) -> None:
        """Awaits a door's write to its client.

        Raises:
            OverloadedError: the client does not read; leaving `batches` then aborts the request.
        """
        timeout_s = self._running._write_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await writing
        except TimeoutError:
            raise OverloadedError(
                f"{self.request.request_id} was aborted: its client has read nothing for {timeout_s:g} s."
            ) from None

    def _measure(self, deltas: Sequence[TokenDelta]) -> None:
        metrics = self._running.metrics
        for made_s in (delta.made_s for delta in deltas if delta.made_s is not None):
            if self._made_s is None:
                metrics.observe_first_token(made_s - self._record.arrived_s)
            else:
                metrics.observe_inter_token(made_s - self._made_s)
            self._made_s = made_s

    def _aborted(self) -> TokenDelta:
        request = self.request
        return TokenDelta(request.request_id, "", [], finish_reason="abort", num_prompt_tokens=len(request.prompt_token_ids))

    def _checked(self, delta: TokenDelta) -> TokenDelta:
        if delta.finish_reason == "abort" and self._running._is_stopping:
            raise DrainingError("The server has shut down before the completion was finished.")
        return delta
