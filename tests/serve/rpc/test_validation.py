import asyncio
import dataclasses
import math
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.errors import InvalidRequestError
from jaxserve.request import RepetitionDetection, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.generation import wire_sampling
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.rpc import validation, wire

BAD_SAMPLING = [
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("top_p", math.nan),
    ("top_p", 0.0),
    ("top_p", -math.inf),
    ("top_p", 1.0001),
    ("top_k", -2),
    ("min_p", math.nan),
    ("min_p", 1.5),
    ("seed", -2),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("min_tokens", 17),  # more than the default of max_tokens
    ("logprobs", -1),
    ("logprobs", 6),  # more than the server's max_logprobs
    ("logprobs_mode", 7),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", ["x" * 257]),
    ("stop_token_ids", [128]),
    ("stop_token_ids", list(range(129))),
    ("stop_token_ids", [2**32 - 1]),
    ("presence_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("repetition_penalty", 0.0),
    ("allowed_token_ids", [128]),
    ("logit_bias", [pb.TokenBias(token_id=128, bias=1.0)]),
    ("logit_bias", [pb.TokenBias(token_id=i) for i in range(1025)]),
    ("bad_words", [""]),
    ("bad_words", ["ü"]),
    ("bad_words", ["x" * 257]),
    ("bad_words", [f"{i}" for i in range(129)]),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 6),
    ("logprob_token_ids", [128]),
    ("logprob_token_ids", list(range(129))),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", 4096),
    ("structured_outputs", pb.StructuredOutputs()),
    ("structured_outputs", pb.StructuredOutputs(json_object=True)),  # this server has no compiler
]

BAD_PARTS = [
    ("logit_bias[5]", "logit_bias", [pb.TokenBias(token_id=5, bias=math.nan)]),
    ("repetition_detection.min_count", "repetition_detection", pb.RepetitionDetection(max_pattern_size=5, min_count=1)),
    ("repetition_detection.max_pattern_size", "repetition_detection", pb.RepetitionDetection(max_pattern_size=-1)),
    ("structured_outputs.choice", "structured_outputs", pb.StructuredOutputs(choice=pb.Choices())),
]

BAD_REQUESTS = [
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("text", pb.GenerateRequest(text="x" * 4096)),
    ("text", pb.GenerateRequest(text="x" * (64 * 4096 + 1))),
    ("text", pb.GenerateRequest(text="not ascii: ü")),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[128]))),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1]))),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 4096))),
    ("add_special_tokens", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=False)),
    ("parse_special_tokens", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), parse_special_tokens=True)),
    ("request_id", pb.GenerateRequest(text="a", request_id="no spaces")),
    ("request_id", pb.GenerateRequest(text="a", request_id="x" * 129)),
    ("request_id", pb.GenerateRequest(text="a", request_id="line\nbreak")),
    *[
        (f"sampling.{name}", pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**{name: value})))
        for name, value in BAD_SAMPLING
    ],
    *[
        (f"sampling.{path}", pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**{name: value})))
        for path, name, value in BAD_PARTS
    ],
]


FORMS = {
    "json": '{"type": "object"}',
    "regex": "a+",
    "choice": ["a", "b"],
    "grammar": 'root ::= "a"',
    "json_object": True,
    "structural_tag": '{"structures": [], "triggers": []}',
}


async def violation_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    bad = error_details_pb2.BadRequest()
    [detail] = (await rpc_status.aio.from_call(call)).details
    assert detail.Unpack(bad)
    [violation] = bad.field_violations
    assert violation.description == caught.value.details()
    return violation


def test_every_bad_field_is_named_by_its_path(with_service, client):
    async def body(served):
        for path, request in BAD_REQUESTS:
            violation = await violation_of(served.stub.Generate(request))
            assert violation.field == path, request
            assert violation.description.startswith(f"{path} must be "), violation

    with_service(body, max_requests=1)  # each refusal gives its permit back, too
    assert client.submitted == []


