"""What a stranger can do cheaply: the streams beside it go on, the server keeps its memory, and nothing of it lasts."""

import asyncio
import contextlib
import socket
import struct

import grpc
import pytest

from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb

pytestmark = pytest.mark.timeout(180)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, CANCEL = 1, 4, 8
MB = 2**20


def frame(kind, payload=b"", flags=0, stream=0):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name, value):
    """One header, literal and not indexed (RFC 7541, 6.2.2), of fewer than 127 bytes each."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


GENERATE = b"".join(
    header(name, value)
    for name, value in [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/jaxserve.v1.GenerationService/Generate"),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
)


def connect(server):
    host, _, port = server.endpoint.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def open_http2(server):
    connection = connect(server)
    connection.sendall(PREFACE + frame(SETTINGS))
    return connection


def read_until_closed(connection):
    """All that the server says before it closes the connection; whether it did within the socket's time."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            said += chunk
    return said


@pytest.fixture
def calm(server, beating):
    """Runs an attack beside streams, 16 at a time, which must come out as they are without; memory must stay where it was."""
    asked = [(f"calm {i}", 100) for i in range(16)]
    expected = [beating.continuation(*request) for request in asked]

    def run(attack):
        server.pace(0.005)
        server.forget_peak()
        before_mb = server.memory_mb()

        async def body():
            async with server.stub() as stub:
                running = asyncio.create_task(beating.streams(stub, asked))
                while server.stats()["num_running"] == 0:
                    await asyncio.sleep(0.01)
                attacking = asyncio.create_task(asyncio.to_thread(attack))
                assert await running == expected
                while not attacking.done():
                    assert await beating.streams(stub, asked) == expected
                await attacking

        asyncio.run(body())
        assert server.memory_mb("VmHWM") - before_mb < beating.MEMORY_SLACK_MB

    return run


def test_500_calls_reset_in_one_connection(server, calm):
    """The rapid reset of CVE-2023-44487: each call is sent whole and taken back in the same breath."""
    body = pb.GenerateRequest(text="reset", sampling=pb.SamplingParams(max_tokens=1000)).SerializeToString()
    data = frame(DATA, b"\0" + struct.pack(">I", len(body)) + body, END_STREAM)

    def attack():
        with open_http2(server) as connection, contextlib.suppress(ConnectionError):  # it may well be shown the door
            for stream in range(1, 1001, 2):
                own = struct.pack(">I", stream)
                call = frame(HEADERS, GENERATE, END_HEADERS, stream) + data[:5] + own + data[9:]
                connection.sendall(call + frame(RST_STREAM, struct.pack(">I", CANCEL), 0, stream))

    calm(attack)


@pytest.mark.slow
def test_a_flood_of_pings_is_shown_the_door(server, calm):
    def attack():
        with open_http2(server) as connection:
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(frame(PING, b"12345678") * 100)
            said = read_until_closed(connection)
        assert b"too_many_pings" in said

    calm(attack)


@pytest.mark.slow
def test_connections_that_say_nothing_or_nonsense(server, calm):
    def attack():
        with contextlib.ExitStack() as stack:
            for i in range(100):
                connection = stack.enter_context(connect(server))
                connection.sendall([b"", PREFACE[:10], b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000][i % 4])
                if i % 2:  # torn away: a reset in place of a FIN
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

    calm(attack)


def test_metadata_floods_and_gzip_bombs_are_refused(server, calm, beating):
    """10 MB that are 10 KB on the wire, unpacked only to be refused; 30 MB are refused by gRPC."""

    def attack():
        with grpc.insecure_channel(server.endpoint) as channel:
            generate = channel.unary_stream("/jaxserve.v1.GenerationService/Generate")
            for _ in range(5):
                with pytest.raises(grpc.RpcError) as caught:
                    next(generate(b"", metadata=[("x-filler", "x" * 17_000)]))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for num_mb, code in ((10, grpc.StatusCode.INVALID_ARGUMENT), (30, grpc.StatusCode.RESOURCE_EXHAUSTED)):
                bomb = beating.ask("x" * (num_mb * MB)).SerializeToString()
                with pytest.raises(grpc.RpcError) as caught:
                    next(generate(bomb, compression=grpc.Compression.Gzip))
                assert caught.value.code() is code

    calm(attack)
