"""Deadlines and cancellations at every moment of a request's life, by the hundred: what they held comes back."""

import asyncio
import time

import grpc
import pytest

from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb

pytestmark = pytest.mark.timeout(180)

DEADLINE_S = 0.05
"""The issue's own figure [s]."""

LATE_S = 1.0
"""How much later the client may hear of it; the machine may be busy [s]."""

LONG = "x" * 1900
"""30 steps of 64 tokens to prefill."""


async def code_of(call):
    """The code that a stream ends with, and how many tokens it had before."""
    num_tokens = 0
    try:
        async for message in call:
            num_tokens += len(message.token_ids)
    except grpc.aio.AioRpcError as error:
        return error.code(), num_tokens
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED, num_tokens
    return grpc.StatusCode.OK, num_tokens


async def expired(stub, request):
    started_s = time.monotonic()
    code, num_tokens = await code_of(stub.Generate(request, timeout=DEADLINE_S))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert DEADLINE_S * 0.9 < time.monotonic() - started_s < DEADLINE_S + LATE_S
    return num_tokens


def test_50_ms_deadlines_of_queued_prefilling_and_decoding_requests(server, beating):
    """Steps of 20 ms: 50 ms are two of them."""
    server.pace(0.02)

    async def body():
        async with server.stub() as stub:
            await expired(stub, beating.ask(LONG, 100))  # in the middle of its prefill: 30 steps
            assert server.assert_idle_within()
            await expired(stub, beating.ask("decodes", 1000))
            assert server.assert_idle_within()
            calm = [(f"calm {i}", 60) for i in range(16)]  # as many as run at a time
            running = asyncio.create_task(beating.streams(stub, calm))
            while server.stats()["num_running"] < 16:
                await asyncio.sleep(0.005)
            queued = await asyncio.gather(*(expired(stub, beating.ask(f"queued {i}")) for i in range(40)))
            assert queued == [0] * 40
            deadline_s = time.monotonic() + beating.PAGES_BACK_S
            while server.stats()["num_waiting"]:
                assert time.monotonic() < deadline_s
            assert await running == [beating.continuation(*request) for request in calm]

    asyncio.run(body())


@pytest.mark.parametrize("num_rounds", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_hundreds_of_deadlines_and_cancelled_calls_leave_nothing(server, beating, num_rounds):
    """50 a round; the first round fills pools and caches, the others must add next to nothing."""

    async def one_round(stub, number):
        calls = []
        for i in range(25):
            prompt = LONG if i % 13 == 0 else f"round {number} call {i}"
            calls.append(stub.Generate(beating.ask(prompt, 1000), timeout=DEADLINE_S))
            calls.append(stub.Generate(beating.ask(prompt, 1000)))
            if i % 2:
                calls[-1].cancel()  # at once: it may not even have been sent
        await asyncio.sleep(DEADLINE_S)
        for call in calls[1::2]:
            call.cancel()
        codes = {code for code, _ in await asyncio.gather(*(code_of(call) for call in calls))}
        assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}

    async def body():
        async with server.stub() as stub:
            await one_round(stub, 0)
            await asyncio.to_thread(server.assert_idle_within)
            before_mb, threads = server.memory_mb(), server.num_threads()
            for number in range(1, 1 + num_rounds):
                await one_round(stub, number)
            await asyncio.to_thread(server.assert_idle_within)
            return server.memory_mb() - before_mb, server.num_threads() - threads

    grown_mb, new_threads = asyncio.run(body())
    assert grown_mb < 20 + 0.005 * 50 * num_rounds, f"{grown_mb:.1f} MB for {50 * num_rounds} calls"
    assert new_threads <= 8  # of gRPC's own pool


@pytest.mark.parametrize(
    "moment", ["at once", "while it prefills", "while it decodes", "at its last token", "after its end"]
)
def test_a_cancellation_at_any_moment_gives_everything_back(server, beating, moment):
    async def body():
        async with server.stub() as stub:
            server.pace(0.01)
            calm = asyncio.create_task(beating.streams(stub, [("calm", 40)]))
            prompt, max_tokens = (LONG, 50) if moment == "while it prefills" else ("cancelled", 20)
            call = stub.Generate(beating.ask(prompt, max_tokens, request_id="cancelled"))
            if moment == "while it prefills":
                await call.initial_metadata()
                await asyncio.sleep(0.05)
            elif moment == "while it decodes":
                await call.read()
            elif moment == "at its last token":
                for _ in range(max_tokens - 1):
                    await call.read()
            elif moment == "after its end":
                assert (await code_of(call))[0] is grpc.StatusCode.OK
            call.cancel()
            deadline_s = time.monotonic() + beating.PAGES_BACK_S
            while True:  # its id is free again, too
                again = stub.Generate(beating.ask("again", 3, request_id="cancelled"))
                code, _ = await code_of(again)
                if code is grpc.StatusCode.OK:
                    break
                assert code is grpc.StatusCode.ALREADY_EXISTS
                assert time.monotonic() < deadline_s
            return await calm

    assert asyncio.run(body()) == [beating.continuation("calm", 40)]


def test_abort_of_half_of_64_streams(server, beating):
    server.pace(0.002)

    async def body():
        async with server.stub() as stub:
            calm = [(f"calm {i}", 150) for i in range(32)]
            doomed = [stub.Generate(beating.ask(f"doomed {i}", 1900, request_id=f"doomed-{i}")) for i in range(32)]
            await asyncio.gather(*(call.initial_metadata() for call in doomed))
            running = asyncio.create_task(beating.streams(stub, calm))
            await asyncio.sleep(0.05)
            names = [f"doomed-{i}" for i in range(32)]
            answer = await stub.Abort(pb.AbortRequest(request_ids=names))
            assert list(answer.aborted_request_ids) == names
            for call in doomed:
                messages = [message async for message in call]
                assert messages[-1].finish_reason == pb.FINISH_REASON_ABORT
            return await running == [beating.continuation(*request) for request in calm]

    assert asyncio.run(body())
