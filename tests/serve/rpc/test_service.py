import asyncio
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.rpc.guard import ABORT_TIMEOUT_S


def ask(text="hello", *, request_id="", **sampling):
    return pb.GenerateRequest(text=text, request_id=request_id, sampling=pb.SamplingParams(**sampling))


def expected_text(num_tokens):
    return "".join(chr(32 + i % 95) for i in range(num_tokens))


async def rest(call):
    """All messages that have not been read yet."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def refusal(call, detail=None):
    """The code and message that a call ends with, and its one google.rpc detail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read"):
            await rest(call)
        else:
            await call
    error = caught.value
    found = None
    if detail is not None:
        [packed] = (await rpc_status.aio.from_call(call)).details
        found = detail()
        assert packed.Unpack(found), packed
    return error.code(), error.details(), found


def test_a_stream_has_deltas_then_finish_reason_and_usage(with_service):
    async def body(served):
        call = served.stub.Generate(ask(max_tokens=50, request_id="mine"))
        messages = await rest(call)
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        return messages

    messages = with_service(body)
    assert "".join(m.text for m in messages) == expected_text(50)
    assert [i for m in messages for i in m.token_ids] == [32 + i % 95 for i in range(50)]
    assert [m.request_id for m in messages] == ["mine"] + [""] * (len(messages) - 1)
    assert len(messages) > 5
    assert all(m.finish_reason == pb.FINISH_REASON_UNSPECIFIED and not m.HasField("usage") for m in messages[:-1])
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert messages[-1].usage == pb.Usage(prompt_tokens=5, completion_tokens=50, cached_prompt_tokens=3)


def test_unset_fields_take_the_defaults_and_set_zeros_do_not(with_service, client):
    async def body(served):
        async for _ in served.stub.Generate(pb.GenerateRequest(text="a")):
            pass
        async for _ in served.stub.Generate(ask("a", temperature=0.0, top_k=7, logprobs=0, max_tokens=1, seed=5)):
            pass

    with_service(body)
    default, given = [request.sampling for request in client.submitted]
    assert (default.temperature, default.max_tokens, default.logprobs, default.seed) == (1.0, 16, None, None)
    assert (given.temperature, given.max_tokens, given.logprobs, given.seed, given.top_k) == (0.0, 1, 0, 5, 7)


def test_log_probabilities_of_the_prompt_come_first(with_service, client):
    async def body(served):
        sampling = pb.SamplingParams(max_tokens=3, prompt_logprobs=1)
        call = served.stub.Generate(pb.GenerateRequest(text="abc", sampling=sampling))
        return [message async for message in call]

    messages = with_service(body)
    entries = [entry for message in messages for entry in message.prompt_logprobs]
    assert list(messages[0].prompt_logprobs) == entries
    assert [entry.chosen.token_id for entry in entries] == list(b"bc"), "of the first token nothing is known"
    assert [(entry.chosen.logprob, entry.chosen.rank, entry.chosen.text) for entry in entries] == [
        (-1.5, 4, "b"),
        (-1.5, 4, "c"),
    ]
    assert [[top.token_id for top in entry.top] for entry in entries] == [[65], [65]]
    assert not any(message.logprobs for message in messages)


def test_tokens_that_were_picked_come_in_the_order_asked_for(with_service, client):
    async def body(served):
        sampling = pb.SamplingParams(max_tokens=1, logprob_token_ids=[66, 65])
        message = await served.stub.Generate(pb.GenerateRequest(text="abc", sampling=sampling)).read()
        return message.logprobs[0]

    entry = with_service(body)
    assert (entry.chosen.token_id, [top.token_id for top in entry.top]) == (32, [66, 65])


def test_token_ids_in_and_logprobs_out(with_service, client):
    async def body(served):
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=pb.SamplingParams(max_tokens=1, logprobs=2))
        return await rest(served.stub.Generate(request))

    [message] = with_service(body)
    assert client.submitted[0].prompt_token_ids == (5, 6)
    [entry] = message.logprobs
    assert entry.chosen == pb.TokenLogprob(token_id=32, logprob=-0.5, rank=2, text=" ")
    assert [(top.token_id, top.rank) for top in entry.top] == [(65, 1), (32, 2)]


def test_cancelling_aborts_the_request_and_frees_its_id(with_service, client, until):
    async def body(served):
        for _ in range(3):  # the last delta of the aborted one must not end the next of the same id
            call = served.stub.Generate(ask(max_tokens=4000, request_id="again"))
            await call.read()
            call.cancel()
            await until(lambda: not client.running)
            await asyncio.wait_for(served.service.wait_idle(), 5)
        return await rest(served.stub.Generate(ask(max_tokens=3, request_id="again")))

    messages = with_service(body)
    assert client.aborted == ["again"] * 3
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_cancelling_a_request_that_waits_aborts_it(with_service, client, until):
    client.gate.clear()  # as if the pool were full: no token comes

    async def body(served):
        call = served.stub.Generate(ask(request_id="waiting"))
        await call.initial_metadata()
        call.cancel()
        await until(lambda: client.aborted == ["waiting"])
        await asyncio.wait_for(served.service.wait_idle(), 5)

    with_service(body)


