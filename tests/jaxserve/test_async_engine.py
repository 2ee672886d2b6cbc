"""The asyncio engine: one iterator a request, on one loop, over a client that a test plays by hand or over the engine thread."""

import asyncio
import contextlib
import threading

import pytest

from jaxserve.async_engine import AsyncEngine
from jaxserve.engine import Engine
from jaxserve.engine_client import EngineStats
from jaxserve.engine_thread import EngineThread
from jaxserve.errors import DrainingError, EngineDeadError, InvalidRequestError, OverloadedError
from jaxserve.outputs import TokenDelta
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, expected, toy_config, toy_request
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer

TIMEOUT_S = 20
PROMPT = tuple(range(40, 80))


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(TIMEOUT_S):
            return await coroutine

    return asyncio.run(bounded())


class Client:
    """An `EngineClient` whose deltas the test makes."""

    def __init__(self):
        self.listeners, self.aborted = {}, []
        self.error = None

    def submit(self, request, listener):
        if self.error is not None:
            raise self.error
        self.listeners[request.request_id] = listener

    def abort(self, request_ids):
        self.aborted += request_ids

    def stats(self):
        return EngineStats(num_running=len(self.listeners))

    def drain(self, timeout_s=None):
        return timeout_s == 1.5

    def close(self):
        pass

    def say(self, request_id, tokens=(), **end):
        """Calls the listener from another thread, as the engine does."""
        delta = TokenDelta(request_id, "".join(map(chr, tokens)), list(tokens), **end)
        teller = threading.Thread(target=self.listeners[request_id], args=([delta],), daemon=True)
        teller.start()
        teller.join(TIMEOUT_S)


async def settle():
    """Lets everything that is ready on the loop run; what another thread posted before is ready."""
    for _ in range(5):
        await asyncio.sleep(0)


async def started(engine, request):
    """Returns the request's iterator, submitted, and the task that waits for its first delta."""
    stream = engine.stream(request)
    first = asyncio.ensure_future(anext(stream))
    await settle()
    return stream, first


# --- streams --------------------------------------------------------------------------------------------------------------


def test_many_streams_over_the_engine_thread():
    async def main():
        config = toy_config()
        thread = EngineThread(Engine(Scheduler(config), FakeRunner(config), AsciiTokenizer()))
        engine = AsyncEngine(thread)

        async def collect(request):
            deltas = [d async for d in engine.stream(request)]
            assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert {d.request_id for d in deltas} == {request.request_id}
            return [t for d in deltas for t in d.token_ids], deltas[-1].finish_reason

        requests = [toy_request(str(i), PROMPT[i : 2 * i + 3], max_tokens=3 + i) for i in range(12)]
        answers = await asyncio.gather(*map(collect, requests))
        assert answers == [expected(r, config) for r in requests]
        assert engine.stats().num_generated_tokens == sum(len(tokens) for tokens, _ in answers)
        assert await engine.drain(TIMEOUT_S)
        with pytest.raises(DrainingError):
            await anext(engine.stream(toy_request("late")))
        thread.close()

    run(main())


def test_a_stream_yields_one_delta_at_a_time_and_a_batch_all_that_are_there():
    async def main():
        client = Client()
        engine = AsyncEngine(client)
        stream, first = await started(engine, toy_request("one"))
        batches = engine.stream_batches(toy_request("all"))
        batch = asyncio.ensure_future(anext(batches))
        await settle()
        for name in ("one", "all"):
            client.say(name, [65])
            client.say(name, [66])
            client.say(name, [67], finish_reason="length")
        assert [(await first).token_ids] + [d.token_ids async for d in stream] == [[65], [66], [67]]
        assert [d.token_ids for d in await batch] == [[65], [66], [67]]
        assert [b async for b in batches] == []
        assert client.aborted == []

    run(main())


