"""Greedy tokens and log-probabilities through the engine, batched, chunked and paged, against transformers and the oracle."""

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoints import huggingface
from jaxserve.models.registry import make_model
from jaxserve.testing import oracle
from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING, TinyLlama, write_tiny_llama

NUM_TOKENS = 40
PROMPT_LENS = (1, 5, 16, 33, 70, 120)
MIN_DISTINCT = 36
"""Of 40 greedy tokens: a model that repeats itself proves nothing."""
MIN_MARGIN = 1e-2
"""Between the best two logits: below it, another order of float32 sums may pick the other."""
LOGPROB_TOLERANCE = 2e-4
"""float32 logits of magnitude 10 to 30 over 2 layers carry about 1e-5 relative error."""

LLAMA3 = {"num_kv_heads": 4, "is_tied": True, "rope_scaling": LLAMA3_ROPE_SCALING}
MODELS = {
    "gqa, untied": (TinyLlama(vocab_size=4096, seed=1), (0, 4, 0, 4, 0, 2)),
    "mha, tied, llama3 rope": (TinyLlama(vocab_size=4096, seed=3, **LLAMA3), (1, 1, 0, 2, 0, 0)),
    "mqa": (TinyLlama(vocab_size=4096, num_kv_heads=1, seed=5), (0, 1, 0, 2, 1, 2)),
}
"""Name -> model and a seed for each prompt, such that no continuation comes near a tie; every test asserts that."""


@pytest.fixture(scope="module", params=MODELS, ids=MODELS.keys())
def model(request, tmp_path_factory):
    shape, _ = MODELS[request.param]
    return shape, write_tiny_llama(tmp_path_factory.mktemp("tiny"), shape)


@pytest.fixture(scope="module")
def prompts(model):
    shape, _ = model
    (seeds,) = (seeds for candidate, seeds in MODELS.values() if candidate == shape)
    return [
        np.random.default_rng([n, seed]).integers(3, shape.vocab_size, size=n).tolist()
        for n, seed in zip(PROMPT_LENS, seeds, strict=True)
    ]


@pytest.fixture(scope="module")
def outputs(model, prompts):
    """Six prompts over four rows, in chunks of at most 32 tokens, on pages of 8."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8, "num_pages": 100, "sequence_buckets": (4,)}
    with LLM(str(model[1]), skip_tokenizer_init=True, use_tqdm=False, **limits) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
        result = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        assert llm.stats().num_steps > NUM_TOKENS + sum(PROMPT_LENS) // 32, "prompts were not chunked"
        return result


def transformers_greedy(path, prompt):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    result = oracle.Continuation([], [], [])
    with torch.no_grad():
        state = reference(torch.tensor([prompt]), use_cache=True)
        for _ in range(NUM_TOKENS):
            logits = state.logits[0, -1]
            top = torch.topk(logits, 2)
            token = int(top.indices[0])
            result.token_ids.append(token)
            result.logprobs.append(float(torch.log_softmax(logits, -1)[token]))
            result.margins.append(float(top.values[0] - top.values[1]))
            state = reference(torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True)
    return result


def assert_equal(completion, expected):
    assert min(expected.margins) > MIN_MARGIN, "a near tie: choose another seed"
    assert len(set(expected.token_ids)) >= MIN_DISTINCT, "the reference repeats itself: choose another seed"
    assert completion.token_ids == expected.token_ids
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=LOGPROB_TOLERANCE)
    assert all(entry[token].rank == 1 for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))


def test_equals_transformers(model, prompts, outputs):
    for prompt, completion in zip(prompts, outputs, strict=True):
        assert_equal(completion, transformers_greedy(model[1], prompt))


def test_equals_the_oracle(model, prompts, outputs):
    tensors = {p.path: p for p in make_model(model[0].config()).parameters()}
    stored = model[0].tensors()
    leaves = {
        path: stored[p.huggingface_name].T if p.is_transposed_in_huggingface else stored[p.huggingface_name]
        for path, p in tensors.items()
    }
    for prompt, completion in list(zip(prompts, outputs, strict=True))[::3]:
        assert_equal(completion, oracle.greedy(leaves, huggingface.read_config(model[1]), prompt, NUM_TOKENS))
