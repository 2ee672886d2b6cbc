"""What a request gives back: the public results, and the deltas they are made from.

Plain data; knows nothing of how a token was made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np


class Logprob(NamedTuple):
    """One token's log-probability, raw or processed as was asked for.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: the token's own text.
    """

    logprob: float
    rank: int
    decoded_token: str | None


TokenLogprobs = Mapping[int, Logprob]
"""At one place of a text, by token id."""

Pooled = TypeVar("Pooled")

TokenText = Callable[[int], str | None]


class AllLogprobs(Mapping[int, Logprob]):
    """The whole vocabulary's log-probabilities at one place; an array that reads like a dict.

    Attributes:
        logprobs_V: float32, indexed by token id.
    """

    __slots__ = ("_text_of", "logprobs_V")

    def __init__(self, logprobs_V: np.ndarray, text_of: TokenText):
        self.logprobs_V = logprobs_V
        self._text_of = text_of

    def __getitem__(self, token_id: int) -> Logprob:
        if not 0 <= token_id < len(self.logprobs_V):
            raise KeyError(token_id)
        logprob = self.logprobs_V[token_id]
        return Logprob(float(logprob), 1 + int(np.count_nonzero(self.logprobs_V > logprob)), self._text_of(token_id))

    def __len__(self) -> int:
        return len(self.logprobs_V)

    def __iter__(self) -> Iterator[int]:
        """Most likely first."""
        return iter(np.argsort(-self.logprobs_V, kind="stable").tolist())


@dataclass(slots=True)
class FlatLogprobs(Sequence[TokenLogprobs | None]):
    """The log-probabilities of many places in columns; reads like a list of dicts. Columns as in vLLM.

    Place i has the entries [start_indices[i], end_indices[i]) of the other columns, best known first; a place without any,
    such as a prompt's first, reads as None.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, entries: TokenLogprobs | None) -> None:
        """Adds one place."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (entries or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, places: Iterable[TokenLogprobs | None]) -> None:
        for entries in places:
            self.append(entries)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, place: slice) -> "FlatLogprobs": ...

    def __getitem__(self, place: int | slice) -> "TokenLogprobs | FlatLogprobs | None":
        if isinstance(place, slice):
            part = FlatLogprobs()
            part.extend(self[i] for i in range(*place.indices(len(self))))
            return part
        entries = range(self.start_indices[place], self.end_indices[place])
        return {self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i]) for i in entries} or None


Logprobs = list[TokenLogprobs] | FlatLogprobs
PromptLogprobs = list[TokenLogprobs | None] | FlatLogprobs


class TokenScores(NamedTuple):
    """What the device says of the probability of one token at one place.

    Attributes:
        logprob: of the token.
        rank: 1 for the most likely.
        top_ids, top_logprobs: the most likely tokens, best first, or those that were asked for; None beside `all_logprobs`.
        top_ranks: of `top_ids`, where they are not 1, 2, 3, ...
        all_logprobs: float32 [V], of the whole vocabulary.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    top_ranks: tuple[int, ...] | None = None
    all_logprobs: Any = None


def token_logprobs(token_id: int, scores: TokenScores, text_of: TokenText) -> TokenLogprobs:
    """Returns the token itself first, then the most likely ones or those asked for; one that is both stands once."""
    if scores.all_logprobs is not None:
        return AllLogprobs(scores.all_logprobs, text_of)
    entry = {token_id: Logprob(scores.logprob, scores.rank, text_of(token_id))}
    ranks = scores.top_ranks or range(1, len(scores.top_ids) + 1)
    for other, logprob, rank in zip(scores.top_ids, scores.top_logprobs, ranks, strict=True):
        if other not in entry:
            entry[other] = Logprob(logprob, rank, text_of(other))
    return entry


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
        finish_reason: "stop", "length", "repetition", "abort" or "error".
        stop_reason: the stop string or stop token id that ended it; None for the end-of-sequence token.
        error: the exception, when finish_reason is "error".
        made_s: when its token was read back [s, time.monotonic]; None without one.
        prompt_logprobs: an entry a token of the prompt, the first None; once, in the first delta, when asked for.
        pooled: float32 [D], the last delta of a request for an embedding.
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
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: Any = None


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
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The result of one prompt, whole or so far; fields as in vLLM.

    Attributes:
        prompt_logprobs: one `{token id: Logprob}` a prompt token, None for the first one; None when not asked for.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestTimings | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class PoolingOutput:
    """What pooling left of the prompt's hidden states: float32 [D]."""

    data: np.ndarray


@dataclass(slots=True)
class EmbeddingOutput:
    """A vector of length one."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """How alike two texts are: the cosine of their embeddings' angle, in [-1, 1]."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Pooled]):
    """The result of a prompt that asked for no completion; fields as in vLLM."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]
