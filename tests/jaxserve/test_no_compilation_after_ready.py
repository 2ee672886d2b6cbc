"""Nothing is compiled after ready, by jax's own events: random requests that toggle every feature, one to 64 at a time."""

import random
from dataclasses import fields

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.execution.compilation import process_counter
from jaxserve.testing.random_params import GENERATORS, Limits, random_params, toggled

NOT_TOGGLED = {
    "n": "several completions are several requests",
    "thinking_token_budget": "the engines of this file do not know how reasoning ends",
    "extra_args": "the engines of this file register no logits processor",
}


def random_prompts(rng, count, vocab_size, longest):
    """Returns prompts of 1 to `longest` tokens, a third of which begin alike."""
    shared = [rng.randrange(vocab_size) for _ in range(longest)]
    prompts = []
    for _ in range(count):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))]
        prompts.append(shared[: len(prompt) - 1] + prompt[-1:] if rng.random() < 0.3 else prompt)
    return prompts


def check(llm, limits, longest_prompt, num_requests, levels, seed=0):
    """Runs random requests, as many at a time as `levels` say in turn, and compares jax's count before and after."""
    rng, all_params = random.Random(seed), []
    before = process_counter().total()
    while len(all_params) < num_requests:
        count = min(levels[len(all_params) % len(levels)], num_requests - len(all_params))
        params = [random_params(rng, limits) for _ in range(count)]
        outputs = llm.generate(random_prompts(rng, count, limits.vocab_size, longest_prompt), params, use_tqdm=False)
        assert len(outputs) == count and all(output.finished for output in outputs)
        all_params += params
    assert process_counter().total() == before
    assert llm.stats().num_compilations_since_ready == 0
    assert toggled(all_params) >= {f.name for f in fields(SamplingParams)} - NOT_TOGGLED.keys()
    # The counter counts: one more program is one more.
    jax.jit(lambda x: x + seed)(np.float32(num_requests))
    assert process_counter().total() == before + 1


def test_every_field_has_a_generator():
    assert {f.name for f in fields(SamplingParams)} <= GENERATORS.keys()


def test_random_requests_compile_nothing(tiny_llm):
    check(tiny_llm, Limits(vocab_size=320, max_tokens=8), 100, 60, (1, 2, 7, 50))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_500_random_requests_compile_nothing(tiny_dir, seed):
    """On the defaults' ladder: 64 rows, chunks, and a pool that must preempt."""
    with LLM(str(tiny_dir), use_tqdm=False, max_num_seqs=64, page_size=8, num_pages=500) as llm:
        check(llm, Limits(vocab_size=320, max_tokens=24), 150, 500, (1, 2, 4, 8, 16, 32, 64), seed)
