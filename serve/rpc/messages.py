"""From what the engine made to the message that carries it. Knows both formats; keeps nothing."""

from collections.abc import Sequence

from jaxserve.errors import JaxserveError
from jaxserve.outputs import Logprob, TokenDelta, TokenLogprobs
from jaxserve.request import Request
from serve.logprobs import most_likely
from serve.protos.jaxserve.v1 import jaxserve_pb2

_FINISH_REASONS = {
    "stop": jaxserve_pb2.FINISH_REASON_STOP,
    "length": jaxserve_pb2.FINISH_REASON_LENGTH,
    "abort": jaxserve_pb2.FINISH_REASON_ABORT,
    "repetition": jaxserve_pb2.FINISH_REASON_REPETITION,
}


def generate_response(deltas: Sequence[TokenDelta], request: Request) -> jaxserve_pb2.GenerateResponse:
    """Coalesces deltas of one request, in their order, into one message; usage is the caller's to add.

    Args:
        deltas: at least one; only the last may have a finish_reason.
    """
    sampling = request.sampling
    num_logprobs = sampling.logprobs
    message = jaxserve_pb2.GenerateResponse(text="".join([delta.text for delta in deltas]))
    for delta in deltas:
        message.token_ids.extend(delta.token_ids)
        if num_logprobs is not None and delta.logprobs is not None:
            for token_id, entries in zip(delta.token_ids, delta.logprobs, strict=True):
                picked = sampling.logprob_token_ids
                message.logprobs.append(token_logprobs(token_id, entries, num_logprobs, picked))
        if delta.prompt_logprobs is not None:
            places = zip(request.prompt_token_ids[1:], delta.prompt_logprobs[1:], strict=True)
            message.prompt_logprobs.extend(
                token_logprobs(token_id, entries or {}, sampling.prompt_logprobs or 0) for token_id, entries in places
            )
    last = deltas[-1]
    if last.finish_reason is not None:
        if last.finish_reason not in _FINISH_REASONS:
            raise JaxserveError(f"the engine ended {last.request_id} with {last.finish_reason!r} and no error")
        message.finish_reason = _FINISH_REASONS[last.finish_reason]
        if isinstance(last.stop_reason, str):
            message.stop_string = last.stop_reason
        elif last.stop_reason is not None:
            message.stop_token_id = last.stop_reason
    return message


def usage(last: TokenDelta, num_completion_tokens: int) -> jaxserve_pb2.Usage:
    return jaxserve_pb2.Usage(
        prompt_tokens=last.num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        cached_prompt_tokens=last.num_cached_tokens,
    )


def token_logprobs(
    token_id: int, entries: TokenLogprobs, num_logprobs: int, picked: Sequence[int] | None = None
) -> jaxserve_pb2.TokenLogprobs:
    """The chosen token, and the num_logprobs most likely ones by rank, or those that were asked for in their order."""
    top = most_likely(entries, num_logprobs) if picked is None else [(i, entries[i]) for i in picked]
    return jaxserve_pb2.TokenLogprobs(
        chosen=_token_logprob(token_id, entries[token_id]), top=[_token_logprob(*item) for item in top]
    )


def _token_logprob(token_id: int, entry: Logprob) -> jaxserve_pb2.TokenLogprob:
    return jaxserve_pb2.TokenLogprob(
        token_id=token_id, logprob=entry.logprob, rank=entry.rank, text=entry.decoded_token or ""
    )
