"""The checked-in stubs against the .proto, without protoc: it pins another protobuf than ours."""

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

import serve.protos
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb

DIRECTORY = Path(serve.protos.__file__).parent / "jaxserve" / "v1"
PROTO = (DIRECTORY / "jaxserve.proto").read_text()

FROZEN = """
AbortRequest.request_ids 1 repeated string
AbortResponse.aborted_request_ids 1 repeated string
DetokenizeRequest.skip_special_tokens 2 optional bool
DetokenizeRequest.token_ids 1 repeated uint32
DetokenizeResponse.text 1 string
GenerateRequest.add_special_tokens 7 optional bool
GenerateRequest.model 5 string
GenerateRequest.parse_special_tokens 8 optional bool
GenerateRequest.priority 6 int32
GenerateRequest.request_id 4 string
GenerateRequest.sampling 3 SamplingParams
GenerateRequest.text 1 string in prompt
GenerateRequest.token_ids 2 TokenIds in prompt
GenerateResponse.finish_reason 5 FinishReason
GenerateResponse.logprobs 4 repeated TokenLogprobs
GenerateResponse.request_id 1 string
GenerateResponse.stop_string 6 string in stop_reason
GenerateResponse.stop_token_id 7 uint32 in stop_reason
GenerateResponse.text 2 string
GenerateResponse.token_ids 3 repeated uint32
GenerateResponse.usage 8 Usage
GetModelResponse.dtype 7 string
GetModelResponse.eos_token_ids 5 repeated uint32
GetModelResponse.has_tokenizer 6 bool
GetModelResponse.max_logprobs 4 uint32
GetModelResponse.max_model_len 2 uint32
GetModelResponse.max_num_seqs 8 uint32
GetModelResponse.model 1 string
GetModelResponse.server_version 9 string
GetModelResponse.vocab_size 3 uint32
SamplingParams.detokenize 15 optional bool
SamplingParams.ignore_eos 8 optional bool
SamplingParams.include_stop_str_in_output 14 optional bool
SamplingParams.logprobs 11 optional int32
SamplingParams.logprobs_mode 12 LogprobsMode
SamplingParams.max_tokens 9 optional int32
SamplingParams.min_p 4 optional double
SamplingParams.min_tokens 10 optional int32
SamplingParams.seed 5 optional int64
SamplingParams.skip_special_tokens 13 optional bool
SamplingParams.stop 6 repeated string
SamplingParams.stop_token_ids 7 repeated uint32
SamplingParams.temperature 1 optional double
SamplingParams.top_k 3 optional int32
SamplingParams.top_p 2 optional double
TokenIds.ids 1 repeated uint32
TokenLogprob.logprob 2 float
TokenLogprob.rank 3 uint32
TokenLogprob.text 4 string
TokenLogprob.token_id 1 uint32
TokenLogprobs.chosen 1 TokenLogprob
TokenLogprobs.top 2 repeated TokenLogprob
TokenizeRequest.add_special_tokens 2 optional bool
TokenizeRequest.parse_special_tokens 3 optional bool
TokenizeRequest.text 1 string
TokenizeResponse.token_ids 1 repeated uint32
Usage.cached_prompt_tokens 3 uint32
Usage.completion_tokens 2 uint32
Usage.prompt_tokens 1 uint32
FinishReason.FINISH_REASON_ABORT 3
FinishReason.FINISH_REASON_LENGTH 2
FinishReason.FINISH_REASON_STOP 1
FinishReason.FINISH_REASON_UNSPECIFIED 0
LogprobsMode.LOGPROBS_MODE_RAW 1
LogprobsMode.LOGPROBS_MODE_UNSPECIFIED 0
rpc Abort AbortRequest AbortResponse
rpc Detokenize DetokenizeRequest DetokenizeResponse
rpc Generate GenerateRequest stream GenerateResponse
rpc GetModel GetModelRequest GetModelResponse
rpc Tokenize TokenizeRequest TokenizeResponse
""".split("\n")[1:-1]
"""v1 as it was frozen on 2026-11-23 (ADR 0009). Lines may be added; none may change."""

