"""Random `SamplingParams` that every field takes part in: what soaks and tests of all features at once ask for.

One generator a field, by name, in the order of the fields: a later one may look at what the earlier ones gave. A field without
a generator raises, so that nobody adds a parameter that is never tried together with the others.
"""

from collections.abc import Callable
from dataclasses import fields
from random import Random
from typing import Any, NamedTuple

from jaxserve.request import SamplingParams
from jaxserve.tokenization.tokenizer import Tokenizer

MAX_TOKENS = 48
"""Longest random answer."""

MAX_LOGPROBS = 5
"""Most log-probabilities asked for: what the smallest engine of the tests allows."""


class Draw(NamedTuple):
    """What a generator sees.

    Attributes:
        given: the fields before this one, by name.
    """

    rng: Random
    vocab_size: int
    tokenizer: Tokenizer | None
    given: dict[str, Any]


def random_sampling_params(rng: Random, vocab_size: int, tokenizer: Tokenizer | None = None) -> SamplingParams:
    """Returns legal parameters for an engine of that vocabulary; those of one state of `rng` are the same.

    Raises:
        NotImplementedError: a field of SamplingParams has no generator here.
    """
    given: dict[str, Any] = {}
    for field in fields(SamplingParams):
        if field.name not in GENERATORS:
            raise NotImplementedError(f"SamplingParams.{field.name} needs a generator in {__name__}.GENERATORS.")
        given[field.name] = GENERATORS[field.name](Draw(rng, vocab_size, tokenizer, given))
    return SamplingParams(**given)


def _mostly(usual: Any, share: float, other: Callable[[Draw], Any]) -> Callable[[Draw], Any]:
    """Returns a generator of `usual`, but for a share of the draws."""
    return lambda draw: other(draw) if draw.rng.random() < share else usual


def _flag(share_of_false: float) -> Callable[[Draw], bool]:
    return lambda draw: draw.rng.random() >= share_of_false


def _token_ids(draw: Draw, count: int) -> list[int]:
    return [draw.rng.randrange(draw.vocab_size) for _ in range(count)]


def _stop(draw: Draw) -> list[str] | None:
    """Texts of tokens, so that they have a chance to come; those of special tokens are empty."""
    if draw.tokenizer is None:
        return None
    texts = [draw.tokenizer.token_text(i) for i in _token_ids(draw, draw.rng.randint(1, 4))]
    return [text for text in texts if text] or None


def _min_tokens(draw: Draw) -> int:
    most = draw.given["max_tokens"]
    return draw.rng.randint(0, MAX_TOKENS if most is None else most)


GENERATORS: dict[str, Callable[[Draw], Any]] = {
    "n": lambda draw: 1,
    "temperature": _mostly(0.0, 0.6, lambda draw: draw.rng.choice([0.3, 0.8, 1.0, 2.0])),
    "top_p": _mostly(1.0, 0.3, lambda draw: draw.rng.uniform(0.05, 1.0)),
    "top_k": _mostly(0, 0.3, lambda draw: draw.rng.choice([-1, 1, 2, 40, draw.vocab_size])),
    "min_p": _mostly(0.0, 0.2, lambda draw: draw.rng.uniform(0.0, 0.5)),
    "seed": _mostly(None, 0.7, lambda draw: draw.rng.randrange(2**63)),
    "stop": _mostly(None, 0.3, _stop),
    "stop_token_ids": _mostly(None, 0.3, lambda draw: _token_ids(draw, draw.rng.randint(1, 8))),
    "ignore_eos": lambda draw: draw.rng.random() < 0.5,
    "max_tokens": lambda draw: draw.rng.randint(1, MAX_TOKENS),
    "min_tokens": _mostly(0, 0.3, _min_tokens),
    "logprobs": _mostly(None, 0.3, lambda draw: draw.rng.randint(0, MAX_LOGPROBS)),
    "detokenize": lambda draw: bool(draw.given["stop"]) or draw.rng.random() < 0.9,
    "skip_special_tokens": _flag(0.1),
    "spaces_between_special_tokens": _flag(0.1),
    "include_stop_str_in_output": _flag(0.8),
}
"""Field name -> generator."""
