import asyncio
import gzip
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.errors import ConfigError
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc
from serve.rpc.server import RpcServer, join

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_follows_the_server(with_service):
    async def body(served):
        health = health_pb2_grpc.HealthStub(served.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="jaxserve.v1.GenerationService"))
        seen = [(await watch.read()).status]
        for name in ("", "jaxserve.v1.GenerationService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
        await served.server.set_draining()
        seen.append((await watch.read()).status)
        for name in ("", "jaxserve.v1.GenerationService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()
        return seen

    assert with_service(body) == [SERVING, NOT_SERVING]


def test_reflection_describes_the_service(with_service):
    async def body(served):
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="jaxserve.v1.GenerationService"),
        ]
        return [answer async for answer in stub.ServerReflectionInfo(iter(questions))]

    services, file = with_service(body)
    names = {service.name for service in services.list_services_response.service}
    assert names == {
        "jaxserve.v1.GenerationService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert file.file_descriptor_response.file_descriptor_proto[0] == pb.DESCRIPTOR.serialized_pb


def test_messages_and_metadata_beyond_the_limits_are_refused(with_service, client):
    async def body(served):
        big = pb.GenerateRequest(text="x" * (16 * 2**20))
        metadata = (("x-filler", "x" * 17_000),)
        codes = []
        for request, sent in ((big, ()), (pb.GenerateRequest(text="a"), metadata)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.stub.Generate(request, metadata=sent).read()
            codes.append(caught.value.code())
        bomb = served.channel.unary_unary(
            "/jaxserve.v1.GenerationService/Tokenize",
            request_serializer=pb.TokenizeRequest.SerializeToString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # 50 MB that are 50 KB on the wire
            await bomb(pb.TokenizeRequest(text="x" * (50 * 2**20)), compression=grpc.Compression.Gzip)
        return [*codes, caught.value.code()]

    assert len(gzip.compress(b"x" * (50 * 2**20))) < 100_000  # so it is not the wire's size that was refused
    assert with_service(body) == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    assert client.submitted == []


def test_a_message_just_below_the_limit_is_read(with_service):
    async def body(served):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.Tokenize(pb.TokenizeRequest(text="x" * (16 * 2**20 - 100)))
        return caught.value.code()

    assert with_service(body) is grpc.StatusCode.INVALID_ARGUMENT  # by us, as too long a text


def test_an_unknown_method_is_unimplemented(with_service):
    async def body(served):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary("/jaxserve.v1.GenerationService/Explode")(b"")
        return caught.value.code()

    assert with_service(body) is grpc.StatusCode.UNIMPLEMENTED


def test_a_taken_port_is_named():
    async def body():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"grpc_port: 127\.0\.0\.1:{port} cannot be bound"):
                RpcServer("127.0.0.1", port)

    asyncio.run(body())


def test_two_servers_do_not_share_a_port():
    async def body():
        first = RpcServer("127.0.0.1", 0)
        with pytest.raises(ConfigError, match="cannot be bound"):
            RpcServer("127.0.0.1", first.port)
        await first.stop(0)

    asyncio.run(body())


def test_what_can_be_reached_from_outside_is_warned_of(caplog):
    async def body(host):
        server = RpcServer(host, 0)
        await server.stop(0)
        return server.endpoint

    endpoint = asyncio.run(body("127.0.0.1"))
    assert "asks nobody for a key" not in caplog.text
    asyncio.run(body("0.0.0.0"))
    assert "asks nobody for a key" in caplog.text
    assert endpoint.startswith("127.0.0.1:")
    assert join("::1", 8001) == "[::1]:8001"


def test_the_generated_stub_calls_every_method():
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods}
    assert methods == {"Generate", "Abort", "Tokenize", "Detokenize", "GetModel"}
    assert methods <= set(dir(jaxserve_pb2_grpc.GenerationServiceServicer))
