"""One engine, one step at a time: plan, dispatch, and then wait for, commit and detokenise the step before.

Owns the order of things and each request's text stream; the scheduler owns the decisions, the runner the devices.
Single-threaded: `jaxserve.engine_thread` is the thread.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.engine_client import EngineStats
from jaxserve.errors import IntegrityError, InvalidRequestError, JaxserveError
from jaxserve.outputs import Logprob, RequestTimings, TokenDelta, TokenLogprobs
from jaxserve.plan import SampledToken, StepPlan, StepResult
from jaxserve.request import Request
from jaxserve.scheduling.scheduler import Committed, Scheduler
from jaxserve.tokenization.detokenizer import TextStream
from jaxserve.tokenization.tokenizer import Tokenizer


class StepRunner(Protocol):
    """What the engine asks of `execution.runner.Runner`."""

    def dispatch(self, plan: StepPlan) -> Any: ...

    def wait(self, handle: Any) -> StepResult: ...


@dataclass(slots=True)
class _Stream:
    """A request's way from tokens to text."""

    request: Request
    text: TextStream | None
    timings: RequestTimings
    num_generated: int = 0
    num_cached_tokens: int = 0


class Engine:
    """See the module docstring.

    Args:
        scheduler: decides.
        runner: computes.
        tokenizer: None leaves every text empty.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, tokenizer: Tokenizer | None):
        self._scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}
        self._in_flight: Any = None
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def add(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            InvalidRequestError: its id is in use.
        """
        if request.request_id in self._streams:
            raise InvalidRequestError("request_id", request.request_id, "unused by any running request")
        text = None
        if self._tokenizer is not None and request.sampling.detokenize:
            text = TextStream(
                self._tokenizer,
                request.prompt_token_ids,
                stop=tuple(request.sampling.stop or ()),
                include_stop_str_in_output=request.sampling.include_stop_str_in_output,
                skip_special_tokens=request.sampling.skip_special_tokens,
                spaces_between_special_tokens=request.sampling.spaces_between_special_tokens,
            )
        self._streams[request.request_id] = _Stream(request, text, RequestTimings(arrived=time.monotonic()))
        self._scheduler.add(request)
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """Ends requests and returns their last deltas; unknown ids are ignored."""
        deltas = []
        for request_id in request_ids:
            if request_id in self._streams:
                self._scheduler.finish(request_id)
                deltas.append(self._last_delta(self._streams[request_id], [], None, "abort", None))
        return deltas

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or bool(self._streams)

    def step(self) -> list[TokenDelta]:
        """Dispatches the next step, then returns what the one before it made."""
        plan = self._scheduler.plan()
        previous = self._in_flight
        if plan is None and previous is None and self._streams:
            raise IntegrityError(f"nothing can be computed for any of {len(self._streams)} requests: the engine would hang")
        self._in_flight = None
        if plan is not None:
            self._in_flight = self._runner.dispatch(plan)
            self._num_steps += 1
            self._note_admissions(plan)
        if previous is None:
            return []
        result = self._runner.wait(previous)
        made_s = time.monotonic()
        return [self._delta(c, made_s) for c in self._scheduler.commit(result)]

    def _note_admissions(self, plan: StepPlan) -> None:
        if plan.admissions:
            now = time.monotonic()
            for admission in plan.admissions:
                stream = self._streams[admission.request_id]
                if stream.timings.scheduled is None:
                    stream.timings.scheduled = now
                    stream.num_cached_tokens = self._scheduler.num_cached_tokens_of(admission.request_id)

    def _delta(self, committed: Committed, made_s: float) -> TokenDelta:
        stream = self._streams[committed.request_id]
        if committed.is_nonfinite:
            error = JaxserveError(f"The model gave no finite logits for request {committed.request_id}.")
            return self._last_delta(stream, [], None, "error", None, error)
        token = committed.token
        stream.num_generated += 1
        self._num_generated_tokens += 1
        if stream.timings.first_token is None:
            stream.timings.first_token = made_s
        reason, stop_reason = committed.finish_reason, committed.stop_reason
        text = self._push_text(stream, token.token_id, is_stop_token=reason == "stop")
        if stream.text is not None and stream.text.stopped_by is not None:
            self._scheduler.finish(committed.request_id)
            reason, stop_reason = "stop", stream.text.stopped_by
        logprobs = None if token.logprob is None else self._logprobs(token)
        if reason is not None:
            last = self._last_delta(stream, [token.token_id], logprobs, reason, stop_reason, text=text)
            last.made_s = made_s
            return last
        return TokenDelta(
            committed.request_id,
            text,
            [token.token_id],
            logprobs,
            num_prompt_tokens=len(stream.request.prompt_token_ids),
            num_cached_tokens=stream.num_cached_tokens,
            made_s=made_s,
        )

    def _push_text(self, stream: _Stream, token_id: int, *, is_stop_token: bool) -> str:
        """A token that ends the request is not part of its text, unless asked for."""
        if stream.text is None:
            return ""
        if is_stop_token and not stream.request.sampling.include_stop_str_in_output:
            return ""
        return stream.text.push(token_id, check_stop=stream.num_generated > stream.request.sampling.min_tokens)

    def _last_delta(
        self,
        stream: _Stream,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        finish_reason: str,
        stop_reason: str | int | None,
        error: Exception | None = None,
        text: str = "",
    ) -> TokenDelta:
        del self._streams[stream.request.request_id]
        if stream.text is not None and stream.text.stopped_by is None:
            text += stream.text.finish()
        stream.timings.finished = time.monotonic()
        return TokenDelta(
            stream.request.request_id,
            text,
            token_ids,
            logprobs,
            finish_reason,
            stop_reason,
            num_prompt_tokens=len(stream.request.prompt_token_ids),
            num_cached_tokens=stream.num_cached_tokens,
            timings=stream.timings,
            error=error,
        )

    def _logprobs(self, token: SampledToken) -> list[TokenLogprobs] | None:
        """The chosen token first, then the most likely ones; one that is both stands once."""
        if token.logprob is None or token.rank is None:
            return None
        entry: TokenLogprobs = {token.token_id: Logprob(token.logprob, token.rank, self._token_text(token.token_id))}
        for rank, (token_id, logprob) in enumerate(token.top, start=1):
            entry.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return [entry]

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages=scheduler.config.num_pages,
            num_free_pages=scheduler.num_free_pages,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def reset_prefix_cache(self) -> None:
        """Forgets what every KV page holds: the next prompts are computed anew. Running requests go on."""
        self._scheduler.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the books balance; called whenever the engine is idle."""
        self._scheduler.check_integrity()

    def request_ids(self) -> Sequence[str]:
        return tuple(self._streams)
