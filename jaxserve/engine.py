"""One engine, one step at a time: plan, dispatch, and then wait for, commit and detokenise the step before.

Owns the order of things and each request's text stream; the scheduler owns the decisions, the runner the devices.
Single-threaded: `jaxserve.engine_thread` is the thread.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxserve.engine_client import EngineStats
from jaxserve.errors import ConstraintError, IntegrityError, InvalidRequestError, JaxserveError
from jaxserve.outputs import RequestTimings, TokenDelta, TokenLogprobs, token_logprobs
from jaxserve.plan import PromptScores, StepPlan, StepResult
from jaxserve.request import Request
from jaxserve.scheduling.scheduler import Committed, Scheduler
from jaxserve.structured.constraint import TokenConstraint
from jaxserve.structured.rows import restrict_rows
from jaxserve.tokenization.detokenizer import TextStream
from jaxserve.tokenization.tokenizer import Tokenizer


class StepRunner(Protocol):
    """What the engine asks of `execution.runner.Runner`."""

    def dispatch(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, allowed: Mapping[str, np.ndarray]) -> None: ...

    def wait(self, handle: Any) -> StepResult: ...


@dataclass(slots=True)
class _Stream:
    """A request's way from tokens to text."""

    request: Request
    text: TextStream | None
    timings: RequestTimings
    constraint: TokenConstraint | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_generated: int = 0
    num_cached_tokens: int = 0

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Returns them once: the first delta has them."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return taken


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
        self._streams[request.request_id] = _Stream(
            request,
            text,
            RequestTimings(arrived=time.monotonic()),
            constraint=None if request.constraint is None else request.constraint.start(request.prompt_token_ids),
            prompt_logprobs=None if request.sampling.prompt_logprobs is None else [None],
        )
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
        """Dispatches the next step, then returns what the one before it made.

        Where a constraint decides which tokens are allowed, it has to know the token before: the step's backbone runs while that
        is waited for, and its head is dispatched after.
        """
        plan = self._scheduler.plan()
        previous = self._in_flight
        if plan is None and previous is None and self._streams:
            raise IntegrityError(f"nothing can be computed for any of {len(self._streams)} requests: the engine would hang")
        self._in_flight = None
        if plan is not None:
            self._in_flight = self._runner.dispatch(plan)
            self._num_steps += 1
            self._note_admissions(plan)
        deltas = [] if previous is None else self._commit(self._runner.wait(previous))
        if plan is not None and any(s.has_constraint for s in plan.sequences):
            allowed, failures = self._allowed(plan)
            self._runner.sample(self._in_flight, allowed)
            deltas += failures
        return deltas

    def _commit(self, result: StepResult) -> list[TokenDelta]:
        for request_id, scores in result.prompt_scores.items():
            stream = self._streams.get(request_id)
            if stream is not None and stream.prompt_logprobs is not None:
                self._note_prompt_scores(stream, scores)
        made_s = time.monotonic()
        return [self._delta(c, result, made_s) for c in self._scheduler.commit(result)]

    def _note_prompt_scores(self, stream: _Stream, scores: PromptScores) -> None:
        """A prompt that is computed again, after a preemption, is scored again from its start."""
        assert stream.prompt_logprobs is not None
        del stream.prompt_logprobs[scores.start + 1 :]
        token_ids = stream.request.prompt_token_ids[scores.start + 1 :]
        stream.prompt_logprobs += [
            token_logprobs(token_id, token, self._token_text)
            for token_id, token in zip(token_ids, scores.tokens, strict=False)
        ]

    def _allowed(self, plan: StepPlan) -> tuple[dict[str, np.ndarray], list[TokenDelta]]:
        """Returns the mask words of each constrained sequence of a step; a constraint that gives up ends its request."""
        constraints = {
            s.request_id: stream.constraint
            for s in plan.sequences
            if s.has_constraint and (stream := self._streams.get(s.request_id)) and stream.constraint is not None
        }  # who has ended meanwhile is not there: its token will be dropped
        request_ids = list(constraints)
        words_RW = np.full((len(request_ids), -(-self._scheduler.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        failed = restrict_rows(dict(enumerate(constraints.values())), words_RW)
        failures = []
        for row, error in failed.items():
            self._scheduler.finish(request_ids[row])
            failures.append(self._last_delta(self._streams[request_ids[row]], [], None, "error", None, error))
        return {request_ids[row]: words_W for row, words_W in enumerate(words_RW) if row not in failed}, failures

    def _note_admissions(self, plan: StepPlan) -> None:
        if plan.admissions:
            now = time.monotonic()
            for admission in plan.admissions:
                stream = self._streams[admission.request_id]
                if stream.timings.scheduled is None:
                    stream.timings.scheduled = now
                    stream.num_cached_tokens = self._scheduler.num_cached_tokens_of(admission.request_id)

    def _delta(self, committed: Committed, result: StepResult, made_s: float) -> TokenDelta:
        stream = self._streams[committed.request_id]
        if committed.is_nonfinite:
            return self._last_delta(stream, [], None, "error", None, _without_logits(stream.request))
        token = committed.token
        if token is None:
            last = self._last_delta(stream, [], None, committed.finish_reason or "stop", None)
            last.pooled = result.pooled[committed.request_id]
            return last
        stream.num_generated += 1
        self._num_generated_tokens += 1
        if stream.timings.first_token is None:
            stream.timings.first_token = made_s
        reason, stop_reason = committed.finish_reason, committed.stop_reason
        if stream.constraint is not None and reason is None:
            try:
                stream.constraint.accept(token.token_id)
            except ConstraintError as error:
                self._scheduler.finish(committed.request_id)
                return self._last_delta(stream, [], None, "error", None, error)
        text = self._push_text(stream, token.token_id, is_stop_token=reason == "stop")
        if stream.text is not None and stream.text.stopped_by is not None:
            self._scheduler.finish(committed.request_id)
            reason, stop_reason = "stop", stream.text.stopped_by
        scores = token.scores
        logprobs = None if scores is None else [token_logprobs(token.token_id, scores, self._token_text)]
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
            prompt_logprobs=stream.take_prompt_logprobs(),
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
            prompt_logprobs=stream.take_prompt_logprobs() if error is None else None,
        )

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


def _without_logits(request: Request) -> JaxserveError:
    """Why there was no token to sample."""
    if request.sampling.extra_args:
        return JaxserveError(f"A logits processor of request {request.request_id}, or the model, left no finite logits.")
    if request.constraint is not None:
        fields = ("structured_outputs", "thinking_token_budget", "bad_words")
        asked = [name for name in fields if getattr(request.sampling, name) not in (None, ())]
        message = "no token is left: what it demands next, another field of the request forbids."
        return ConstraintError(message, " and ".join(asked) or "constraint")
    return JaxserveError(f"The model gave no finite logits for request {request.request_id}.")
