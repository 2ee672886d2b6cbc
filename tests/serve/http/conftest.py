"""The HTTP front door on a real socket around the fake engine, with OpenAI's own client beside it."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import grpc
import openai
import pytest

from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.http.app import HttpApp, Served
from serve.http.server import HttpServer
from serve.protos.jaxserve.v1 import jaxserve_pb2, jaxserve_pb2_grpc
from serve.rpc.server import RpcServer
from serve.rpc.service import GenerationService

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if style %}[{{ style }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@contextlib.asynccontextmanager
async def serving(running, client, *, write_timeout_s, is_ready=True):
    server = HttpServer("127.0.0.1", 0, write_timeout_s=write_timeout_s)
    if is_ready:
        server.app.serve(Served(running, 60.0))
    await server.start()
    base_url = f"http://{server.endpoint}/v1"
    try:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=20) as api:
            yield SimpleNamespace(
                running=running,
                server=server,
                api=api,
                base_url=base_url,
                request=lambda *args, **options: request(server.port, *args, **options),
            )
    finally:
        await server.stop(0.5)


async def request(port, method, path, body=None, headers=(), host="127.0.0.1"):
    """One request over a connection of its own: status, headers by lower-case name, and the body's bytes."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(data)}", *headers]
    answer = await exchange(port, "\r\n".join([*lines, "", ""]).encode() + data)
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    named = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    return int(status.split()[1]), named, unchunked(rest) if "transfer-encoding" in named else rest


async def in_process(app, method, path, body=None, headers=()):
    """The same without a socket; body may be a list of pieces."""
    data = body if isinstance(body, list) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
    messages = [{"type": "http.request", "body": piece, "more_body": n + 1 < len(data)} for n, piece in enumerate(data)]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"test"), *headers],
    }
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


async def exchange(port, data):
    """Sends bytes; returns all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(reader.read(), 20)
        return b""
    finally:
        writer.close()


def unchunked(data):
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)


@pytest.fixture
def ask(client, new_running):
    """Posts a body to an application around the fake engine, in this process; returns the status and the answer or its error."""

    def run(path, body, *, tokenizer=AsciiTokenizer(TEMPLATE), **limits):  # noqa: B008
        async def main():
            async with asyncio.timeout(20):
                app = HttpApp()
                app.serve(Served(new_running(tokenizer, **limits), 60.0))
                status, _, data = await in_process(app, "POST", path, body)
                answer = json.loads(data)
                return status, answer.get("error", answer)

        return asyncio.run(main())

    return run


@pytest.fixture
def send():
    return exchange


@pytest.fixture
def with_http(client, new_running):
    """Runs `async def body(served)` against the front door; keyword arguments are limits of the running requests."""

    def run(body, *, tokenizer=AsciiTokenizer(TEMPLATE), write_timeout_s=30.0, is_ready=True, **limits):  # noqa: B008
        async def main():
            async with asyncio.timeout(30):
                running = new_running(tokenizer, write_timeout_s=write_timeout_s, **limits)
                async with serving(running, client, write_timeout_s=write_timeout_s, is_ready=is_ready) as served:
                    return await body(served)

        return asyncio.run(main())

    return run


@pytest.fixture
def with_both_doors(with_http):
    """Like with_http, with a `generate(prompt, max_tokens)` that calls the same requests over gRPC."""

    def run(body, **options):
        async def both(served):
            server = RpcServer("127.0.0.1", 0)
            await server.start(GenerationService(served.running), with_reflection=False)
            try:
                async with grpc.aio.insecure_channel(server.endpoint) as channel:
                    stub = jaxserve_pb2_grpc.GenerationServiceStub(channel)

                    async def generate(text, max_tokens, request_id=""):
                        sampling = jaxserve_pb2.SamplingParams(max_tokens=max_tokens)
                        request = jaxserve_pb2.GenerateRequest(text=text, sampling=sampling, request_id=request_id)
                        return [message async for message in stub.Generate(request)]

                    served.generate = generate
                    return await body(served)
            finally:
                await server.stop(0.5)

        return with_http(both, **options)

    return run
