"""SIGTERM, an engine that breaks, a kill: streams end as they must, and of the process nothing is left."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytestmark = pytest.mark.timeout(300)

AT_ONCE_S = 2.0
"""Within which health turns, streams end when they must not go on, and a dead engine's server has told everybody [s]."""

EXIT_S = 15.0
"""For a process to end once its streams have [s]."""


def assert_gone(server, status=0):
    """It ended with this status, left no process behind, and its port can be had."""
    assert server.exit_status(EXIT_S) == status
    host, _, port = server.endpoint.rpartition(":")
    socket.create_server((host, int(port))).close()


async def assert_not_serving(server):
    """Health says so at once, and a new call is refused so that its client goes elsewhere."""
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        deadline_s = time.monotonic() + AT_ONCE_S
        health = health_pb2_grpc.HealthStub(channel)
        while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            assert time.monotonic() < deadline_s
    async with server.stub() as stub:
        assert await code_of(stub.Generate(server.ask("new"))) is grpc.StatusCode.UNAVAILABLE


async def code_of(call):
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@contextlib.asynccontextmanager
async def open_streams(server, num_streams, max_tokens):
    """As many streams, all of them admitted, some of them waiting."""
    async with server.stub() as stub:
        calls = [stub.Generate(server.ask(f"open {i}", max_tokens)) for i in range(num_streams)]
        await asyncio.gather(*(call.initial_metadata() for call in calls))
        yield calls


def test_sigterm_lets_64_streams_finish_though_some_readers_stall(start_server, beating):
    server = start_server(drain_timeout_s=60, write_timeout_s=5)
    asked = [(f"open {i} " + "x" * (7 * i % 150), 200) for i in range(60)]

    async def body():
        async with server.stub(*beating.SLOW_READER) as slow, server.stub() as stub:
            stalled = [slow.Generate(beating.ask(f"stalled {i}", 1900, logprobs=20)) for i in range(4)]
            for call in stalled:
                await call.read()
            calls = [stub.Generate(beating.ask(*request)) for request in asked]
            await asyncio.gather(*(call.initial_metadata() for call in calls))
            assert server.stats()["num_waiting"] > 0
            server.process.send_signal(signal.SIGTERM)
            await assert_not_serving(server)
            ends = await asyncio.gather(*map(beating.stream, calls))
            assert ends == [(beating.continuation(*request), grpc.StatusCode.OK) for request in asked]
            # The server waits for the others to read, for as long as they may leave it unread, and goes.
            await asyncio.to_thread(server.process.wait, 40)
            # Their status waits behind what they have not read; the second is for those whose server has gone meanwhile.
            expected = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
            assert {await code_of(call) for call in stalled} <= expected

    asyncio.run(body())
    assert_gone(server)
    assert server.errors() == []


def test_sigterm_during_warm_up(beating):
    """The port is taken, the programs compile."""
    command = [
        sys.executable,
        "-m",
        "serve.cli",
        "serve",
        "--grpc-port=0",
        "--no-http",
        "--model=toy",
        "--compilation-cache-dir=",
    ]
    with subprocess.Popen(
        command, cwd=beating.ROOT, env=beating.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert "gRPC listens on" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_S) == 0
            assert process.stdout.read() == "", "it was ready already"
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("why", ["the drain time is over", "a second SIGTERM"])
def test_streams_that_cannot_finish_end_as_unavailable(start_server, beating, why):
    server = start_server(drain_timeout_s=1 if why == "the drain time is over" else 600)
    server.pace(0.05)

    async def body():
        async with open_streams(server, 64, 1900) as calls, server.stub(*beating.SLOW_READER) as slow:
            stalled = slow.Generate(beating.ask("stalled", 1900, logprobs=20))
            await stalled.initial_metadata()
            server.process.send_signal(signal.SIGTERM)
            await assert_not_serving(server)
            if why == "a second SIGTERM":
                server.process.send_signal(signal.SIGTERM)
            started_s = time.monotonic()
            assert set(await asyncio.gather(*map(code_of, calls))) == {grpc.StatusCode.UNAVAILABLE}
            assert time.monotonic() - started_s < AT_ONCE_S + 1

    asyncio.run(body())
    assert_gone(server)
    assert server.errors() == []


@pytest.mark.slow
def test_sigterm_during_a_long_prefill(start_server, beating):
    server = start_server()
    server.pace(0.05)  # 30 steps

    async def body():
        async with server.stub() as stub:
            call = stub.Generate(beating.ask("x" * 1900, 5))
            await call.initial_metadata()
            while server.stats()["num_running"] == 0:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await beating.stream(call)

    assert asyncio.run(body()) == (beating.continuation("x" * 1900, 5), grpc.StatusCode.OK)
    assert_gone(server)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_broken_engine_ends_64_streams_and_the_process_with_1(start_server, how):
    server = start_server(step_timeout_s=1)

    async def body():
        async with open_streams(server, 64, 1900) as calls:
            server.break_step(how)
            broken_s = time.monotonic() + (1.0 if how == "hangs" else 0.0)
            assert set(await asyncio.gather(*map(code_of, calls))) == {grpc.StatusCode.UNAVAILABLE}
            assert time.monotonic() - broken_s < AT_ONCE_S

    asyncio.run(body())
    assert_gone(server, status=1)
    assert [line for line in server.errors() if "canary" in line] == []


@pytest.mark.slow
def test_kill_9_leaves_a_port_that_the_next_server_takes(start_server, beating):
    first = start_server()

    async def streams_of(server):
        async with server.stub() as stub:
            return await beating.streams(stub, [("after", 50)])

    async def killed():
        async with open_streams(first, 64, 1900) as calls:
            first.process.kill()
            assert set(await asyncio.gather(*map(code_of, calls))) == {grpc.StatusCode.UNAVAILABLE}

    asyncio.run(killed())
    assert first.exit_status(EXIT_S) == -signal.SIGKILL
    second = start_server(grpc_port=int(first.endpoint.rpartition(":")[2]))
    assert second.endpoint == first.endpoint
    assert asyncio.run(streams_of(second)) == [beating.continuation("after", 50)]
