"""What a request gives back: the public results, and the deltas they are made from.

Plain data; knows nothing of how a token was made.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """One token's log-probability under the raw distribution, before temperature and truncation.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: the token's own text.
    """

    logprob: float
    rank: int
    decoded_token: str | None


TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class RequestTimings:
    """When a request passed each place [s, time.monotonic]; None where it has not been.

    Attributes:
        arrived: submitted to the engine.
        scheduled: in a step for the first time.
        first_token: its first token was read back.
        finished: its last token was delivered.
    """

    arrived: float | None = None
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class TokenDelta:
    """What one step added to one request. The last one of a request, and only it, has a finish_reason.

    Attributes:
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: new tokens; may be empty in the last delta.
        logprobs: an entry a token of token_ids, when asked for.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: the stop string or stop token id that ended it; None for the end-of-sequence token.
        error: the exception, when finish_reason is "error".
        made_s: when its token was read back [s, time.monotonic]; None without one.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None
    error: Exception | None = None
    made_s: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt; fields as in vLLM.

    Attributes:
        cumulative_logprob: sum over the chosen tokens; None when logprobs were not asked for.
        logprobs: one `{token id: Logprob}` a generated token; None when not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """The whole result of one prompt; fields as in vLLM.

    Attributes:
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestTimings | None = None