def test_bad_calls_of_the_other_methods_name_the_field(with_service):
    async def body(served):
        stub = served.stub
        for path, call in [
            ("request_ids", stub.Abort(pb.AbortRequest())),
            ("request_ids", stub.Abort(pb.AbortRequest(request_ids=["a"] * 1025))),
            ("text", stub.Tokenize(pb.TokenizeRequest(text="x" * (64 * 4096 + 1)))),
            ("text", stub.Tokenize(pb.TokenizeRequest(text="ü"))),
            ("token_ids", stub.Detokenize(pb.DetokenizeRequest(token_ids=[128]))),
            ("token_ids", stub.Detokenize(pb.DetokenizeRequest(token_ids=[1] * (64 * 4096 + 1)))),
        ]:
            assert (await violation_of(call)).field == path

    with_service(body)


@pytest.mark.parametrize("method", ["Generate", "Abort", "Tokenize", "Detokenize"])
@pytest.mark.parametrize(
    "data",
    [b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\x0a\x03abc"[:4], b"\xff" * 20, b"\x1a" * 5000],
    ids=["cut off", "not UTF-8", "short", "bad tag", "nonsense"],
)
def test_bytes_that_do_not_parse_are_an_invalid_argument(with_service, method, data):
    """Field 1, where it is a text, is named; what cannot be told apart names the message."""
    is_text = method != "Detokenize" and data[:1] == b"\x0a"
    field = {"Abort": "request_ids"}.get(method, "text") if is_text else ""

    async def body(served):
        make = served.channel.unary_stream if method == "Generate" else served.channel.unary_unary
        call = make(f"/jaxserve.v1.GenerationService/{method}")(data)
        violation = await violation_of(call)
        assert violation.field == field
        assert (field or f"jaxserve.v1.{method}Request") in violation.description

    with_service(body)


@pytest.mark.parametrize(
    ("method", "message", "field"),
    [
        ("Generate", pb.GenerateRequest(text="x" * (384 * 4096 + 1)), "text"),
        ("Generate", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (384 * 4096 + 1))), "token_ids"),
        ("Generate", pb.GenerateRequest(text="a", sampling=pb.SamplingParams(stop=["x" * 10**6])), "sampling"),
        ("Generate", pb.GenerateRequest(text="a", sampling=pb.SamplingParams(stop=[""] * 10**6)), "sampling"),
        ("Abort", pb.AbortRequest(request_ids=["x" * 10**6]), "request_ids"),
        ("Abort", pb.AbortRequest(request_ids=[""] * 10**6), "request_ids"),
        ("Tokenize", pb.TokenizeRequest(text="x" * (384 * 4096 + 1)), "text"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1] * (384 * 4096 + 1)), "token_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_that_is_too_large_is_refused_unparsed(with_service, method, message, field, monkeypatch):
    """Because parsing it may take many times its size in memory: a million empty strings have 16 bytes each."""

    async def body(served):
        make = served.channel.unary_stream if method == "Generate" else served.channel.unary_unary
        violation = await violation_of(make(f"/jaxserve.v1.GenerationService/{method}")(data))
        assert violation.field == field
        assert violation.description.startswith(f"{field} must be at most ")

    data = message.SerializeToString()
    monkeypatch.setattr(wire, "fault", pytest.fail)  # by its size, and not because it did not parse
    with_service(body)


def test_the_largest_legal_messages_are_parsed(with_service):
    async def body(served):
        stub = served.stub
        aborted = await stub.Abort(pb.AbortRequest(request_ids=[f"{i:0128}" for i in range(1024)]))
        assert not aborted.aborted_request_ids
        text = (await stub.Detokenize(pb.DetokenizeRequest(token_ids=[65] * (64 * 4096)))).text
        assert text == "A" * (64 * 4096)
        assert (await stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids == [65] * (64 * 4096)
        sampling = pb.SamplingParams(max_tokens=1, stop=["\N{OLD PERSIAN SIGN A}" * 256] * 16, stop_token_ids=[127] * 128)
        call = served.stub.Generate(pb.GenerateRequest(text="x" * 4095, sampling=sampling))
        assert (await call.read()).finish_reason

    with_service(body)


def test_text_that_is_not_utf8_is_named_wherever_it_stands(with_service):
    async def body(served):
        inner = b"\x09" + bytes(8) + b"\x32\x01a" + b"\x32\x03b\xedc"  # temperature, a good and a bad stop string
        data = b"\x0a\x01a\x30\x05\x1a" + bytes([len(inner)]) + inner
        violation = await violation_of(served.channel.unary_stream("/jaxserve.v1.GenerationService/Generate")(data))
        assert (violation.field, violation.description) == (
            "sampling.stop",
            "sampling.stop must be UTF-8, got 'the byte 0xed at 1'.",
        )

    with_service(body)


def test_values_at_the_edge_of_their_range_are_taken():
    for values in (
        {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 1.0, "seed": 2**63 - 1, "max_tokens": 1, "logprobs": 0},
        {"temperature": 100.0, "top_p": 1e-9, "top_k": 2**31 - 1, "min_p": 0.0, "seed": 0, "max_tokens": 2**31 - 1},
        {"stop": ["x" * 256] * 16, "stop_token_ids": list(range(128)), "min_tokens": 16, "logprobs_mode": 1},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 1e6, "truncate_prompt_tokens": -1},
        {"prompt_logprobs": 0, "logprob_token_ids": list(range(128)), "bad_words": ["x" * 256], "allowed_token_ids": [0]},
    ):
        sampling = validation.sampling_params(pb.SamplingParams(**values))
        for name, value in values.items():
            if name != "logprobs_mode":
                assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value)


