"""What a caller asks for: `SamplingParams` (checked on its own) and `Request` (checked against one model).

Plain data. Names, defaults and error conditions are vLLM's where a field exists there; `docs/compatibility.md` lists the
deviations.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from math import ulp
from numbers import Integral, Real
from typing import Any

from jaxserve.errors import InvalidRequestError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (vLLM's _SAMPLING_EPS)."""


def whole_number(name: str, value: Any, low: int, bits: int = 31, note: str = "") -> int:
    """Returns an int or a numpy integer as an int; a bool or a float is none.

    Raises:
        InvalidRequestError: it is not in [low, 2**bits).
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) < 2**bits:
        raise InvalidRequestError(name, value, f"a whole number in [{low}, 2**{bits}){note}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, allowed: str) -> float:
    """Returns a Python or numpy number in [low, high] as a float; NaN is in no range."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond every float
        number = math.nan
    if not low <= number <= high:
        raise InvalidRequestError(name, value, allowed)
    return number


def _listed(name: str, value: Any, allowed: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InvalidRequestError(name, value, allowed)
    return tuple(value)


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
        put = partial(object.__setattr__, self)  # what is put is a plain int, float or tuple, whatever was given
        put("n", whole_number("n", self.n, 1))
        if self.n > 1:
            raise InvalidRequestError("n", self.n, "1", "Submit the prompt several times with different seeds.")
        put("temperature", _number("temperature", self.temperature, 0.0, 100.0, "a finite number in [0, 100]"))
        put("top_p", _number("top_p", self.top_p, ulp(0.0), 1.0, "in (0, 1]"))
        put("top_k", whole_number("top_k", self.top_k, -1, note=" (0 and -1 keep all tokens)"))
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]"))
        if self.seed is not None:
            seed = whole_number("seed", self.seed, -1, bits=63, note=" (-1 is no seed)")
            put("seed", None if seed == -1 else seed)
        if self.max_tokens is not None:
            put("max_tokens", whole_number("max_tokens", self.max_tokens, 1))
        put("min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            put("logprobs", whole_number("logprobs", self.logprobs, 0, note=" or None"))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "True or False")
        self._put_stops(put)

    def _put_stops(self, put: Callable[[str, Any], None]) -> None:
        strings = "a string or a list of strings, none of them empty"
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop, strings)
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError("stop", self.stop, strings)
        if stop and not self.detokenize:
            raise InvalidRequestError("stop", self.stop, "empty when detokenize is False", "Use stop_token_ids.")
        put("stop", stop)
        token_ids = _listed("stop_token_ids", self.stop_token_ids, "a list of token ids")
        put("stop_token_ids", tuple(whole_number("stop_token_ids", i, 0, note=", each of them") for i in token_ids))

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
        peak_host_bytes: most of the host's memory that its answer may take before it ends, beside its tokens
            (`RequestFactory` has the formula); it starts only when that is free.
        prompt: the text, where there was one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    key: tuple[int, int] = (0, 0)
    priority: int = 0
    peak_host_bytes: int = 0
    prompt: str | None = None


_FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output")

SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
