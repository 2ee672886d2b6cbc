"""Requests that can never be served: each is answered at once, with the field's name, and the streams beside it go on."""

import asyncio
import math
import os
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb

pytestmark = pytest.mark.timeout(180)

ANSWER_S = 0.1
"""Within which each is answered: the issue's own figure [s]."""

NUM_TRIES = 5
"""Of each request; the fastest answer counts, because this process and others take the processor away from the server."""

MB = 2**20


def limit_s():
    """The figure is meant for a server that has its processor; with n runnable threads a core it has an n-th of one."""
    return ANSWER_S * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def ask(text="a", **sampling):
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**sampling))


def ids(*token_ids, **fields):
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), **fields)


BAD_REQUESTS = {
    "negative max_tokens": (ask(max_tokens=-5), "sampling.max_tokens"),
    "negative min_p": (ask(min_p=-0.1), "sampling.min_p"),
    "negative seed": (ask(seed=-2), "sampling.seed"),
    "negative top_k": (ask(top_k=-2), "sampling.top_k"),
    "NaN temperature": (ask(temperature=math.nan), "sampling.temperature"),
    "infinite top_p": (ask(top_p=math.inf), "sampling.top_p"),
    "unknown enum": (ask(logprobs_mode=77), "sampling.logprobs_mode"),
    "too many logprobs": (ask(logprobs=10_000), "sampling.logprobs"),
    "min_tokens above max_tokens": (ask(min_tokens=9, max_tokens=8), "sampling.min_tokens"),
    "too many stop strings": (ask(stop=["x"] * 17), "sampling.stop"),
    "too long a stop string": (ask(stop=["x" * 257]), "sampling.stop"),
    "empty stop string": (ask(stop=[""]), "sampling.stop"),
    "stop without text": (ask(stop=["x"], detokenize=False), "sampling.stop"),
    "stop token out of range": (ask(stop_token_ids=[128]), "sampling.stop_token_ids"),
    "token out of range": (ids(65, 128), "token_ids.ids"),
    "largest token": (ids(2**32 - 1), "token_ids.ids"),
    "flag of a text with token ids": (ids(65, add_special_tokens=False), "add_special_tokens"),
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (ask(""), "text"),
    "no token ids": (ids(), "token_ids.ids"),
    "prompt of max_model_len": (ask("x" * 2048), "text"),
    "5 MB prompt": (ask("x" * (5 * MB)), "text"),
    "10 MB prompt": (ask("x" * (10 * MB)), "text"),
    "10 MB of token ids": (ids(*[1] * (10 * MB)), "token_ids"),
    "10 MB stop string": (ask(stop=["x" * (10 * MB)]), "sampling"),
    "bad request id": (pb.GenerateRequest(text="a", request_id="../../etc"), "request_id"),
    "text that is not UTF-8": (b"\x0a\x03a\xffb", "text"),
    "stop string that is not UTF-8": (b"\x0a\x01a\x1a\x04\x32\x02a\xff", "sampling.stop"),
    "cut off": (ask("x" * 100).SerializeToString()[:50], "text"),
    "no protobuf": (b"\xff" * 100, ""),
    "a million empty stop strings": (ask(stop=[""] * MB), "sampling"),
}
"""What is sent, and the field that the answer must name ("": there is none to name)."""


async def answer(method, data):
    """The code and the named field of a refusal, and how long it took [s]."""
    started_s = time.monotonic()
    call = method(data)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    took_s = time.monotonic() - started_s
    [detail] = (await rpc_status.aio.from_call(call)).details
    bad = error_details_pb2.BadRequest()
    assert detail.Unpack(bad), detail
    [violation] = bad.field_violations
    assert violation.description == caught.value.details()
    return caught.value.code(), violation.field, took_s


async def quickest(method, data, expected):
    """The shortest time of several tries [s]; every one of them must be as expected."""
    times = []
    while len(times) < NUM_TRIES and min(times, default=math.inf) > ANSWER_S:
        *said, took_s = await answer(method, data)
        assert said == expected
        times.append(took_s)
    return min(times)


def generate(channel):
    """The method without a serializer: what is sent need be no message."""
    return channel.unary_stream("/jaxserve.v1.GenerationService/Generate")


@pytest.fixture(scope="module")
def payloads():
    return {
        name: (request if isinstance(request, bytes) else request.SerializeToString(), field)
        for name, (request, field) in BAD_REQUESTS.items()
    }


def test_each_is_answered_at_once_with_the_fields_name(server, payloads):
    async def body():
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            for name, (data, field) in payloads.items():
                took_s = await quickest(generate(channel), data, [grpc.StatusCode.INVALID_ARGUMENT, field])
                assert took_s < limit_s(), name

    asyncio.run(body())


def test_each_leaves_64_streams_beside_it_as_they_were(server, beating, payloads):
    asked = [(f"calm {i} " + "x" * (7 * i % 150), 200) for i in range(64)]
    expected = [beating.continuation(*request) for request in asked]
    server.pace(0.002)

    async def body():
        async with server.stub() as stub, grpc.aio.insecure_channel(server.endpoint) as channel:
            calm = asyncio.create_task(beating.streams(stub, asked))
            while server.stats()["num_waiting"] == 0:
                await asyncio.sleep(0.01)
            for name, (data, field) in payloads.items():
                if len(data) < MB:  # the others share the processor with what feeds them: 10 MB through this very process
                    took_s = await quickest(generate(channel), data, [grpc.StatusCode.INVALID_ARGUMENT, field])
                    assert took_s < limit_s(), name
                else:
                    code, named, _ = await answer(generate(channel), data)
                    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field), name
                if calm.done():
                    assert await calm == expected
                    calm = asyncio.create_task(beating.streams(stub, asked))
            assert await calm == expected

    asyncio.run(body())


def test_what_has_a_status_of_its_own_says_which_field_too(server, beating):
    async def body():
        async with server.stub() as stub:
            running = stub.Generate(beating.ask("first", 1000, request_id="mine"))
            await running.read()
            for request, code, field in [
                (pb.GenerateRequest(text="a", model="gpt-5"), grpc.StatusCode.NOT_FOUND, "model"),
                (beating.ask("second", request_id="mine"), grpc.StatusCode.ALREADY_EXISTS, "request_id"),
            ]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(request).read()
                assert caught.value.code() is code
                assert caught.value.details().startswith(field)
            running.cancel()

    asyncio.run(body())


def test_20_prompts_of_10_mb_at_once_take_little_more_memory_than_they_have(server, payloads):
    """Twice as much, once in gRPC's buffers and once as the bytes that are looked at, and what malloc keeps of the round before.

    Parsed, it would be twelve times.
    """
    data, field = payloads["10 MB prompt"]
    bombs, bomb_field = payloads["a million empty stop strings"]

    async def body():
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            for _ in range(2):
                answers = [answer(generate(channel), data) for _ in range(20)]
                answers += [answer(generate(channel), bombs) for _ in range(20)]
                for code, named, _ in await asyncio.gather(*answers):
                    assert code is grpc.StatusCode.INVALID_ARGUMENT
                    assert named in (field, bomb_field)

    server.forget_peak()
    before_mb = server.memory_mb()
    asyncio.run(body())
    sent_mb = 20 * (len(data) + len(bombs)) / MB
    assert server.memory_mb("VmHWM") - before_mb < 3 * sent_mb


def test_a_message_above_grpcs_own_limit_says_how_much_is_allowed(server):
    async def body():
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(channel)(ask("x" * (17 * MB)).SerializeToString()).read()
            return caught.value

    error = asyncio.run(body())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(16 * MB) in error.details()
