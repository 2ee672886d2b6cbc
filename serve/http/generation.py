"""What both endpoints that generate do with a validated call: open its requests, stream or collect, answer errors, and notice
that the client has left.

Pure ASGI, because the answer's head waits for the first token: until then an error still has a status of its own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from jaxserve.outputs import TokenDelta
from serve.errors import ClientGoneError
from serve.http import sse
from serve.http.calls import Call
from serve.http.errors import error_answer, http_status
from serve.http.guard import read_body, send_error, send_json
from serve.http.strict_json import dump, parse_object
from serve.observability import CallRecord, call_record
from serve.running import RunningRequest, RunningRequests

Result = TypeVar("Result")

ReadCall = Callable[[dict[str, Any], str, RunningRequests], Call]

SMALL_BODY_BYTES = 64 * 2**10
"""Parsed at once; a larger one takes milliseconds, and does so in a thread [bytes]."""


class GenerationEndpoint:
    """An ASGI application for one route.

    Args:
        served: the running requests; raises DrainingError while there are none yet.
        read_call: the dialect's own part.
    """

    def __init__(self, endpoint: str, id_prefix: str, served: Callable[[], RunningRequests], read_call: ReadCall):
        self._endpoint = endpoint
        self._id_prefix = id_prefix
        self._served = served
        self._read_call = read_call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        try:
            running = self._served()
            with call_record(self._endpoint, running.metrics, "200", lambda error: str(http_status(error))) as record:
                await self._answer(scope, receive, running, reply, record)
        except ClientGoneError:
            return
        except Exception as error:
            await reply.fail(error)

    async def _answer(
        self, scope: Scope, receive: Receive, running: RunningRequests, reply: "_Reply", record: CallRecord
    ) -> None:
        state = scope["state"]
        record.request_id = self._id_prefix + state["call_id"]
        record.x_request_id = state["request_id"] if state["has_sent_id"] else ""
        running.check_open()
        data = await read_body(scope, receive)
        body = await asyncio.to_thread(parse_object, data) if len(data) > SMALL_BODY_BYTES else parse_object(data)
        call = self._read_call(body, record.request_id, running)
        await _unless_disconnected(receive, self._run(call, running, reply, record))

    async def _run(self, call: Call, running: RunningRequests, reply: "_Reply", record: CallRecord) -> None:
        async with contextlib.AsyncExitStack() as stack:
            admitted = []
            for index, (request_id, make) in enumerate(zip(call.request_ids(), call.makers, strict=True)):
                opened = running.open(request_id, partial(make, request_id), record, shares_prompt=call.shares_prompt(index))
                admitted.append(await stack.enter_async_context(opened))
            call.usage.num_prompt_tokens = record.num_prompt_tokens
            works = [self._follow(call, index, one, reply) for index, one in enumerate(admitted)]
            choices = await _all(works)
            if call.stream.is_stream:
                last = [call.chunk([], is_last=True)] if call.stream.includes_usage else []
                writing = reply.end_stream(sse.events(last))
            else:
                writing = reply.answer(dump(call.answer([choice for choice in choices if choice is not None])))
            await admitted[0].write(writing)

    async def _follow(self, call: Call, index: int, admitted: RunningRequest, reply: "_Reply") -> dict[str, Any] | None:
        """Streams one request's chunks, or returns its choice."""
        choice = call.new_choice(index, admitted.request)
        collected: list[TokenDelta] = []
        async with contextlib.aclosing(admitted.batches()) as batches:
            async for deltas in batches:
                call.usage.add(deltas, is_first=not call.shares_prompt(index))
                if not call.stream.is_stream:
                    collected.extend(deltas)
                elif chunks := choice.chunks(deltas):
                    await admitted.write(reply.events(sse.events([call.chunk([chunk]) for chunk in chunks])))
        return choice.whole(collected) if collected else None


class _Reply:
    """The answer's way out; knows whether its head is gone."""

    def __init__(self, send: Send):
        self._send = send
        self._is_streaming = False
        self._lock = asyncio.Lock()  # the requests of a call write to one stream

    async def events(self, data: bytes) -> None:
        async with self._lock:
            if not self._is_streaming:
                self._is_streaming = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data + sse.DONE})

    async def answer(self, data: bytes) -> None:
        await send_json(self._send, 200, data)

    async def fail(self, error: Exception) -> None:
        """An error of its own while that is possible; else an event, and an end without [DONE]."""
        if self._is_streaming:
            _, body, _ = error_answer(error)
            await self._send({"type": "http.response.body", "body": sse.events([body])})
        else:
            await send_error(self._send, error)


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Awaits the work; cancels it and raises ClientGoneError when the client goes away."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    async with _cancelling(working, gone):
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("The client has closed the connection.")
        working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    async with _cancelling(*tasks):
        return await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def _cancelling(*tasks: "asyncio.Future[Any]") -> AsyncIterator[None]:
    """Leaves no task behind."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