def test_wire_and_python_parameters_are_inverse():
    for sampling in (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9, top_k=3, min_p=0.1, seed=9, stop=["a", "b"], max_tokens=None),
        SamplingParams(presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={5: 1.5, 0: -100}),
        SamplingParams(allowed_token_ids=[5, 6], bad_words=["a", "b"], prompt_logprobs=3, truncate_prompt_tokens=7),
        SamplingParams(logprob_token_ids=[5, 6], logprobs_mode="processed"),
        SamplingParams(repetition_detection=RepetitionDetection(max_pattern_size=5, min_pattern_size=2, min_count=3)),
        *(SamplingParams(structured_outputs=StructuredOutputsParams(**{kind: value})) for kind, value in FORMS.items()),
        SamplingParams(structured_outputs=StructuredOutputsParams(json="{}", whitespace_pattern=" ?")),
        SamplingParams(structured_outputs=StructuredOutputsParams(json="{}", disable_any_whitespace=True)),
        SamplingParams(structured_outputs=StructuredOutputsParams(json="{}", disable_additional_properties=True)),
        SamplingParams(logprobs=0, ignore_eos=True, min_tokens=2, stop_token_ids=[1], skip_special_tokens=False),
    ):
        there = wire_sampling(sampling)
        back = validation.sampling_params(pb.SamplingParams.FromString(there.SerializeToString()))
        # On the wire an unset max_tokens is 16: "no limit" is the largest number. And an unset mode is raw.
        max_tokens = 2**31 - 1 if sampling.max_tokens is None else sampling.max_tokens
        assert back == dataclasses.replace(sampling, max_tokens=max_tokens, logprobs_mode=sampling.logprobs_mode or "raw")


def test_every_wire_field_reaches_the_sampling_params():
    """A field that is added to the proto and forgotten in validation.py fails here."""
    own = {"logit_bias", "logprobs_mode", "structured_outputs", "repetition_detection"}
    handled = {*validation._OPTIONAL, *validation._REPEATED, *own}
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == handled


def test_a_request_without_an_id_gets_one_of_its_own():
    ids = {
        validation.generate_call(pb.GenerateRequest(text="a"), (), model_name="m", max_model_len=9).request_id
        for _ in range(3)
    }
    assert len(ids) == 3


def test_located_leaves_other_parameters_alone():
    error = InvalidRequestError("request_id", "x", "something")
    assert validation.located(error).parameter == "request_id"


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
def test_the_loop_goes_on_while_a_text_is_tokenized(with_service, method):
    class Waiting(AsciiTokenizer):
        """Its encode ends when another call has been answered."""

        answered = threading.Event()

        def encode(self, text, **options):
            assert self.answered.wait(10)
            return super().encode(text, **options)

    async def body(served):
        if method == "Generate":
            call = served.stub.Generate(pb.GenerateRequest(text="a")).read()
        else:
            call = served.stub.Tokenize(pb.TokenizeRequest(text="a"))
        pending = asyncio.ensure_future(call)
        await asyncio.sleep(0.05)
        await served.stub.GetModel(pb.GetModelRequest(), timeout=5)
        Waiting.answered.set()
        return await pending

    assert with_service(body, tokenizer=Waiting()).token_ids