def test_one_reader_does_not_see_anothers_deltas():
    async def main():
        client = Client()
        engine = AsyncEngine(client)
        a, first_a = await started(engine, toy_request("a"))
        b, first_b = await started(engine, toy_request("b"))
        client.say("b", [66], finish_reason="length")
        assert (await first_b).token_ids == [66]
        assert not first_a.done()
        client.say("a", [65], finish_reason="length")
        assert (await first_a).token_ids == [65]
        assert [d async for d in a] == [d async for d in b] == []

    run(main())


def test_an_error_comes_after_the_tokens_before_it():
    async def main():
        client = Client()
        stream, first = await started(AsyncEngine(client), toy_request("a"))
        client.say("a", [65])
        client.say("a", finish_reason="error", error=EngineDeadError("the device is gone"))
        assert (await first).token_ids == [65]
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await anext(stream)
        assert client.aborted == []

    run(main())


# --- a reader that goes away ----------------------------------------------------------------------------------------------


def test_a_cancelled_reader_aborts_its_request_and_the_id_is_free_after_its_end():
    async def main():
        client = Client()
        engine = AsyncEngine(client)

        async def read():
            async with contextlib.aclosing(engine.stream(toy_request("a"))) as stream:
                async for _ in stream:
                    pass

        reader = asyncio.ensure_future(read())
        await settle()
        client.say("a", [65])
        await settle()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert client.aborted == ["a"]
        with pytest.raises(InvalidRequestError, match="request_id"):
            await anext(engine.stream(toy_request("a")))
        client.say("a", finish_reason="abort")
        await settle()
        again, first = await started(engine, toy_request("a"))
        client.say("a", [66], finish_reason="length")
        assert (await first).token_ids == [66], "not the end of the one before"
        await again.aclose()
        assert client.aborted == ["a"]

    run(main())


def test_closing_between_two_deltas_aborts():
    async def main():
        client = Client()
        stream, first = await started(AsyncEngine(client), toy_request("a"))
        client.say("a", [65])
        await first
        await stream.aclose()
        assert client.aborted == ["a"]

    run(main())


def test_a_request_that_is_over_is_not_aborted():
    """Its last delta is there and not read yet when the reader goes away."""

    async def main():
        client = Client()
        stream, first = await started(AsyncEngine(client), toy_request("a"))
        client.say("a", [65])
        await first
        client.say("a", [66], finish_reason="length")
        await settle()
        await stream.aclose()
        assert client.aborted == []

    run(main())


def test_a_cancelled_stream_over_the_engine_thread_frees_its_pages():
    async def main():
        config = toy_config()
        thread = EngineThread(Engine(Scheduler(config), FakeRunner(config), None))
        engine = AsyncEngine(thread)
        async with contextlib.aclosing(engine.stream(toy_request("a", PROMPT[:4], max_tokens=None))) as stream:
            async for _ in stream:
                break
        assert await engine.drain(TIMEOUT_S)
        stats = thread.stats()
        assert stats.num_free_pages == stats.num_pages
        thread.close()

    run(main())


def test_a_slow_reader_is_overloaded_and_its_request_aborted_once():
    async def main():
        client = Client()
        engine = AsyncEngine(client, max_pending_tokens=3)
        stream, first = await started(engine, toy_request("a"))
        client.say("a", [65])
        await first
        client.say("a", [66, 67, 68])
        await settle()
        assert client.aborted == [], "the limit itself is allowed"
        client.say("a", [69])
        client.say("a", [70])
        await settle()
        assert client.aborted == ["a"]
        assert engine._pending["a"].deltas == [], "and nothing piles up any more"
        with pytest.raises(OverloadedError, match="more than 3 tokens"):
            while True:
                await anext(stream)
        assert client.aborted == ["a"]

    run(main())


def test_a_last_delta_may_exceed_the_limit():
    async def main():
        client = Client()
        engine = AsyncEngine(client, max_pending_tokens=1)
        _, first = await started(engine, toy_request("a"))
        client.say("a", [65, 66, 67], finish_reason="length")
        assert (await first).token_ids == [65, 66, 67]
        assert client.aborted == []

    run(main())


