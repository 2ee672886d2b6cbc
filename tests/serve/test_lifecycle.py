import asyncio
import contextlib
import threading
from types import SimpleNamespace

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.errors import ConfigError
from serve import lifecycle
from serve.doors import open_doors
from serve.lifecycle import StopRequests
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc
from serve.settings import ServerConfig

FINISHED = pb.FINISH_REASON_LENGTH


@contextlib.asynccontextmanager
async def running(built, **settings):
    """Yields a server that is ready; its exit status is `status` afterwards."""
    stops = StopRequests()
    ready = asyncio.get_running_loop().create_future()
    config = ServerConfig(grpc_port=0, http_port=0, **settings)
    server = asyncio.create_task(lifecycle.run(lambda: built, config, lambda *said: ready.set_result(said), stops))
    model, endpoints, seconds = await asyncio.wait_for(ready, 10)
    assert (model, 0 <= seconds < 10) == ("fake", True)
    async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
        yield SimpleNamespace(
            stops=stops,
            task=server,
            endpoint=endpoints.grpc,
            http=endpoints.http,
            stub=jaxserve_pb2_grpc.GenerationServiceStub(channel),
            health=health_pb2_grpc.HealthStub(channel),
        )
    assert server.done()


def ask(max_tokens):
    return pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=max_tokens))


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return caught.value.code()


def test_a_drain_finishes_what_runs_and_refuses_what_is_new(built, client):
    async def body():
        async with running(built) as server:
            open_call = server.stub.Generate(ask(300))
            await open_call.read()
            client.gate.clear()  # it cannot finish before we have looked around
            server.stops.add("test")
            await asyncio.sleep(0.05)
            health = await server.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await code_of(server.stub.Generate(ask(1))) is grpc.StatusCode.UNAVAILABLE
            assert not server.task.done()
            client.gate.set()
            last = None
            while (message := await open_call.read()) is not grpc.aio.EOF:
                last = message
            assert (last.finish_reason, last.usage.completion_tokens) == (FINISHED, 300)
            assert await asyncio.wait_for(server.task, 10) == 0
            port = int(server.endpoint.rpartition(":")[2])
        (await asyncio.start_server(lambda *_: None, "127.0.0.1", port)).close()  # the port is free

    asyncio.run(body())
    assert client.is_closed
    assert client.aborted == []


@pytest.mark.parametrize("how", ["the time is over", "a second signal"])
def test_what_does_not_finish_ends_as_unavailable(built, client, how):
    async def body():
        timeout_s = 0.2 if how == "the time is over" else 60.0
        async with running(built, drain_timeout_s=timeout_s) as server:
            open_call = server.stub.Generate(ask(4000))
            await open_call.read()
            client.step_s = 0.05  # 4000 tokens would take 200 s
            server.stops.add("test")
            if how == "a second signal":
                await asyncio.sleep(0.05)
                server.stops.add("test")
            assert await code_of(open_call) is grpc.StatusCode.UNAVAILABLE
            assert await asyncio.wait_for(server.task, 10) == 0

    asyncio.run(body())
    assert len(client.aborted) == 1
    assert client.is_closed


def test_a_dead_engine_ends_the_server_with_status_1(built, client):
    async def body():
        async with running(built) as server:
            client.is_alive = False
            assert await asyncio.wait_for(server.task, 10) == 1

    asyncio.run(body())


def test_a_stop_before_ready_does_not_wait_for_the_engine():
    never = threading.Event()

    async def body():
        stops = StopRequests()
        task = asyncio.create_task(lifecycle.run(never.wait, ServerConfig(grpc_port=0, http_port=0), pytest.fail, stops))
        await asyncio.sleep(0.1)
        stops.add("test")
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(body()) == 0
    never.set()


def test_an_engine_that_cannot_be_built_frees_the_port():
    def build():
        raise ConfigError("page_size must be smaller")

    async def body():
        probe = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = probe.sockets[0].getsockname()[1]
        probe.close()
        for _ in range(2):
            with pytest.raises(ConfigError, match="page_size must be smaller"):
                await lifecycle.run(build, ServerConfig(grpc_port=port, http_port=0), pytest.fail, StopRequests())

    asyncio.run(body())


