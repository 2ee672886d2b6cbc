"""1, 2, 4 and 8 fake CPU devices give the tokens of the unsharded model, and each holds its fair share."""

import jax
import numpy as np
import pytest

from jaxserve import LLM, ConfigError, SamplingParams
from jaxserve.testing.tiny_checkpoint import TinyLlama, caller_params

MAX_SHARE = 1.1
"""Of the fair share of sharded bytes; replicated norms and tables are the rest."""

MODELS = {
    "8 KV heads": TinyLlama(num_heads=8, num_kv_heads=8, vocab_size=321, seed=2),
    "2 KV heads": TinyLlama(num_heads=8, num_kv_heads=2, vocab_size=321, seed=3),
}
"""A vocabulary that divides by nothing, and KV heads that divide by every size, or only by 2."""
PROMPT_LENS = (3, 17, 40, 70)


def start(name, size):
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8, "num_pages": 64, "sequence_buckets": (4,)}
    return LLM(**caller_params(MODELS[name]), tensor_parallel_size=size, use_tqdm=False, **limits)


def tokens_of(llm):
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 321, size=n).tolist() for n in PROMPT_LENS]
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=24, ignore_eos=True, logprobs=0),
    ] * 2
    return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def unsharded():
    """What one device says."""

    def outputs(name):
        with start(name, 1) as llm:
            return tokens_of(llm)

    return {name: outputs(name) for name in MODELS}


@pytest.mark.parametrize(("name", "size"), [("8 KV heads", 2), ("8 KV heads", 8), ("2 KV heads", 4)])
def test_tokens_are_those_of_one_device(name, size, unsharded):
    with start(name, size) as llm:
        for sharded, whole in zip(tokens_of(llm), unsharded[name], strict=True):
            assert sharded.token_ids == whole.token_ids
            assert sharded.cumulative_logprob == pytest.approx(whole.cumulative_logprob, abs=1e-3)
        assert llm.stats().num_compilations_since_ready == 0
        if name == "8 KV heads":
            assert_fair_share(llm, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("8 KV heads", 4), ("2 KV heads", 2), ("2 KV heads", 8)])
def test_tokens_are_those_of_one_device_at_the_other_sizes(name, size, unsharded):
    test_tokens_are_those_of_one_device(name, size, unsharded)


def assert_fair_share(llm, size):
    runner = llm._engine.runner
    arrays = [a for a in jax.tree.leaves(runner.resident()) if not a.sharding.is_fully_replicated]
    assert len(arrays) > 8
    held = dict.fromkeys(jax.devices()[:size], 0)
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    fair = sum(array.nbytes for array in arrays) / size
    assert max(held.values()) <= MAX_SHARE * fair


@pytest.mark.parametrize("size", [3, 16])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(size):
    with pytest.raises(ConfigError, match=f"one of 1, 2, 4, 8.*got {size}"):
        start("8 KV heads", size)
