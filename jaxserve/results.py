"""From deltas to results: of one prompt with all of its completions, at the end or as a stream shows them.

Knows outputs and requests alone; who collects, and where from, is `llm`'s and `async_llm`'s.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxserve.errors import JaxserveError
from jaxserve.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    FlatLogprobs,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    RequestTimings,
    ScoringOutput,
    ScoringRequestOutput,
    TokenDelta,
    TokenLogprobs,
)
from jaxserve.request import ALL_LOGPROBS, Request, RequestOutputKind, SamplingParams


class PromptResult:
    """The result of one prompt so far.

    Args:
        request: as the caller made it.
        children: its completions' requests, in order, from `RequestFactory.fan_out`.
    """

    def __init__(self, request: Request, children: Sequence[Request]):
        self.request = request
        self._completions = {child.request_id: _Completion(index, child.sampling) for index, child in enumerate(children)}
        self._num_open = len(children)
        self._prompt_logprobs: Any = None
        self._num_cached_tokens = 0
        self._timings: RequestTimings | None = None

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(completion.whole.token_ids) for completion in self._completions.values())

    def add(
        self, deltas: Sequence[TokenDelta], kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    ) -> RequestOutput | None:
        """Takes in deltas of one completion, in their order.

        Returns:
            What a stream of this kind shows now: with CUMULATIVE all of this completion so far, with DELTA what is new of it,
            with FINAL_ONLY all completions once the last one has ended, and before that None.
        """
        completion, last = self._completions[deltas[0].request_id], deltas[-1]
        new = completion.add(deltas)
        for delta in deltas:
            if delta.prompt_logprobs is not None:
                self._prompt_logprobs = _places(
                    delta.prompt_logprobs, self.request.sampling, self.request.sampling.prompt_logprobs
                )
        if completion.whole.index == 0:  # the others find what it has computed
            self._num_cached_tokens = last.num_cached_tokens
        if last.finish_reason is not None:
            self._num_open -= 1
            self._timings = _joined(self._timings, last.timings)
        if kind is RequestOutputKind.CUMULATIVE:
            return self._output([completion.copy()])
        if kind is RequestOutputKind.DELTA:
            output = self._output([new])
            self._prompt_logprobs = None  # shown once
            return output
        return None if self._num_open else self._output([c.copy() for c in self._completions.values()])

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        request = self.request
        return RequestOutput(
            request.request_id,
            request.prompt,
            list(request.prompt_token_ids),
            self._prompt_logprobs,
            completions,
            finished=not self._num_open,
            metrics=self._timings,
            num_cached_tokens=self._num_cached_tokens,
        )


class PoolingResult:
    """The result of a prompt that asked for an embedding."""

    num_generated_tokens = 0

    def __init__(self, request: Request):
        self.request = request

    def add(self, deltas: Sequence[TokenDelta]) -> PoolingRequestOutput[PoolingOutput] | None:
        last, request = deltas[-1], self.request
        if last.finish_reason is None:
            return None
        if last.pooled is None:
            raise JaxserveError(f"{request.request_id} was ended ({last.finish_reason}) before its embedding was made.")
        token_ids = list(request.prompt_token_ids)
        output = PoolingOutput(np.asarray(last.pooled))
        return PoolingRequestOutput(request.request_id, output, token_ids, num_cached_tokens=last.num_cached_tokens)


def embedding(output: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
    """Scales to length one; nothing but zeros stays as it is."""
    vector = output.outputs.data.astype(np.float64)
    vector /= np.linalg.norm(vector) or 1.0
    own = EmbeddingOutput(vector.tolist())
    return EmbeddingRequestOutput(
        output.request_id, own, output.prompt_token_ids, num_cached_tokens=output.num_cached_tokens
    )


def similarity(one: EmbeddingRequestOutput, other: EmbeddingRequestOutput) -> ScoringRequestOutput:
    """Returns the cosine of two embeddings' angle."""
    score = min(1.0, max(-1.0, float(np.dot(one.outputs.embedding, other.outputs.embedding))))
    return ScoringRequestOutput(
        f"{one.request_id}_{other.request_id}",
        ScoringOutput(score),
        one.prompt_token_ids + other.prompt_token_ids,
        num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
    )


class _Completion:
    """One completion so far."""

    def __init__(self, index: int, sampling: SamplingParams):
        self._sampling = sampling
        self.whole = self._empty(index)

    def _empty(self, index: int) -> CompletionOutput:
        if self._sampling.logprobs is None:
            return CompletionOutput(index, "", [])
        return CompletionOutput(index, "", [], 0.0, _places((), self._sampling, self._sampling.logprobs))

    def add(self, deltas: Sequence[TokenDelta]) -> CompletionOutput:
        """Returns what is new as a completion of its own; its cumulative_logprob is that of the whole one."""
        whole, last = self.whole, deltas[-1]
        new = self._empty(whole.index)
        new.text = "".join([delta.text for delta in deltas])
        new.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        whole.text += new.text
        whole.token_ids += new.token_ids
        if whole.logprobs is not None and new.logprobs is not None:
            entries = [entry for delta in deltas for entry in delta.logprobs or ()]
            new.logprobs.extend(entries)
            whole.logprobs.extend(entries)
            chosen = (entry[i].logprob for i, entry in zip(new.token_ids, entries, strict=True))
            whole.cumulative_logprob = new.cumulative_logprob = sum(chosen, whole.cumulative_logprob or 0.0)
        for output in (whole, new):
            output.finish_reason, output.stop_reason = last.finish_reason, last.stop_reason
        return new

    def copy(self) -> CompletionOutput:
        """Returns lists of its own: what a reader holds does not grow."""
        whole = self.whole
        logprobs = None if whole.logprobs is None else whole.logprobs[:]
        return replace(whole, token_ids=whole.token_ids[:], logprobs=logprobs)


def _places(places: Sequence[TokenLogprobs | None], sampling: SamplingParams, num_logprobs: int | None) -> Any:
    """Returns them in columns where that was asked for; those of the whole vocabulary are arrays already."""
    if not sampling.flat_logprobs or num_logprobs == ALL_LOGPROBS:
        return list(places)
    flat = FlatLogprobs()
    flat.extend(places)
    return flat


def _joined(one: RequestTimings | None, other: RequestTimings | None) -> RequestTimings | None:
    """Of several completions: the earliest beginning, the latest end."""
    both = [timings for timings in (one, other) if timings is not None]

    def known(name: str) -> list[float]:
        return [time for timings in both if (time := getattr(timings, name)) is not None]

    if not both:
        return None
    first = [min(known(name), default=None) for name in ("arrived", "scheduled", "first_token")]
    return RequestTimings(*first, finished=max(known("finished"), default=None))
