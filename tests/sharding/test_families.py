"""Every family on 2, 4 and 8 fake CPU devices: the oracle's tokens, and on each device its part of every kind of tensor."""

import math

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.models.registry import make_model
from jaxserve.testing import oracle
from jaxserve.testing.near_ties import NearTies, compare_greedy
from jaxserve.testing.tiny_checkpoint import TinyModel, write_tiny

NUM_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, NUM_LAYERS, VOCAB = 8, 12, 64, 128, 2, 1021
PROMPT_LENS = (128, 3, 40)
NUM_TOKENS = 24
MAX_NEAR_TIES = 3
"""Of 72 tokens a model."""

SHAPE = {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "seed": 7}
ORIGINAL_LEN = 32
LINEAR, DYNAMIC = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "dynamic", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL_LEN}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tiny(family, num_kv_heads, scaling, **fields):
    # transformers takes the original length of linear and dynamic scaling from max_position_embeddings
    is_short = scaling["rope_type"] in ("linear", "dynamic")
    max_len = ORIGINAL_LEN if is_short else 8 * ORIGINAL_LEN
    rope = {"rope_scaling": scaling, "max_position_embeddings": max_len}
    return TinyModel(family, num_kv_heads=num_kv_heads, **rope, **SHAPE, **fields)


MODELS = {
    "llama": tiny("llama", 2, LLAMA3, extra_config={"attention_bias": True, "mlp_bias": True}),
    "mistral": tiny("mistral", 4, LINEAR),
    "qwen2": tiny("qwen2", 2, DYNAMIC),
    "qwen3": tiny("qwen3", 4, YARN),
    "gemma": tiny("gemma", 8, LINEAR, is_tied=True, extra_config={"attention_bias": True}),
    "gemma2": tiny("gemma2", 2, DYNAMIC),
    "gemma3": tiny("gemma3", 1, YARN, is_tied=True),
}
"""KV heads that divide by every size, by 4, by 2, or by none; a vocabulary that divides by nothing."""

DEFAULT = {("llama", 8), ("qwen2", 4), ("gemma3", 2)}
CASES = [
    pytest.param(family, size, marks=() if (family, size) in DEFAULT else pytest.mark.slow, id=f"{family} over {size}")
    for family in MODELS
    for size in (2, 4, 8)
]


def expected_local_bytes(model, size):
    """Returns how many bytes of parameters each device should hold, from the shape alone [float32]."""
    kv_heads, config = max(1, model.num_kv_heads // size), model.config()
    columns = (NUM_HEADS // size + 2 * kv_heads) * HEAD_DIM
    layer = HIDDEN * columns + NUM_HEADS // size * HEAD_DIM * HIDDEN + 3 * HIDDEN * INTERMEDIATE // size
    layer += HIDDEN * (4 if model.family in ("gemma2", "gemma3") else 2)
    layer += 2 * HEAD_DIM if model.family in ("qwen3", "gemma3") else 0
    layer += columns if config.get("attention_bias") or model.family == "qwen2" else 0
    layer += HIDDEN if config.get("attention_bias") else 0
    layer += 2 * INTERMEDIATE // size + HIDDEN if config.get("mlp_bias") else 0
    tables = math.ceil(VOCAB / size) * HIDDEN * (1 if model.is_tied else 2)
    return 4 * (NUM_LAYERS * layer + HIDDEN + tables)


def held_bytes(arrays, size):
    held = dict.fromkeys(jax.devices()[:size], 0)
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize(("family", "size"), CASES)
def test_tokens_and_bytes(family, size, tmp_path, record_property):
    model = MODELS[family]
    prompts = [np.random.default_rng([n, 1]).integers(3, VOCAB, size=n).tolist() for n in PROMPT_LENS]
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "page_size": 8, "num_pages": 24, "sequence_buckets": (2,)}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    path = str(write_tiny(tmp_path, model))
    with LLM(path, tensor_parallel_size=size, max_model_len=160, skip_tokenizer_init=True, use_tqdm=False, **limits) as llm:
        completions = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        assert llm.stats().num_compilations_since_ready == 0
        parameters, state = llm._engine.runner.resident()
        assert held_bytes(parameters, size) == {expected_local_bytes(model, size)}
        pages = 24 * 8 * max(1, model.num_kv_heads // size) * HEAD_DIM * 4
        assert held_bytes([*state.k_pages, *state.v_pages], size) == {2 * NUM_LAYERS * pages}
    stored = model.tensors()
    leaves = {
        p.path: stored[p.huggingface_name].T if p.is_transposed_in_huggingface else stored[p.huggingface_name]
        for p in make_model(model.config()).parameters()
    }
    ties = NearTies()
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = oracle.logits(leaves, model.config(), [*prompt, *completion.token_ids], len(prompt))
        ties += compare_greedy(completion.token_ids, logits[len(prompt) - 1 : -1])
    record_property("near_ties", f"{ties.num_ties} of {ties.num_tokens}, of which {ties.num_turned} turned")
    assert ties.num_ties <= MAX_NEAR_TIES