KINDS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("double", "float", "int32", "int64", "uint32", "bool", "string")
}


def in_stubs():
    lines = []
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            kind = KINDS.get(field.type) or (field.message_type or field.enum_type).name
            oneof = field.containing_oneof
            optional = oneof is not None and oneof.name.startswith("_")
            label = "repeated " if field.is_repeated else "optional " if optional else ""
            place = f" in {oneof.name}" if oneof is not None and not optional else ""
            lines.append(f"{message.name}.{field.name} {field.number} {label}{kind}{place}")
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        lines += [f"{enum.name}.{value.name} {value.number}" for value in enum.values]
    for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods:
        stream = "stream " if method.server_streaming else ""
        lines.append(f"rpc {method.name} {method.input_type.name} {stream}{method.output_type.name}")
    return lines


def in_proto():
    """The same lines read from the text of the .proto."""
    lines, places = [], []
    for line in PROTO.splitlines():
        code = line.partition("//")[0].strip()
        if match := re.fullmatch(r"(message|enum|service|oneof) (\w+) \{(\})?", code):
            if not match[3]:
                places.append((match[1], match[2]))
        elif code == "}":
            places.pop()
        elif match := re.fullmatch(r"rpc (\w+)\((\w+)\) returns \((?:(stream) )?(\w+)\);", code):
            lines.append(" ".join(["rpc", match[1], match[2], *([match[3]] if match[3] else []), match[4]]))
        elif match := re.fullmatch(r"((?:repeated |optional )?)(\w+) (\w+) = (\d+);", code):
            message = next(name for kind, name in reversed(places) if kind == "message")
            place = f" in {places[-1][1]}" if places[-1][0] == "oneof" else ""
            lines.append(f"{message}.{match[3]} {match[4]} {match[1]}{match[2]}{place}")
        elif match := re.fullmatch(r"(\w+) = (\d+);", code):
            lines.append(f"{places[-1][1]}.{match[1]} {match[2]}")
        else:
            assert not code or code.startswith(("syntax", "package")), code
    return lines


def test_the_stubs_are_those_of_the_proto():
    """Red after an edit of the .proto without `make protos`."""
    assert sorted(in_stubs()) == sorted(in_proto())
    assert f"package {pb.DESCRIPTOR.package};" in PROTO


def test_v1_is_frozen():
    assert set(FROZEN) <= set(in_stubs())


def test_the_comments_of_the_service_are_in_its_stub():
    stub = " ".join((DIRECTORY / "jaxserve_pb2_grpc.py").read_text().split())
    service = PROTO[PROTO.index("service GenerationService {") : PROTO.index("\n}\n")]
    comments = re.findall(r"// (.+)", service)
    assert len(comments) > 5
    for comment in comments:
        assert " ".join(comment.split()) in stub


@pytest.mark.parametrize("suffix", ["pb2.py", "pb2.pyi", "pb2_grpc.py"])
def test_the_stubs_name_every_message(suffix):
    text = (DIRECTORY / f"jaxserve_{suffix}").read_text()
    wanted = pb.DESCRIPTOR.services_by_name if suffix == "pb2_grpc.py" else pb.DESCRIPTOR.message_types_by_name
    for name in wanted:
        assert name in text


def test_the_stubs_load_on_the_oldest_protobuf_that_we_support():
    """A runtime refuses stubs that are newer than itself; ours may be as old as 6.33.5."""
    version = re.search(r"# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", (DIRECTORY / "jaxserve_pb2.py").read_text())
    assert tuple(map(int, version.groups())) <= (6, 33, 5)
    grpc_version = re.search(r"GRPC_GENERATED_VERSION = '(\d+)\.(\d+)", (DIRECTORY / "jaxserve_pb2_grpc.py").read_text())
    assert tuple(map(int, grpc_version.groups())) <= (1, 76)


def test_every_field_and_value_has_a_comment():
    lines = [line.strip() for line in PROTO.splitlines()]
    declared = [i for i, line in enumerate(lines) if re.search(r" = \d+;$", line)]
    assert len(declared) == len(in_proto()) - 5
    assert [lines[i] for i in declared if not lines[i - 1].startswith("//")] == []
