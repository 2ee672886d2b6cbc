"""What a caller asks for: `SamplingParams` (checked on its own) and `Request` (checked against one model).

Plain data. Names, defaults and error conditions are vLLM's where a field exists there; `docs/compatibility.md` lists the
deviations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jaxserve.errors import InvalidRequestError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (vLLM's _SAMPLING_EPS)."""


def _check_number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequestError(name, value, allowed)


def _check_count(name: str, value: Any, low: int, allowed: str, high: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(name, value, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        n: completions a prompt; only 1 so far.
        temperature: 0 is greedy.
        top_p: smallest set of most likely tokens whose probability reaches this share.
        top_k: number of most likely tokens kept; 0 or -1 keeps all.
        min_p: least probability, relative to the most likely token's.
        seed: makes a sampled request repeatable; -1 or None draws from the engine's seed.
        stop: strings that end the completion; not part of the text unless include_stop_str_in_output.
        stop_token_ids: tokens that end the completion; kept in token_ids, not in the text.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: most tokens generated; None is up to the model's length.
        min_tokens: no end-of-sequence or stop before as many tokens.
        logprobs: k most likely tokens to report besides the chosen one; 0 for the chosen one alone, None for nothing.
        detokenize: False leaves text empty.

    Raises:
        InvalidRequestError: names the field, what was given and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if self.n != 1 or isinstance(self.n, bool):
            raise InvalidRequestError("n", self.n, "1", "Submit the prompt several times with different seeds.")
        _check_number("temperature", self.temperature, 0.0, 100.0, "a finite number in [0, 100]")
        if not isinstance(self.top_p, (int, float)) or not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("top_p", self.top_p, "in (0, 1]")
        _check_count("top_k", self.top_k, -1, "a whole number of at least -1 (0 and -1 keep all tokens)")
        _check_number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        if self.seed is not None:
            _check_count("seed", self.seed, -1, "a whole number in [-1, 2**63) (-1 is no seed)", 2**63 - 1)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens, 1, "a whole number of at least 1")
        _check_count("min_tokens", self.min_tokens, 0, "a whole number of at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, "None or a whole number of at least 0")
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError("stop", self.stop, "a string or a list of strings, none of them empty")
        if stop and not self.detokenize:
            raise InvalidRequestError("stop", self.stop, "empty when detokenize is False", "Use stop_token_ids.")
        token_ids = tuple(self.stop_token_ids or ())
        for token_id in token_ids:
            _check_count("stop_token_ids", token_id, 0, "a list of token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", token_ids)
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that has passed every check against the model: what the engine thread takes.

    Attributes:
        prompt_token_ids: at least one.
        sampling: with max_tokens decided.
        stop_token_ids: all tokens that end it: the model's end-of-sequence tokens, unless ignored, and its own.
        key: its random key, two 32-bit words; a function of its seed alone when it has one.
        priority: lower goes first.
        prompt: the text, where there was one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    key: tuple[int, int] = (0, 0)
    priority: int = 0
    prompt: str | None = None


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
