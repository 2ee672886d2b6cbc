"""From a wire request to one whose every field is known to be in range, or an error that names the field as the proto does.

Knows the proto and the limits that stand in its comments. What depends on the model (prompt length, vocabulary) is checked by
`RequestFactory`; `located` gives those errors the proto's path too.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.request import ALL_LOGPROBS, RepetitionDetection, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from serve.errors import WrongModelError, relocated
from serve.limits import check_bad_words, check_request_id, check_stops
from serve.protos.jaxserve.v1 import jaxserve_pb2

MAX_ABORT_IDS = 1024
REQUEST_ID_METADATA = "x-request-id"

_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "prompt_logprobs",
    "truncate_prompt_tokens",
)
"""Fields of the wire's SamplingParams that are named alike in ours, and tell unset from zero."""

_REPEATED = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids")

_LOGPROBS_MODES = {
    jaxserve_pb2.LOGPROBS_MODE_UNSPECIFIED: "raw",
    jaxserve_pb2.LOGPROBS_MODE_RAW: "raw",
    jaxserve_pb2.LOGPROBS_MODE_PROCESSED: "processed",
}

_SAMPLING = frozenset(jaxserve_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A validated GenerateRequest.

    Attributes:
        prompt: a text, or token ids.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    priority: int
    add_special_tokens: bool
    parse_special_tokens: bool


def generate_call(
    request: jaxserve_pb2.GenerateRequest,
    metadata: Sequence[tuple[str, str | bytes]],
    *,
    model_name: str,
    max_model_len: int,
) -> GenerateCall:
    """Validates a request.

    Raises:
        InvalidRequestError: names the field by its path in the proto.
        WrongModelError: it is meant for another model.
    """
    if request.model and request.model != model_name:
        raise WrongModelError(f"model {request.model[:80]!r} is not served here; this is {model_name!r}.")
    return GenerateCall(
        request_id=_request_id(request.request_id, metadata),
        prompt=_prompt(request, max_model_len),
        sampling=sampling_params(request.sampling),
        priority=request.priority,
        add_special_tokens=_flag(request, "add_special_tokens", True),
        parse_special_tokens=_flag(request, "parse_special_tokens", False),
    )


def sampling_params(wire: jaxserve_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take the defaults of `jaxserve.SamplingParams`."""
    if wire.logprobs_mode not in jaxserve_pb2.LogprobsMode.values():
        raise InvalidRequestError("sampling.logprobs_mode", wire.logprobs_mode, "a known LogprobsMode")
    given: dict[str, Any] = {name: getattr(wire, name) for name in _OPTIONAL if wire.HasField(name)}
    for name in ("logprobs", "prompt_logprobs"):
        if given.get(name) == ALL_LOGPROBS:
            raise InvalidRequestError(f"sampling.{name}", ALL_LOGPROBS, "at least 0: the whole vocabulary is too much here")
    lists: dict[str, Any] = {name: list(getattr(wire, name)) or None for name in _REPEATED}
    try:
        check_stops(wire.stop, wire.stop_token_ids)
        check_bad_words(wire.bad_words)
        return SamplingParams(
            **given,
            **lists,
            logit_bias={entry.token_id: entry.bias for entry in wire.logit_bias},
            logprobs_mode=_LOGPROBS_MODES[wire.logprobs_mode],
            structured_outputs=_structured_outputs(wire),
            repetition_detection=_repetition_detection(wire),
        )
    except InvalidRequestError as error:
        raise located(error) from None


def _structured_outputs(wire: jaxserve_pb2.SamplingParams) -> StructuredOutputsParams | None:
    if not wire.HasField("structured_outputs"):
        return None
    form = wire.structured_outputs
    kind = form.WhichOneof("form")
    given: dict[str, Any] = {} if kind is None else {kind: getattr(form, kind)}
    if kind == "choice":
        given["choice"] = list(form.choice.texts)
    if form.HasField("whitespace_pattern"):
        given["whitespace_pattern"] = form.whitespace_pattern
    return StructuredOutputsParams(
        **given,
        disable_any_whitespace=form.disable_any_whitespace,
        disable_additional_properties=form.disable_additional_properties,
    )


def _repetition_detection(wire: jaxserve_pb2.SamplingParams) -> RepetitionDetection | None:
    if not wire.HasField("repetition_detection"):
        return None
    detection = wire.repetition_detection
    return RepetitionDetection(
        max_pattern_size=detection.max_pattern_size,
        min_pattern_size=detection.min_pattern_size,
        min_count=detection.min_count if detection.HasField("min_count") else RepetitionDetection().min_count,
    )


def abort_ids(request: jaxserve_pb2.AbortRequest) -> list[str]:
    """The ids, at least one and each of them once, in the order given."""
    if not 1 <= len(request.request_ids) <= MAX_ABORT_IDS:
        raise InvalidRequestError("request_ids", f"{len(request.request_ids)} ids", f"1 to {MAX_ABORT_IDS} ids")
    return list(dict.fromkeys(request.request_ids))


def flag(request: jaxserve_pb2.TokenizeRequest | jaxserve_pb2.DetokenizeRequest, name: str, default: bool) -> bool:
    """An optional bool's value, or its default."""
    return getattr(request, name) if request.HasField(name) else default


def located(error: InvalidRequestError, prompt_path: str = "text") -> InvalidRequestError:
    """The same error, its parameter spelled as the field's path in the proto.

    Args:
        prompt_path: which field of the oneof `prompt` was set.
    """
    name = error.parameter
    if name in ("prompt", "prompt_token_ids"):
        path = prompt_path
    elif re.split(r"[.\[]", name)[0] in _SAMPLING:  # a field, or a part of one: logit_bias[5]
        path = f"sampling.{name}"
    else:
        return error
    return relocated(error, path)


def _prompt(request: jaxserve_pb2.GenerateRequest, max_model_len: int) -> str | tuple[int, ...]:
    which = request.WhichOneof("prompt")
    if which is None:
        raise InvalidRequestError("prompt", None, "set: exactly one of text and token_ids")
    if which == "text":
        if not request.text:
            raise InvalidRequestError("text", "", "at least one character long")
        return request.text
    ids = request.token_ids.ids
    if not 1 <= len(ids) < max_model_len:  # before the copy: 8 MB are millions of ids
        raise InvalidRequestError(
            "token_ids.ids",
            f"{len(ids)} ids",
            f"at least 1 and fewer than max_model_len ({max_model_len}) ids, so that at least one token can follow",
        )
    return tuple(ids)


def _flag(request: jaxserve_pb2.GenerateRequest, name: str, default: bool) -> bool:
    if not request.HasField(name):
        return default
    if request.WhichOneof("prompt") == "token_ids":
        raise InvalidRequestError(name, getattr(request, name), "unset with token_ids, which are taken as they are")
    return getattr(request, name)


def _request_id(field: str, metadata: Sequence[tuple[str, str | bytes]]) -> str:
    sent = [str(value) for key, value in metadata if key == REQUEST_ID_METADATA]
    if len(set(sent)) > 1 or (field and sent and sent[0] != field):
        raise InvalidRequestError("request_id", field or sent, f"equal to the {REQUEST_ID_METADATA} metadata, or alone")
    return check_request_id("request_id", field or (sent[0] if sent else uuid.uuid4().hex))
