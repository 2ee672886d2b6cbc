"""Bytes on a socket that no well-behaved client sends."""

import asyncio
import json
import time

import pytest

from serve.http import connection, guard

BODY = b'{"prompt": "a", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
HOST = b"Host: a\r\n"
CLOSE = b"Connection: close\r\n"


def statuses(answer):
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (POST + HOST + CLOSE + LENGTH + b"\r\n" + BODY, 200),
        (POST + HOST + CLOSE + CHUNKED + b"\r\n" + IN_CHUNKS, 200),
        (POST + HOST + LENGTH + CHUNKED + b"\r\n" + IN_CHUNKS, 400),
        (POST + HOST + CHUNKED + CHUNKED + b"\r\n" + IN_CHUNKS, 400),
        (POST + HOST + LENGTH + b"Content-Length: 7\r\n\r\n" + BODY, 400),
        (POST + HOST + b"Content-Length: -1\r\n\r\n" + BODY, 400),
        (POST + HOST + b"Content-Length: 1, 2\r\n\r\n" + BODY, 400),
        (POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + IN_CHUNKS, 400),
        (POST + HOST + HOST + LENGTH + b"\r\n" + BODY, 400),
        (POST + LENGTH + b"\r\n" + BODY, 400),
        (POST + HOST + b"Content-Encoding: gzip\r\n" + LENGTH + b"\r\n" + BODY, 415),
        (b"GET /health HTTP/1.1\r\n" + HOST + CLOSE + b"A: b\r\n" * 99 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + CLOSE + b"A: " + b"b" * 33_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 10_000 + b"A: unfinished", 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"A: \x00\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"A : b\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
    ids=range(19),
)
def test_a_head_with_two_readings_or_none_is_refused_and_the_connection_closed(with_http, send, data, status):
    async def body(served):
        return statuses(await send(served.server.port, data))

    assert with_http(body) in ([status], [status] if status != 431 else [400])


def test_what_follows_a_refused_body_is_no_request(with_http, send, client):
    smuggled = POST + HOST + LENGTH + b"\r\n" + BODY

    async def body(served):
        ambiguous = POST + HOST + b"Content-Length: %d\r\n" % len(smuggled) + CHUNKED + b"\r\n0\r\n\r\n" + smuggled
        assert statuses(await send(served.server.port, ambiguous)) == [400]
        unread = b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 500\r\n\r\n" + smuggled
        assert statuses(await send(served.server.port, unread)) == [200]

    with_http(body)
    assert client.submitted == []


def test_a_connection_is_used_again(with_http, send):
    request = POST + HOST + LENGTH + b"\r\n" + BODY

    async def body(served):
        return statuses(await send(served.server.port, request * 3 + b"GET /health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"))

    assert with_http(body) == [200] * 4


@pytest.mark.parametrize("is_chunked", [False, True])
def test_10_mb_are_refused_while_they_come(with_http, send, is_chunked):
    data = b"x" * 10_000_000
    head = POST + HOST + CLOSE
    if is_chunked:
        message = head + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    else:
        message = head + b"Content-Length: %d\r\n\r\n" % len(data) + data

    async def body(served):
        answer = await send(served.server.port, message)
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        return statuses(answer), error["code"], error["message"]

    status, code, message = with_http(body)
    assert (status, code) == ([413], "request_too_large")
    assert "at most 4194304 bytes, got 10000000" in message


def test_a_body_beyond_all_measure_is_refused_unread(with_http, send):
    async def body(served):
        return statuses(await send(served.server.port, POST + HOST + b"Content-Length: 100000000\r\n\r\nxxx"))

    assert with_http(body) == [413]


def test_the_limit_itself_is_taken(with_http, send):
    padded = BODY[:-1] + b" " * (guard.MAX_BODY_BYTES - len(BODY)) + b"}"

    async def body(served):
        head = POST + HOST + CLOSE + b"Content-Length: %d\r\n\r\n"
        assert statuses(await send(served.server.port, head % len(padded) + padded)) == [200]
        assert statuses(await send(served.server.port, head % (len(padded) + 1) + padded + b" ")) == [413]

    with_http(body)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", POST + HOST + b"A: b\r\n"])
def test_a_head_that_does_not_end_is_closed(with_http, send, monkeypatch, sent):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)

    async def body(served):
        return await send(served.server.port, sent)

    assert with_http(body) == b""


def test_a_head_that_trickles_is_closed(with_http, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)

    async def body(served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(2000):  # 20 s
                writer.write(b"A: b\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()

    with_http(body)


def test_a_body_that_does_not_end_is_refused(with_http, send, monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.2)

    async def body(served):
        return statuses(await send(served.server.port, POST + HOST + b"Content-Length: 100\r\n\r\n{"))

    assert with_http(body) == [408]


def test_a_client_that_leaves_while_it_sends_is_forgotten(with_http, caplog):
    async def body(served):
        _, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(POST + HOST + b"Content-Length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        assert (await served.request("GET", "/health"))[0] == 200

    with_http(body)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_reads_nothing_is_aborted_then_cut_off(with_http, client, until, caplog):
    client.text = "x" * 50_000
    client.step_s = 0.0005

    async def body(served):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port, limit=1024)
        slow = b'{"prompt": "a", "max_tokens": 4000, "stream": true}'
        writer.write(POST + HOST + b"Content-Length: %d\r\n\r\n" % len(slow) + slow)
        await until(lambda: client.aborted, 15)
        await asyncio.wait_for(served.running.wait_idle(), 5)
        await until(lambda: not served.server._server.server_state.connections, 10)
        writer.transport.abort()

    with_http(body, write_timeout_s=0.3)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_stopping_frees_the_port_though_connections_are_open(with_http):
    async def body(served):
        _, idle = await asyncio.open_connection("127.0.0.1", served.server.port)
        started_s = time.monotonic()
        await served.server.stop(0.5)
        assert time.monotonic() - started_s < 10
        (await asyncio.start_server(lambda *_: None, "127.0.0.1", served.server.port)).close()
        idle.close()

    with_http(body)
