"""Steps that raise, steps that never return: every stream ends as UNAVAILABLE at once, and the server with status 1.

A real engine around a device in numpy, behind the real server on a real socket, in this process, where a step can be broken.
"""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from jaxserve.engine import Engine
from jaxserve.engine_thread import EngineThread
from jaxserve.request_factory import RequestFactory
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, toy_config
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve import lifecycle
from serve.lifecycle import StopRequests
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc
from serve.settings import ServerConfig

NUM_STREAMS = 64
STEP_TIMEOUT_S = 1.0
END_LIMIT_S = 2.0
"""Within which every stream must have ended, the issue's own figure: from the fault, or from when a hang counts as one [s]."""

TIMEOUT_S = 20.0
"""Ends a test that hangs [s]."""


class Device(FakeRunner):
    """Steps as usual until `fault` is set: then the next one raises, or waits for `release`."""

    def __init__(self, config):
        super().__init__(config)
        self.fault = None
        self.release = threading.Event()
        self.has_faulted = threading.Event()
        self.before_wait = self._before_wait

    def _before_wait(self, plan):
        time.sleep(0.001)  # leaves the interpreter to the loop: a step of a real device does
        if self.fault is not None:
            self.has_faulted.set()
        if self.fault == "raises":
            raise RuntimeError("canary: the device is gone")
        if self.fault == "hangs":
            self.release.wait()


@pytest.fixture
def device():
    device = Device(toy_config(max_model_len=2048, max_num_seqs=16, num_pages=9000, max_num_batched_tokens=64))
    yield device
    device.release.set()


@contextlib.asynccontextmanager
async def running(device, step_timeout_s=STEP_TIMEOUT_S, **settings):
    """Yields a server that is ready; it must have ended when the block ends."""
    config, tokenizer = device._config, AsciiTokenizer()
    client = EngineThread(Engine(Scheduler(config), device, tokenizer))
    built = SimpleNamespace(
        client=client,
        tokenizer=tokenizer,
        config=config,
        requests=RequestFactory(config, tokenizer),
        close=client.close,
    )
    stops = StopRequests()
    ready = asyncio.get_running_loop().create_future()
    settings = ServerConfig(grpc_port=0, http_port=0, step_timeout_s=step_timeout_s, **settings)
    task = asyncio.create_task(lifecycle.run(lambda: built, settings, lambda *said: ready.set_result(said[1]), stops))
    async with asyncio.timeout(TIMEOUT_S), grpc.aio.insecure_channel((await ready).grpc) as channel:
        yield SimpleNamespace(task=task, client=client, stops=stops, channel=channel, stub=stub_of(channel))
        assert task.done()


def stub_of(channel):
    return jaxserve_pb2_grpc.GenerationServiceStub(channel)


def ask(name, max_tokens=2000):
    return pb.GenerateRequest(text=name, sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def end_of(call):
    """The code that a stream ends with, and when."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return caught.value.code(), time.monotonic()


async def open_streams(server):
    """64 streams, 16 of them running and 48 waiting."""
    calls = [server.stub.Generate(ask(f"stream {i}")) for i in range(NUM_STREAMS)]
    await asyncio.gather(*(call.initial_metadata() for call in calls))
    while server.client.stats().num_running + server.client.stats().num_waiting < NUM_STREAMS:
        await asyncio.sleep(0.01)
    return calls


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_every_stream_ends_as_unavailable_and_the_server_with_1(device, fault):
    async def body():
        async with running(device) as server:
            health = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
            calls = await open_streams(server)
            device.fault = fault
            await asyncio.to_thread(device.has_faulted.wait, TIMEOUT_S)
            faulted_s = time.monotonic()
            ends = await asyncio.gather(*(end_of(call) for call in calls))
            known_s = faulted_s + (STEP_TIMEOUT_S if fault == "hangs" else 0.0)
            assert {code for code, _ in ends} == {grpc.StatusCode.UNAVAILABLE}
            assert max(when for _, when in ends) - known_s < END_LIMIT_S
            [packed] = (await rpc_status.aio.from_call(calls[-1])).details
            assert packed.Unpack(error_details_pb2.RetryInfo())
            assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await server.task == 1

    asyncio.run(body())


def test_a_new_call_between_the_fault_and_the_exit_is_unavailable(device, monkeypatch):
    monkeypatch.setattr(lifecycle, "WATCH_INTERVAL_S", 1.0)

    async def body():
        async with running(device) as server:
            device.fault = "raises"
            for name in ("the one that breaks it", "the next"):
                code, _ = await end_of(server.stub.Generate(ask(name)))
                assert code is grpc.StatusCode.UNAVAILABLE
            assert await server.task == 1

    asyncio.run(body())


@pytest.mark.slow
def test_a_slow_step_is_no_hang(device):
    """Steps of a third of the limit each that together exceed it, after an engine that was idle for longer than it."""

    async def body():
        async with running(device) as server:
            await asyncio.sleep(1.2 * STEP_TIMEOUT_S)
            device.before_wait = lambda plan: time.sleep(STEP_TIMEOUT_S / 3)
            call = server.stub.Generate(ask("slow", 4))
            messages = [message async for message in call]
            assert messages[-1].usage.completion_tokens == 4
            server.stops.add("test")
            assert await server.task == 0

    asyncio.run(body())


@pytest.mark.parametrize("noticed_by", ["the watch", "the second signal"])
def test_an_engine_that_hangs_while_it_drains_does_not_keep_the_server(device, noticed_by, monkeypatch):
    monkeypatch.setattr(lifecycle, "STOP_TIMEOUT_S", 0.2)
    step_timeout_s, num_stops = (STEP_TIMEOUT_S, 1) if noticed_by == "the watch" else (60.0, 2)

    async def body():
        async with running(device, step_timeout_s, drain_timeout_s=60.0) as server:
            calls = await open_streams(server)
            device.fault = "hangs"
            await asyncio.to_thread(device.has_faulted.wait, TIMEOUT_S)
            for _ in range(num_stops):
                server.stops.add("test")
            ends = await asyncio.gather(*(end_of(call) for call in calls))
            assert {code for code, _ in ends} == {grpc.StatusCode.UNAVAILABLE}
            assert await server.task == 1

    asyncio.run(body())
