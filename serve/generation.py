"""What `jaxserve generate` does once it is parsed: one completion, from a server or from an engine in this process.

Knows no command line and no terminal: texts go to a callable as they come, and what is known at the end is returned.
"""

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.errors import JaxserveError
from jaxserve.outputs import TokenDelta
from jaxserve.request import RepetitionDetection, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from jaxserve.build import BuiltEngine
    from serve.protos.jaxserve.v1 import jaxserve_pb2

Write = Callable[[str], None]


class RemoteError(JaxserveError):
    """A server that cannot be reached, or answered with an error."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known when a completion has ended."""

    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


def generate_here(built: "BuiltEngine", prompt: str, sampling: SamplingParams, write: Write) -> Summary:
    """Streams a completion from an engine of this process; leaving early, as by Ctrl-C, aborts it."""
    request = built.requests.make(prompt, sampling)
    batches: queue.SimpleQueue[Sequence[TokenDelta]] = queue.SimpleQueue()
    built.client.submit(request, batches.put)
    num_tokens = 0
    try:
        while True:
            for delta in batches.get():
                if delta.error is not None:
                    raise delta.error
                num_tokens += len(delta.token_ids)
                write(delta.text)
                if delta.finish_reason is not None:
                    return Summary(delta.finish_reason, delta.num_prompt_tokens, delta.num_cached_tokens, num_tokens)
    finally:
        built.client.abort([request.request_id])  # nothing, where it has ended


def generate_remotely(
    endpoint: str, prompt: str, sampling: SamplingParams, write: Write, timeout_s: float | None = None
) -> Summary:
    """Streams a completion from a server; leaving early, as by Ctrl-C, cancels the call.

    Args:
        timeout_s: the call's deadline [s]; None is none.

    Raises:
        RemoteError: says which server, and what it answered.
    """
    import grpc

    from serve.protos.jaxserve.v1 import jaxserve_pb2, jaxserve_pb2_grpc

    request = jaxserve_pb2.GenerateRequest(text=prompt, sampling=wire_sampling(sampling))
    with grpc.insecure_channel(endpoint) as channel:
        call = jaxserve_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=timeout_s)
        try:
            message = None
            for message in call:
                write(message.text)
        except grpc.RpcError as error:
            raise RemoteError(_explain(endpoint, error.code(), error.details())) from None
        finally:
            call.cancel()
    if message is None or not message.HasField("usage"):
        raise RemoteError(f"{endpoint} ended the stream without a result; is it a jaxserve server?")
    reason = jaxserve_pb2.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_").lower()
    usage = message.usage
    return Summary(reason, usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens)


def wire_sampling(sampling: SamplingParams) -> "jaxserve_pb2.SamplingParams":
    """The same parameters as a message; the inverse of `serve.rpc.validation.sampling_params`."""
    from serve.protos.jaxserve.v1 import jaxserve_pb2

    messages: dict[str, Callable[[Any], Any]] = {
        "logit_bias": _logit_bias,
        "logprobs_mode": _logprobs_mode,
        "structured_outputs": _structured_outputs,
        "repetition_detection": _repetition_detection,
    }
    values = {
        name: messages.get(name, lambda value: value)(getattr(sampling, name))
        for name in jaxserve_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    }
    if sampling.max_tokens is None:  # unset would be 16
        values["max_tokens"] = 2**31 - 1
    return jaxserve_pb2.SamplingParams(**values)


def _logit_bias(biases: Mapping[int, float] | None) -> "list[jaxserve_pb2.TokenBias]":
    from serve.protos.jaxserve.v1 import jaxserve_pb2

    return [jaxserve_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in (biases or {}).items()]


def _logprobs_mode(mode: str | None) -> str:
    return f"LOGPROBS_MODE_{(mode or 'unspecified').upper()}"


def _structured_outputs(form: StructuredOutputsParams | None) -> "jaxserve_pb2.StructuredOutputs | None":
    if form is None:
        return None
    from serve.protos.jaxserve.v1 import jaxserve_pb2

    values = {name: getattr(form, name) for name in jaxserve_pb2.StructuredOutputs.DESCRIPTOR.fields_by_name}
    if form.choice is not None:
        values["choice"] = jaxserve_pb2.Choices(texts=form.choice)
    return jaxserve_pb2.StructuredOutputs(**values)


def _repetition_detection(detection: RepetitionDetection | None) -> "jaxserve_pb2.RepetitionDetection | None":
    if detection is None:
        return None
    from serve.protos.jaxserve.v1 import jaxserve_pb2

    return jaxserve_pb2.RepetitionDetection(**asdict(detection))


def _explain(endpoint: str, code: object, details: str | None) -> str:
    name = getattr(code, "name", str(code))
    if name == "UNAVAILABLE" and details and "onnect" in details:
        return f"{endpoint} cannot be reached. Start a server there with `jaxserve serve`, or pass another --endpoint."
    return f"{endpoint} answered {name}: {details}"
