"""What a caller asks for: `SamplingParams` (checked on its own) and `Request` (checked against one model).

Plain data. Names, defaults and error conditions are vLLM's where a field exists there; `docs/compatibility.md` lists the
deviations.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import partial
from math import ulp
from numbers import Integral, Real
from typing import Any

from jaxserve.config import LOGPROBS_MODES
from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import StructuredOutputsParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (vLLM's _SAMPLING_EPS)."""


ALL_LOGPROBS = -1
"""In place of a number of log-probabilities: the whole vocabulary's."""

MAX_LOGIT_BIAS = 1024
"""Entries of one logit_bias: they stay on the device, beside the row."""

MAX_LOGPROB_TOKEN_IDS = 128

MAX_N = 2**14

MAX_REPETITION_TOKENS = 2**13
"""max_pattern_size * min_count of one repetition_detection: what each new token may cost the host to look at [tokens]."""


class RequestOutputKind(Enum):
    """What each output of a stream holds: all so far, what is new, or one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetection:
    """Ends a completion that goes round in circles, with finish_reason "repetition".

    Attributes:
        max_pattern_size: longest pattern that is looked for [tokens]; 0 turns it off.
        min_pattern_size: shortest one; 0 is 1.
        min_count: times that a pattern stands at the end of the output, one after the other, before it ends.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 2

    def __post_init__(self) -> None:
        for name, low in (("max_pattern_size", 0), ("min_pattern_size", 0), ("min_count", 2)):
            value = whole_number(f"repetition_detection.{name}", getattr(self, name), low)
            object.__setattr__(self, name, value)
        if self.min_pattern_size > self.max_pattern_size:
            raise InvalidRequestError(
                "repetition_detection.min_pattern_size",
                self.min_pattern_size,
                f"at most max_pattern_size ({self.max_pattern_size})",
            )
        if self.max_pattern_size * self.min_count > MAX_REPETITION_TOKENS:
            raise InvalidRequestError(
                "repetition_detection.max_pattern_size",
                self.max_pattern_size,
                f"at most {MAX_REPETITION_TOKENS} / min_count ({MAX_REPETITION_TOKENS // self.min_count} tokens)",
            )


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
        n: completions a prompt, at most 16384. With a seed, completion i has the seed + i.
        presence_penalty: subtracted from the logit of each token that the output holds, once.
        frequency_penalty: subtracted as often as the output holds the token.
        repetition_penalty: divides positive logits and multiplies negative ones of tokens in prompt or output.
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
        logprobs: k most likely tokens to report besides the chosen one; 0 for the chosen one alone, -1 for the whole vocabulary,
            None for nothing.
        prompt_logprobs: the same for each prompt token after the first; always raw.
        logprob_token_ids: report these tokens' log-probabilities, in place of the most likely ones, whatever logprobs says.
        logprobs_mode: "raw" (before masks, penalties and temperature) or "processed" (what was sampled from); None takes the
            engine's.
        flat_logprobs: log-probabilities in columns (`FlatLogprobs`) in place of a dict a token.
        output_kind: what each output of an `AsyncLLM` stream holds.
        detokenize: False leaves text empty.
        truncate_prompt_tokens: keep the last k tokens of the prompt alone; -1 keeps what fits the model.
        structured_outputs: a grammar that the output follows.
        logit_bias: {token id: number added to its logit}, clamped to [-100, 100].
        allowed_token_ids: no others are sampled.
        bad_words: words whose usual spelling as tokens, at the start of a text and after a space, never comes.
        extra_args: parameters of logits processors by name: {"name": [numbers]}.
        skip_reading_prefix_cache: compute the whole prompt; None decides by prompt_logprobs, which need it.
        repetition_detection: ends an output that repeats itself.
        thinking_token_budget: most tokens of reasoning; -1 or None is no limit. Needs an engine that knows how reasoning ends.

    Raises:
        InvalidRequestError: names the field, what was given and what is allowed.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
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
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    logprobs_mode: str | None = None
    flat_logprobs: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    extra_args: Mapping[str, Sequence[float]] | None = field(default=None, hash=False)
    skip_reading_prefix_cache: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)  # what is put is a plain int, float or tuple, whatever was given
        put("n", whole_number("n", self.n, 1))
        if self.n > MAX_N:
            raise InvalidRequestError("n", self.n, f"at most {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _number(name, getattr(self, name), -2.0, 2.0, "in [-2, 2]"))
        low = ulp(0.0)
        put(
            "repetition_penalty",
            _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6, "greater than zero, in [1e-6, 1e6]"),
        )
        put("temperature", _number("temperature", self.temperature, 0.0, 100.0, "a finite number in [0, 100]"))
        put("top_p", _number("top_p", self.top_p, low, 1.0, "in (0, 1]"))
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
        for name, meaning in _OR_MINUS_ONE.items():
            if getattr(self, name) is not None:
                put(name, whole_number(name, getattr(self, name), -1, note=f" (-1 {meaning}) or None"))
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError("truncate_prompt_tokens", 0, "-1 or at least 1")
        if self.thinking_token_budget == -1:
            put("thinking_token_budget", None)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "True or False")
        self._check_choices()
        self._put_stops(put)
        self._put_token_ids(put)

    def _check_choices(self) -> None:
        if self.logprobs_mode not in (None, *LOGPROBS_MODES):
            raise InvalidRequestError("logprobs_mode", self.logprobs_mode, f"None or one of {', '.join(LOGPROBS_MODES)}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidRequestError("output_kind", self.output_kind, "a RequestOutputKind")
        if not (self.skip_reading_prefix_cache is None or isinstance(self.skip_reading_prefix_cache, bool)):
            raise InvalidRequestError("skip_reading_prefix_cache", self.skip_reading_prefix_cache, "True, False or None")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidRequestError("structured_outputs", self.structured_outputs, "a StructuredOutputsParams or None")
        if not isinstance(self.repetition_detection, RepetitionDetection | None):
            raise InvalidRequestError("repetition_detection", self.repetition_detection, "a RepetitionDetection or None")

    def _put_stops(self, put: Callable[[str, Any], None]) -> None:
        strings = "a string or a list of strings, none of them empty"
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop, strings)
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError("stop", self.stop, strings)
        if stop and not self.detokenize:
            raise InvalidRequestError("stop", self.stop, "empty when detokenize is False", "Use stop_token_ids.")
        put("stop", stop)
        strings = "a list of strings, none of them empty"
        words = (None,) if isinstance(self.bad_words, str) else _listed("bad_words", self.bad_words, strings)
        if any(not isinstance(w, str) or not w for w in words):
            raise InvalidRequestError("bad_words", self.bad_words, strings)
        put("bad_words", tuple(dict.fromkeys(words)))

    def _put_token_ids(self, put: Callable[[str, Any], None]) -> None:
        put("stop_token_ids", tuple(dict.fromkeys(_token_ids("stop_token_ids", self.stop_token_ids) or ())))
        allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if allowed == ():
            raise InvalidRequestError("allowed_token_ids", self.allowed_token_ids, "not empty, or None for every token")
        put("allowed_token_ids", allowed)
        picked = _token_ids("logprob_token_ids", self.logprob_token_ids)
        if picked is not None and not 0 < len(picked) <= MAX_LOGPROB_TOKEN_IDS:
            raise InvalidRequestError(
                "logprob_token_ids", f"{len(picked)} token ids", f"1 to {MAX_LOGPROB_TOKEN_IDS} token ids, or None"
            )
        put("logprob_token_ids", picked)
        if picked is not None:
            put("logprobs", 0)
        put("logit_bias", _logit_bias(self.logit_bias))
        put("extra_args", _extra_args(self.extra_args))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached pages may stand for the prompt's beginning; its log-probabilities need each position computed."""
        skips = (
            self.prompt_logprobs is not None if self.skip_reading_prefix_cache is None else self.skip_reading_prefix_cache
        )
        return not skips and self.prompt_logprobs is None


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    token_ids = _listed(name, value, "a list of token ids")
    return tuple(whole_number(name, i, 0, note=", each of them") for i in token_ids)


