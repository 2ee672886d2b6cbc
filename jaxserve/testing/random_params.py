"""Random `SamplingParams` that turn every feature on and off.

Driven by the fields of `SamplingParams`: one that has no generator here is an error, so a new feature cannot be forgotten by
the tests that draw from this file. Knows what is legal together; knows no engine.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from jaxserve import request
from jaxserve.request import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

_OFF = 0.6
"""Share of requests that leave a costly field at its default, so that batches are mixed."""

WORDS = ("zq", "the end", "é")
STOPS = (*WORDS, "\n\n")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine allows.

    Attributes:
        max_tokens: most tokens of one output.
        has_all_logprobs: whether log-probabilities of the whole vocabulary are asked for too.
        processors: name and number of parameters of the registered logits processors.
    """

    vocab_size: int
    max_tokens: int = 12
    max_logprobs: int = 20
    has_all_logprobs: bool = True
    processors: tuple[tuple[str, int], ...] = ()


FORMS = (
    StructuredOutputsParams(choice=["yes", "no", "never"]),
    StructuredOutputsParams(regex="[a-c ]{1,9}[.]"),
    StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
)

Draw = Callable[[random.Random, Limits], Any]


def _maybe(draw: Draw, otherwise: Any = None) -> Draw:
    return lambda rng, limits: otherwise if rng.random() < _OFF else draw(rng, limits)


def _choice(*values: Any) -> Draw:
    return lambda rng, limits: rng.choice(values)


def _uniform(low: float, high: float) -> Draw:
    return lambda rng, limits: rng.uniform(low, high)


def _token_ids(low: int, high: int) -> Draw:
    return lambda rng, limits: rng.sample(range(limits.vocab_size), rng.randint(low, min(high, limits.vocab_size)))


def _num_logprobs(rng: random.Random, limits: Limits) -> int:
    counts = [0, 1, limits.max_logprobs, rng.randint(0, limits.max_logprobs)]
    return rng.choice(counts + [-1] * limits.has_all_logprobs)


def _logit_bias(rng: random.Random, limits: Limits) -> dict[int, float]:
    return {token_id: rng.uniform(-100, 100) for token_id in _token_ids(1, 40)(rng, limits)}


def _extra_args(rng: random.Random, limits: Limits) -> dict[str, list[float]] | None:
    chosen = [(name, count) for name, count in limits.processors if rng.random() < 0.5]
    return {name: [rng.uniform(0, 1) for _ in range(count)] for name, count in chosen} or None


def _repetition_detection(rng: random.Random, limits: Limits) -> Any:
    return request.RepetitionDetection(max_pattern_size=rng.randint(1, 4), min_count=rng.randint(2, 4))


GENERATORS: dict[str, Draw] = {
    "n": lambda rng, limits: 1,
    "presence_penalty": _maybe(_uniform(-2, 2), 0.0),
    "frequency_penalty": _maybe(_uniform(-2, 2), 0.0),
    "repetition_penalty": _maybe(_uniform(0.5, 2), 1.0),
    "temperature": _choice(0.0, 0.0, 0.3, 1.0, 3.0),
    "top_p": _maybe(_uniform(0.05, 1.0), 1.0),
    "top_k": _maybe(lambda rng, limits: rng.choice([-1, 1, 5, 40, limits.vocab_size]), 0),
    "min_p": _maybe(_uniform(0.0, 1.0), 0.0),
    "seed": _maybe(lambda rng, limits: rng.randrange(2**63)),
    "stop": _maybe(lambda rng, limits: rng.sample(STOPS, rng.randint(1, len(STOPS)))),
    "stop_token_ids": _maybe(_token_ids(1, 5)),
    "ignore_eos": _choice(False, True),
    "max_tokens": lambda rng, limits: rng.randint(1, limits.max_tokens),
    "min_tokens": _maybe(lambda rng, limits: rng.randint(0, limits.max_tokens), 0),
    "logprobs": _maybe(_num_logprobs),
    "prompt_logprobs": _maybe(_num_logprobs),
    "logprob_token_ids": _maybe(_token_ids(1, 20)),
    "logprobs_mode": _choice(None, "raw", "processed"),
    "flat_logprobs": _choice(False, True),
    "output_kind": lambda rng, limits: rng.choice(list(request.RequestOutputKind)),
    "detokenize": _choice(True, True, False),
    "skip_special_tokens": _choice(True, False),
    "spaces_between_special_tokens": _choice(True, False),
    "include_stop_str_in_output": _choice(True, False),
    "truncate_prompt_tokens": _maybe(_choice(-1, 1, 7)),
    "structured_outputs": lambda rng, limits: rng.choice(FORMS) if rng.random() < 0.15 else None,
    "logit_bias": _maybe(_logit_bias),
    "allowed_token_ids": _maybe(_token_ids(1, 64)),
    "bad_words": _maybe(lambda rng, limits: rng.sample(WORDS, rng.randint(1, len(WORDS)))),
    "extra_args": _extra_args,
    "skip_reading_prefix_cache": _choice(None, True, False),
    "thinking_token_budget": lambda rng, limits: None,
    "repetition_detection": _maybe(_repetition_detection),
}
"""Field of `SamplingParams` -> how to draw it: half the time or so its default."""


def random_params(rng: random.Random, limits: Limits) -> SamplingParams:
    """Returns legal parameters; each draw takes all features anew.

    Raises:
        KeyError: a field of SamplingParams has no generator.
    """
    drawn = {field.name: GENERATORS[field.name](rng, limits) for field in fields(SamplingParams)}
    drawn["min_tokens"] = min(drawn["min_tokens"], drawn["max_tokens"])
    if not drawn["detokenize"]:
        drawn["stop"] = None
    if drawn["structured_outputs"] is not None:  # these may leave no token that a form allows
        drawn |= {"allowed_token_ids": None, "bad_words": None, "stop_token_ids": None}
    return SamplingParams(**drawn)


def toggled(params: list[SamplingParams]) -> set[str]:
    """Returns the fields that have at least two values among these."""
    names = [field.name for field in fields(SamplingParams)]
    return {name for name in names if len({repr(getattr(p, name)) for p in params}) > 1}