def test_a_taken_port_is_known_before_anything_is_built():
    async def body():
        taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match="cannot be bound"):
            await lifecycle.run(pytest.fail, ServerConfig(grpc_port=port, http_port=0), pytest.fail, StopRequests())
        taken.close()

    asyncio.run(body())


def test_the_limits_of_the_settings_reach_the_service(built, client):
    client.gate.clear()

    async def body():
        async with running(built, max_queued_requests=1, max_queued_tokens=100) as server:
            held = [server.stub.Generate(ask(1)) for _ in range(built.config.max_num_seqs + 1)]
            for call in held:
                await call.initial_metadata()
            assert await code_of(server.stub.Generate(ask(1))) is grpc.StatusCode.RESOURCE_EXHAUSTED
            client.gate.set()
            for call in held:
                assert (await call.read()).finish_reason == FINISHED
            server.stops.add("test")
            assert await asyncio.wait_for(server.task, 10) == 0

    asyncio.run(body())


def test_a_drain_covers_http(built, client):
    async def body():
        async with (
            running(built) as server,
            openai.AsyncOpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as api,
        ):
            stream = await api.completions.create(model="fake", prompt="a", max_tokens=300, stream=True)
            chunks = aiter(stream)
            text = (await anext(chunks)).choices[0].text
            client.gate.clear()
            server.stops.add("test")
            await asyncio.sleep(0.05)
            with pytest.raises(openai.APIStatusError) as caught:
                await api.completions.create(model="fake", prompt="a")
            assert caught.value.status_code == 503
            assert not server.task.done()
            client.gate.set()
            text += "".join([chunk.choices[0].text async for chunk in chunks])
            assert text == "".join(chr(32 + i % 95) for i in range(300))
            assert await asyncio.wait_for(server.task, 10) == 0
            port = int(server.http.rpartition(":")[2])
        (await asyncio.start_server(lambda *_: None, "127.0.0.1", port)).close()  # the port is free

    asyncio.run(body())
    assert client.aborted == []


def test_an_http_stream_that_does_not_finish_ends_with_an_error(built, client):
    async def body():
        async with (
            running(built, drain_timeout_s=0.2) as server,
            openai.AsyncOpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as api,
        ):
            stream = await api.completions.create(model="fake", prompt="a", max_tokens=4000, stream=True)
            chunks = aiter(stream)
            await anext(chunks)
            client.step_s = 0.05
            server.stops.add("test")
            with pytest.raises(openai.APIError, match="shut down"):
                while True:
                    await anext(chunks)
            assert await asyncio.wait_for(server.task, 10) == 0

    asyncio.run(body())
    assert len(client.aborted) == 1


def test_without_http_there_is_no_second_port(built):
    async def body():
        async with running(built, http=False) as server:
            assert server.http is None
            server.stops.add("test")
            assert await asyncio.wait_for(server.task, 10) == 0

    asyncio.run(body())


@pytest.mark.parametrize("door", ["grpc_port", "http_port"])
def test_a_port_that_is_taken_frees_the_other(door):
    async def body():
        taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        free = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        ports = [server.sockets[0].getsockname()[1] for server in (taken, free)]
        free.close()
        other = "http_port" if door == "grpc_port" else "grpc_port"
        config = ServerConfig(**{door: ports[0], other: ports[1]})
        for _ in range(2):  # the second time says whether the first one left it taken
            with pytest.raises(ConfigError, match=f"{door}: .* cannot be bound"):
                await lifecycle.run(pytest.fail, config, pytest.fail, StopRequests())
        taken.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{% if %}", "compiles"), ("{{ raise_exception('no') }}", None)]
)
def test_a_chat_template_that_cannot_be_used_is_known_before_anything_is_built(tmp_path, content, message):
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_text(content)

    async def body():
        doors = await open_doors(ServerConfig(grpc_port=0, http_port=0, chat_template=str(path)))
        await doors.stop()

    if message is None:  # it refuses our conversation, and may take others
        asyncio.run(body())
    else:
        with pytest.raises(ConfigError, match=message):
            asyncio.run(body())