def test_cancelling_a_request_that_is_tokenized_keeps_it_from_the_engine(with_service, client, until):
    class Waiting(AsciiTokenizer):
        is_encoding, may_go_on = threading.Event(), threading.Event()

        def encode(self, text, **options):
            self.is_encoding.set()
            assert self.may_go_on.wait(10)
            return super().encode(text, **options)

    async def body(served):
        call = served.stub.Generate(ask(request_id="a"))
        reading = asyncio.ensure_future(call.read())
        await until(Waiting.is_encoding.is_set)
        call.cancel()
        await asyncio.wait_for(served.service.wait_idle(), 5)
        Waiting.may_go_on.set()
        await asyncio.wait([reading])
        assert (await rest(served.stub.Generate(ask(max_tokens=1, request_id="a"))))[-1].usage.completion_tokens == 1

    with_service(body, tokenizer=Waiting())
    assert len(client.submitted) == 1


def test_a_client_that_vanishes_aborts_its_request(with_service, client, until):
    async def body(served):
        channel = grpc.aio.insecure_channel(served.server.endpoint)
        call = channel.unary_stream("/jaxserve.v1.GenerationService/Generate")(ask(max_tokens=4000).SerializeToString())
        await call.read()
        await channel.close(0)
        await until(lambda: client.aborted and not client.running)

    with_service(body)


def test_a_deadline_aborts_the_request(with_service, client, until):
    async def body(served):
        call = served.stub.Generate(ask(max_tokens=4000), timeout=0.1)
        code, _, _ = await refusal(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: client.aborted and not client.running)

    with_service(body)


def test_abort_ends_a_stream_and_names_what_was_running(with_service, client):
    async def body(served):
        call = served.stub.Generate(ask(max_tokens=4000, request_id="a"))
        await call.read()
        answer = await served.stub.Abort(pb.AbortRequest(request_ids=["unknown", "a", "a"]))
        assert list(answer.aborted_request_ids) == ["a"]
        last = (await rest(call))[-1]
        assert last.finish_reason == pb.FINISH_REASON_ABORT
        assert last.usage.completion_tokens >= 1
        answer = await served.stub.Abort(pb.AbortRequest(request_ids=["a"]))
        assert list(answer.aborted_request_ids) == []

    with_service(body)


def test_abort_reaches_a_request_that_is_still_tokenized(with_service, client):
    class Waiting(AsciiTokenizer):
        may_go_on = threading.Event()

        def encode(self, text, **options):
            assert self.may_go_on.wait(10)
            return super().encode(text, **options)

    async def body(served):
        call = served.stub.Generate(ask(request_id="a"))
        ids = []
        while not ids:
            ids = list((await served.stub.Abort(pb.AbortRequest(request_ids=["a"]))).aborted_request_ids)
        Waiting.may_go_on.set()
        return await rest(call)

    [message] = with_service(body, tokenizer=Waiting())
    assert message.finish_reason == pb.FINISH_REASON_ABORT
    assert message.usage == pb.Usage(prompt_tokens=5)
    assert client.submitted == []


def test_a_running_id_is_refused_and_its_owner_unharmed(with_service):
    async def body(served):
        first = served.stub.Generate(ask(max_tokens=200, request_id="a"))
        await first.read()
        code, message, _ = await refusal(served.stub.Generate(ask(request_id="a")))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "'a'" in message
        return (await rest(first))[-1]

    assert with_service(body).usage.completion_tokens == 200


def test_the_request_id_may_come_as_metadata(with_service, client):
    async def body(served):
        async for _ in served.stub.Generate(ask(max_tokens=1), metadata=(("x-request-id", "from-metadata"),)):
            pass
        call = served.stub.Generate(ask(request_id="b"), metadata=(("x-request-id", "c"),))
        code, _, violation = await refusal(call, error_details_pb2.BadRequest)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert violation.field_violations[0].field == "request_id"

    with_service(body)
    assert client.finished == ["from-metadata"]


