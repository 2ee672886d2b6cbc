"""What an endpoint of the OpenAI dialect makes of a request: a validated call, and a choice in the making for each prompt.

Plain data and two interfaces; `completions` and `chat` implement them, `generation` runs them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from jaxserve.outputs import Logprob, TokenDelta, TokenLogprobs
from jaxserve.request import Request
from jaxserve.request_factory import RequestFactory
from serve.http.fields import StreamOptions


class Choice(Protocol):
    """One prompt's answer. Deltas come in order; the last has a finish_reason."""

    def chunks(self, deltas: Sequence[TokenDelta]) -> list[dict[str, Any]]:
        """The `choices` of the next chunks, one each."""
        ...

    def whole(self, deltas: Sequence[TokenDelta]) -> dict[str, Any]:
        """The choice of an answer that comes at once."""
        ...


@dataclass(slots=True)
class Usage:
    """Tokens of a call so far, over all of its prompts."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def add(self, deltas: Sequence[TokenDelta], *, is_first: bool) -> None:
        """Counts new tokens; the prompt's, and what of it was cached, once for the n completions that share it."""
        self.num_completion_tokens += sum(len(delta.token_ids) for delta in deltas)
        if is_first and deltas[-1].finish_reason is not None:
            self.num_cached_tokens += deltas[-1].num_cached_tokens

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True)
class Call:
    """A validated call.

    Attributes:
        call_id: what the answer's `id` says.
        kind, chunk_kind: what its `object` says, whole and streamed.
        makers: one a completion, those of one prompt in a row: from the engine's id for it to the request; for a thread.
        new_choice: from a completion's index and its request to its choice.
        num_completions: of each prompt: `n`.
        shown_once: fields of the first choice that belong to the whole answer.
    """

    call_id: str
    kind: str
    chunk_kind: str
    model: str
    stream: StreamOptions
    makers: Sequence[Callable[[str], Request]]
    new_choice: Callable[[int, Request], Choice]
    num_completions: int = 1
    shown_once: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def request_ids(self) -> list[str]:
        """The engine's name of each completion's request."""
        return [self.call_id] if len(self.makers) == 1 else [f"{self.call_id}-{n}" for n in range(len(self.makers))]

    def shares_prompt(self, index: int) -> bool:
        """Whether a completion's prompt is that of the one before, and counts there."""
        return index % self.num_completions != 0

    def chunk(self, choices: list[dict[str, Any]], *, is_last: bool = False) -> dict[str, Any]:
        chunk = self._object(self.chunk_kind, choices)
        if is_last or self.stream.has_usage_always:
            chunk["usage"] = self.usage.json()
        elif self.stream.includes_usage:
            chunk["usage"] = None
        return chunk

    def answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        once = {name: choices[0].pop(name) for name in self.shown_once}
        return self._object(self.kind, choices) | {"usage": self.usage.json()} | once

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.call_id, "object": kind, "created": self.created_s, "model": self.model, "choices": choices}


def fan_out(
    make: Callable[[str], Request], requests: RequestFactory, num_completions: int, *, shares_prompt_logprobs: bool
) -> list[Callable[[str], Request]]:
    """Returns a maker for each completion of one prompt. The first one that is called makes the prompt's request.

    Args:
        shares_prompt_logprobs: the first completion has those of the prompt for all of them.
    """
    if num_completions == 1:
        return [make]
    children: list[Request] = []

    def make_child(index: int, request_id: str) -> Request:
        if not children:
            children.extend(requests.fan_out(make(request_id), shares_prompt_logprobs=shares_prompt_logprobs))
        return replace(children[index], request_id=request_id)

    return [partial(make_child, index) for index in range(num_completions)]


def joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Deltas of one request, in their order, as one."""
    last = deltas[-1]
    return TokenDelta(
        last.request_id,
        "".join([delta.text for delta in deltas]),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [entries for delta in deltas for entries in delta.logprobs or ()],
        last.finish_reason,
        last.stop_reason,
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
    )


def shown_token(token_id: int, entry: Logprob, as_token_id: bool) -> str:
    """A token's text, or its id as vLLM writes it where texts would be ambiguous."""
    return f"token_id:{token_id}" if as_token_id else entry.decoded_token or ""


def shown_prompt_logprobs(places: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: an object a prompt token, by token id."""
    if places is None:
        return None
    return [
        None
        if entries is None
        else {
            str(token_id): {
                "logprob": shown_logprob(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in entries.items()
        }
        for entries in places
    ]


def shown_logprob(logprob: float) -> float:
    """JSON has no minus infinity; -9999 is what OpenAI says for a token that is next to impossible."""
    return max(logprob, -9999.0)
