"""The same request has the same tokens and the same log-probabilities, bit for bit, in any engine and any company, on a CPU.

DESIGN section 9. Engines that differ in every limit (rows, chunk, buckets, pages, prefix cache) answer the same requests alone,
together, in another order, from cached pages and after preemptions. That these things did happen is asserted; and so is that the
fast mode differs, for a comparison that could not tell would prove nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.testing.tiny_checkpoint import TinyModel, caller_params

NUM_REQUESTS = 40
VOCAB_SIZE = 320

# Inner sizes: 192 (qkv, gate and up, head), 640 (o) and 2,100 (down): the three kinds of `linear.rows_per_product`.
MODEL = TinyModel(
    hidden_size=192,
    num_heads=10,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=2100,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=256,
)
SLOW_MODELS = {
    "14M-shapes": dataclasses.replace(
        MODEL, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=1024, is_tied=True
    ),
    "125M-shapes": dataclasses.replace(MODEL, hidden_size=768, num_heads=12, num_kv_heads=4, intermediate_size=2048),
    "gemma3-odd": dataclasses.replace(
        MODEL, family="gemma3", hidden_size=100, num_heads=6, num_kv_heads=2, head_dim=18, intermediate_size=700
    ),
    "qwen3": dataclasses.replace(
        MODEL, family="qwen3", hidden_size=520, num_heads=4, num_kv_heads=4, head_dim=32, intermediate_size=1030
    ),
}

ENGINES: dict[str, dict[str, Any]] = {
    "wide": {"max_num_seqs": 64, "max_num_batched_tokens": 256, "num_pages": 1500, "sequence_buckets": (64,)},
    "lone": {"max_num_seqs": 1, "max_num_batched_tokens": 32, "num_pages": 32, "enable_prefix_caching": False},
    "pressed": {"max_num_seqs": 12, "max_num_batched_tokens": 48, "num_pages": 40, "sequence_buckets": (3, 12)},
}

Bits = tuple[tuple[int, ...], tuple[Any, ...]]
"""A request's tokens, and of each step every (token, bits of the log-probability, rank)."""


@functools.cache
def requests() -> list[tuple[list[int], SamplingParams]]:
    """Greedy and seeded, short and long; every third prompt begins alike."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, VOCAB_SIZE, 40).tolist()
    kinds: list[Mapping[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.01},
    ]
    made = []
    for index in range(NUM_REQUESTS):
        prompt = generator.integers(3, VOCAB_SIZE, int(generator.integers(1, 70))).tolist()
        params = SamplingParams(
            max_tokens=int(generator.integers(4, 28)), logprobs=4, seed=index, ignore_eos=True, **kinds[index % len(kinds)]
        )
        made.append((prefix + prompt if index % 3 == 0 else prompt, params))
    return made


def answers(llm: LLM, order: list[int], at_a_time: int = NUM_REQUESTS) -> dict[int, Bits]:
    """Returns {index of the request: its bits}, asked in this order, so many at a time."""
    result = {}
    for start in range(0, len(order), at_a_time):
        part = order[start : start + at_a_time]
        prompts, params = zip(*(requests()[index] for index in part), strict=True)
        for index, output in zip(part, llm.generate(list(prompts), list(params), use_tqdm=False), strict=True):
            completion = output.outputs[0]
            steps = tuple(_bits(step) for step in completion.logprobs)
            result[index] = (tuple(completion.token_ids), steps)
    return result


def prefilled(llm: LLM, index: int, token_ids: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns what `answers` says of the steps, from one forward over the prompt and its answer."""
    prompt = requests()[index][0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=4, temperature=0)
    (output,) = llm.generate([[*prompt, *token_ids]], params, use_tqdm=False)
    return tuple(_bits(step) for step in output.prompt_logprobs[len(prompt) :])


def _bits(step: Mapping[int, Any]) -> tuple[Any, ...]:
    return tuple((token, np.float32(entry.logprob).tobytes(), entry.rank) for token, entry in step.items())


def engine(name: str, model: TinyModel, **options: Any) -> LLM:
    config = ENGINES[name] | {
        "token_buckets": (ENGINES[name]["max_num_batched_tokens"],),
        "page_size": 8,
        "max_model_len": 200,
    }
    return LLM(**caller_params(model), use_tqdm=False, **config | options)


def differing(some: dict[int, Bits], others: dict[int, Bits]) -> list[int]:
    return [index for index, bits in some.items() if bits != others[index]]


ALL = list(range(NUM_REQUESTS))


def check_every_way(model: TinyModel, *, under_pressure: bool = True, **options: Any) -> None:
    shuffled = np.random.default_rng(1).permutation(NUM_REQUESTS).tolist()
    with engine("wide", model, **options) as llm:
        expected = answers(llm, ALL)
        assert len({token for tokens, _ in expected.values() for token in tokens}) > 100, "tokens vary"
        missed = llm.stats().num_cached_tokens
        assert differing(answers(llm, shuffled, at_a_time=7), expected) == []
        assert llm.stats().num_cached_tokens > missed, "prefix hits"
        assert llm.stats().num_preemptions == 0
        for index in ALL[:4]:
            assert prefilled(llm, index, expected[index][0]) == expected[index][1], "decode and prefill say the same"
    if under_pressure:
        check_under_pressure(model, shuffled, expected, **options)
    with engine("lone", model, **options) as llm:
        few = ALL[::3]
        assert differing(answers(llm, few), expected) == []
        assert llm.stats().num_cached_tokens == 0


def check_under_pressure(model: TinyModel, order: list[int], expected: dict[int, Bits], **options: Any) -> None:
    with engine("pressed", model, **options) as llm:
        assert differing(answers(llm, order), expected) == []
        stats = llm.stats()
        assert stats.num_preemptions > 0, "the pool is too small for all"
        assert stats.num_cached_tokens > 0
        assert max(len(prompt) for prompt, _ in requests()) > 48, "prompts longer than a chunk"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_has_the_same_bits_in_every_engine(dtype):
    """In bfloat16 preemptions are the slow tests' (`test_so_it_is_at_other_shapes`): they are the same host code."""
    check_every_way(MODEL, under_pressure=dtype == "float32", dtype=dtype, deterministic=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SLOW_MODELS)
def test_so_it_is_at_other_shapes(name, dtype):
    check_every_way(SLOW_MODELS[name], dtype=dtype, deterministic=True)


@pytest.mark.slow
def test_so_it_is_over_several_devices():
    check_every_way(MODEL, tensor_parallel_size=2, deterministic=True)


def test_the_fast_mode_differs():
    """The negative control: the same comparison, without the mode."""
    few = ALL[:12]
    with engine("wide", MODEL) as llm:
        together = answers(llm, few)
    with engine("lone", MODEL) as llm:
        assert differing(answers(llm, few), together) != []