def test_more_requests_than_permits_are_refused_with_a_hint(with_service, client):
    client.gate.clear()

    async def body(served):
        held = [served.stub.Generate(ask(max_tokens=3, request_id=f"r{i}")) for i in range(2)]
        for call in held:
            await call.initial_metadata()
        code, message, hint = await refusal(served.stub.Generate(ask()), error_details_pb2.RetryInfo)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-queued-requests" in message
        assert 0 < hint.retry_delay.ToTimedelta().total_seconds() < 60
        client.gate.set()
        for call in held:
            assert (await rest(call))[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert await rest(served.stub.Generate(ask(max_tokens=1)))  # the permits came back

    with_service(body, max_requests=2)


def test_more_prompt_tokens_than_allowed_are_refused_and_given_back(with_service, client):
    client.gate.clear()

    async def body(served):
        held = served.stub.Generate(ask("x" * 50, max_tokens=1))
        await held.initial_metadata()
        code, message, _ = await refusal(served.stub.Generate(ask("x" * 60)), error_details_pb2.RetryInfo)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-queued-tokens" in message
        client.gate.set()
        assert await rest(held)
        assert await rest(served.stub.Generate(ask("x" * 60, max_tokens=1)))

    with_service(body, max_tokens=100)


def test_a_client_that_does_not_read_is_aborted_and_told_so(with_service, client, until):
    client.text = "x" * 20_000  # fills the transport's buffers within a few hundred messages
    client.step_s = 0.0001

    async def body(served):
        slow = served.stub.Generate(ask(max_tokens=4000, request_id="slow"))
        await slow.read()
        await until(lambda: client.aborted == ["slow"], 15)
        assert len(client.submitted) == 1
        code, message, hint = await refusal(slow, error_details_pb2.RetryInfo)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "100 tokens" in message

    with_service(body, max_pending_tokens=100)


def test_a_client_that_takes_nothing_for_too_long_is_ended(with_service, client, until, caplog):
    client.text = "x" * 20_000
    client.step_s = 0.0001

    async def body(served):
        slow = served.stub.Generate(ask(max_tokens=4000, request_id="slow"))
        await slow.read()
        await until(lambda: client.aborted == ["slow"], 15)
        await asyncio.wait_for(served.service.wait_idle(), 5)  # the permit is back though the client has read nothing
        await asyncio.sleep(ABORT_TIMEOUT_S + 0.2)  # its status waits in vain
        code, message, _ = await refusal(slow)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read nothing for 0.3 s" in message

    with_service(body, write_timeout_s=0.3)
    assert "Traceback" not in caplog.text, "a client can fill the log"


def test_piled_up_deltas_come_as_one_message(with_service, client):
    async def body(served):
        call = served.stub.Generate(ask(max_tokens=300))
        client.step_s = 0.0
        await call.read()
        loop_is_busy = client.finished
        while not loop_is_busy:  # the loop does not run meanwhile, as if another stream kept it busy
            pass
        return await rest(call)

    messages = with_service(body)
    assert max(len(m.token_ids) for m in messages) > 20
    assert "".join(m.text for m in messages) in expected_text(300)


def test_a_fault_of_the_engine_ends_the_stream_and_hides_its_cause(with_service, client, caplog):
    client.fail_at = 2

    async def body(served):
        return await refusal(served.stub.Generate(ask(max_tokens=9)))

    code, message, _ = with_service(body)
    assert code is grpc.StatusCode.INTERNAL
    error_id = message.rpartition("=")[2].rstrip(".")
    assert "canary" not in message
    assert error_id in caplog.text
    assert "canary-secret" in caplog.text


def test_refusing_new_leaves_running_streams_alone(with_service):
    async def body(served):
        running = served.stub.Generate(ask(max_tokens=200))
        await running.read()
        served.service.refuse_new()
        code, _, hint = await refusal(served.stub.Generate(ask()), error_details_pb2.RetryInfo)
        assert code is grpc.StatusCode.UNAVAILABLE
        return (await rest(running))[-1]

    assert with_service(body).finish_reason == pb.FINISH_REASON_LENGTH


def test_stop_ends_running_streams_as_unavailable(with_service, client):
    async def body(served):
        running = served.stub.Generate(ask(max_tokens=4000))
        await running.read()
        assert served.service.stop() == 1
        code, message, _ = await refusal(running)
        assert code is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(served.service.wait_idle(), 5)

    with_service(body)
    assert len(client.aborted) == 1


def test_tokenize_and_detokenize_are_inverse(with_service):
    async def body(served):
        ids = (await served.stub.Tokenize(pb.TokenizeRequest(text="def fib(n):"))).token_ids
        assert list(ids) == [ord(c) for c in "def fib(n):"]
        return (await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text

    assert with_service(body) == "def fib(n):"


def test_without_a_tokenizer_text_is_refused_and_token_ids_are_not(with_service):
    async def body(served):
        for call in (
            served.stub.Generate(ask()),
            served.stub.Tokenize(pb.TokenizeRequest(text="a")),
            served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[65])),
        ):
            assert (await refusal(call))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert not (await served.stub.GetModel(pb.GetModelRequest())).has_tokenizer
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(max_tokens=1))
        assert await rest(served.stub.Generate(request))

    with_service(body, tokenizer=None)


def test_get_model_tells_the_limits(with_service):
    async def body(served):
        return await served.stub.GetModel(pb.GetModelRequest())

    model = with_service(body)
    assert (model.model, model.max_model_len, model.vocab_size, model.max_logprobs) == ("fake", 4096, 128, 5)
    assert model.has_tokenizer
    assert model.server_version


def test_another_model_is_not_found(with_service):
    async def body(served):
        code, message, _ = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", model="gpt")))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "'fake'" in message
        assert await rest(served.stub.Generate(pb.GenerateRequest(text="a", model="fake")))

    with_service(body)
