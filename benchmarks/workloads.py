"""Request sets that every peer gets alike: token ids in, greedy, end of sequence ignored, all submitted at once. numpy alone."""

from dataclasses import dataclass

import numpy as np

FIRST_ID = 10
"""Below it special tokens lie."""

MAX_SEQS = 32
"""Requests that run at a time; every peer is given room for as many."""


@dataclass(frozen=True)
class Request:
    """One prompt and how many tokens follow it."""

    prompt: list[int]
    max_tokens: int


def _lengths(generator: np.random.Generator, median: int, sigma: float, low: int, high: int) -> list[int]:
    """Returns 32 lengths, log-normal as those of chats are."""
    return np.clip(np.exp(generator.normal(np.log(median), sigma, 32)), low, high).astype(int).tolist()


def _shapes() -> dict[str, tuple[list[int], list[int], int]]:
    """Returns name -> (prompt lengths, output lengths, length of the prefix that all prompts share) [tokens]."""
    generator = np.random.default_rng(3)
    return {
        "single": ([128], [128], 0),
        "8 equal": ([128] * 8, [128] * 8, 0),
        "32 mixed": (_lengths(generator, 96, 0.9, 16, 512), _lengths(generator, 72, 0.7, 16, 256), 0),
        "shared prefix": ([288] * 32, [32] * 32, 256),
        "long prompt": ([2048], [32], 0),
    }


NAMES = tuple(_shapes())

MAX_MODEL_LEN = 2304
"""The longest prompt with its output, and some room [tokens]."""


def requests(name: str, vocab_size: int, seed: int) -> list[Request]:
    """Returns a workload; every seed has the same lengths and other tokens, so that no cache has seen them."""
    prompt_lens, output_lens, prefix_len = _shapes()[name]
    generator = np.random.default_rng([seed, NAMES.index(name)])
    prefix = generator.integers(FIRST_ID, vocab_size, prefix_len).tolist()
    return [
        Request(prefix + generator.integers(FIRST_ID, vocab_size, length - prefix_len).tolist(), max_tokens)
        for length, max_tokens in zip(prompt_lens, output_lens, strict=True)
    ]


def warm_up(vocab_size: int) -> list[Request]:
    """Returns requests of every kind of size; not timed."""
    generator = np.random.default_rng(99)
    lengths = (512, 256, 128, 64, 32, 32, 16, 16)
    return [Request(generator.integers(FIRST_ID, vocab_size, length).tolist(), 8) for length in lengths]