def _logit_bias(value: Any) -> dict[int, float] | None:
    """Returns plain numbers, clamped as vLLM does; keys may be digits, as JSON has them."""
    allowed = "a mapping from token ids to numbers"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequestError("logit_bias", value, allowed)
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequestError("logit_bias", f"{len(value)} entries", f"at most {MAX_LOGIT_BIAS} entries")
    biases = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        number = _number(f"logit_bias[{key!r}]", bias, -math.inf, math.inf, "a number")
        biases[whole_number("logit_bias", token_id, 0, note=", each token id")] = min(100.0, max(-100.0, number))
    return biases or None


def _extra_args(value: Any) -> dict[str, tuple[float, ...]] | None:
    if value is None:
        return None
    allowed = "a mapping from the name of a logits processor to a list of numbers"
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidRequestError("extra_args", value, allowed)
    numbers = "a list of numbers"
    return {
        name: tuple(
            _number(f"extra_args.{name}", x, -math.inf, math.inf, numbers)
            for x in _listed(f"extra_args.{name}", listed, numbers)
        )
        for name, listed in value.items()
    } or None


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
        pooling: "last" or "mean": give back the prompt's embedding in place of a completion.
        constraint: what of its output is allowed beyond what `sampling` says; asked before each token.
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
    pooling: str | None = None
    constraint: Any = field(default=None, compare=False)


_OR_MINUS_ONE = {
    "logprobs": "is the whole vocabulary",
    "prompt_logprobs": "is the whole vocabulary",
    "truncate_prompt_tokens": "keeps what fits",
    "thinking_token_budget": "is no limit",
}

_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "flat_logprobs",
)

SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