# --- ids and refusals -----------------------------------------------------------------------------------------------------


def test_an_id_in_use_is_refused_and_the_stream_that_has_it_goes_on():
    async def main():
        client = Client()
        engine = AsyncEngine(client)
        stream, first = await started(engine, toy_request("a"))
        with pytest.raises(InvalidRequestError, match="request_id must be unused by any running request"):
            await anext(engine.stream(toy_request("a")))
        assert client.aborted == []
        client.say("a", [65], finish_reason="length")
        assert (await first).token_ids == [65]
        await stream.aclose()

    run(main())


@pytest.mark.parametrize("error", [DrainingError("no"), EngineDeadError("dead")])
def test_a_refusal_leaves_nothing_behind(error):
    async def main():
        client = Client()
        client.error = error
        engine = AsyncEngine(client)
        with pytest.raises(type(error)):
            await anext(engine.stream(toy_request("a")))
        assert engine._pending == {}
        assert client.aborted == []

    run(main())


def test_abort_stats_and_drain_are_the_clients():
    async def main():
        client = Client()
        engine = AsyncEngine(client)
        engine.abort(["a", "b"])
        assert client.aborted == ["a", "b"]
        assert engine.stats() == EngineStats()
        assert await engine.drain(1.5) is True
        assert await engine.drain(1.0) is False

    run(main())


# --- loops ----------------------------------------------------------------------------------------------------------------


def test_two_loops_over_one_engine_do_not_mix():
    """Each loop has its own AsyncEngine; a delta is delivered on the loop that asked."""
    config = toy_config()
    thread = EngineThread(Engine(Scheduler(config), FakeRunner(config), None))
    answers = {}
    together = threading.Barrier(2)

    def loop(name):
        async def main():
            engine = AsyncEngine(thread)
            loop_thread = threading.get_ident()
            deliver = engine._deliver

            def checked(deltas):
                assert threading.get_ident() == loop_thread
                assert all(d.request_id.startswith(name) for d in deltas)
                deliver(deltas)

            engine._deliver = checked
            together.wait(TIMEOUT_S)

            async def collect(request):
                return [t async for d in engine.stream(request) for t in d.token_ids]

            requests = [toy_request(f"{name}{i}", PROMPT[i : i + 5], max_tokens=6) for i in range(5)]
            tokens = await asyncio.gather(*map(collect, requests))
            answers[name] = tokens == [expected(r, config)[0] for r in requests]

        run(main())

    workers = [threading.Thread(target=loop, args=(name,), daemon=True) for name in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT_S)
    assert answers == {"x": True, "y": True}
    thread.close()


def test_a_loop_that_was_closed_harms_nobody():
    """Its requests run to their end unheard; the engine goes on serving others."""
    config = toy_config()
    runner = FakeRunner(config)
    reached, may_go_on = threading.Event(), threading.Event()

    def before_wait(plan):
        reached.set()
        assert may_go_on.wait(TIMEOUT_S)

    runner.before_wait = before_wait
    thread = EngineThread(Engine(Scheduler(config), runner, None))
    loop = asyncio.new_event_loop()

    async def make():
        return AsyncEngine(thread)

    engine = loop.run_until_complete(make())
    thread.submit(toy_request("unheard", max_tokens=3), engine._listen)
    assert reached.wait(TIMEOUT_S)
    loop.close()
    may_go_on.set()

    async def main():
        return [t async for d in AsyncEngine(thread).stream(toy_request("a", PROMPT[:4], max_tokens=3)) for t in d.token_ids]

    assert run(main()) == expected(toy_request("a", PROMPT[:4], max_tokens=3), config)[0]
    assert thread.drain(TIMEOUT_S)
    assert thread.stats().is_alive
    thread.close()
