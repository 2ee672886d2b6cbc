"""Each truncation against a plain numpy sort; draws against the distribution they claim; rows independent of their batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.execution.logits import Rows, SamplingInputs
from jaxserve.execution.row_state import RowState
from jaxserve.execution.sampling import Sampled, sample, truncate
from jaxserve.request import MAX_LOGPROB_TOKEN_IDS

VOCAB = 200
MAX_LOGPROBS = 5


@functools.cache
def compiled_sample():
    def compiled(logits, allowed, parameters):
        ids, values = jnp.zeros((1, MAX_LOGPROB_TOKEN_IDS), jnp.int32), jnp.zeros((1, 1), jnp.float32)
        rows = Rows(RowState(jnp.zeros((1, VOCAB), jnp.int32), ids[:, :1], values, ids), jnp.zeros(len(logits), jnp.int32))
        return sample(logits, allowed, parameters, rows, max_logprobs=MAX_LOGPROBS)

    return jax.jit(compiled)


compiled_truncate = jax.jit(truncate)


def inputs(num_rows, **fields):
    columns = {
        "positions_S": np.arange(num_rows, dtype=np.int32),
        "temperature_S": np.ones(num_rows, np.float32),
        "top_k_S": np.zeros(num_rows, np.int32),
        "top_p_S": np.ones(num_rows, np.float32),
        "min_p_S": np.zeros(num_rows, np.float32),
        "keys_S2": np.tile(np.array([[1, 2]], np.uint32), (num_rows, 1)),
        "repetition_S": np.ones(num_rows, np.float32),
        "frequency_S": np.zeros(num_rows, np.float32),
        "presence_S": np.zeros(num_rows, np.float32),
        "is_masked_S": np.zeros(num_rows, np.int32),
        "has_bias_S": np.zeros(num_rows, np.int32),
        "logprobs_S": np.zeros(num_rows, np.int32),
        "picks_S": np.zeros(num_rows, np.int32),
    }
    for name, value in fields.items():
        columns[name] = np.broadcast_to(np.asarray(value, columns[name].dtype), columns[name].shape)
    return SamplingInputs(**columns)


def allow(num_rows, forbidden=()):
    words = np.full((num_rows, -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32)
    for token in forbidden:
        words[:, token // 32] &= ~np.uint32(1 << (token % 32))
    return words


def run(logits, parameters, forbidden=()) -> Sampled:
    if forbidden:
        parameters = dataclasses.replace(parameters, is_masked_S=np.ones(len(logits), np.int32))
    result = compiled_sample()(logits, allow(len(logits), forbidden), parameters)
    return jax.tree.map(np.asarray, result)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, size=(8, VOCAB)).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


@pytest.mark.parametrize("k", [1, 2, 7, 199, 200])
def test_top_k_keeps_the_k_largest(logits, k):
    kept = np.isfinite(np.asarray(compiled_truncate(logits, inputs(8, top_k_S=k))))
    for row, row_logits in zip(kept, logits, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(row_logits)[-k:])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    kept = np.isfinite(np.asarray(compiled_truncate(logits, inputs(8, top_p_S=p))))
    for row, row_logits in zip(kept, logits, strict=True):
        order = np.argsort(row_logits)[::-1]
        count = int(np.searchsorted(np.cumsum(softmax(row_logits)[order]), p)) + 1
        assert set(np.flatnonzero(row)) == set(order[:count])


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_is_relative_to_the_best(logits, p):
    kept = np.isfinite(np.asarray(compiled_truncate(logits, inputs(8, min_p_S=p))))
    for row, row_logits in zip(kept, logits, strict=True):
        probabilities = softmax(row_logits)
        assert set(np.flatnonzero(row)) == set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)))


def test_ties_at_the_threshold_are_all_kept():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, :3] = [5.0, 1.0, 1.0]
    kept = np.isfinite(np.asarray(compiled_truncate(logits, inputs(1, top_k_S=2))))[0]
    assert set(np.flatnonzero(kept)) == {0, 1, 2}


def test_top_k_comes_before_top_p():
    """After top-k 2 the best token has 0.73 of what is left, so top-p 0.7 keeps it alone; the other order would keep both."""
    logits = np.log(np.array([[0.4, 0.15, 0.14, 0.13, 0.12, 0.06]], np.float32))
    logits = np.pad(logits, ((0, 0), (0, VOCAB - 6)), constant_values=-60)
    kept = np.isfinite(np.asarray(compiled_truncate(logits, inputs(1, top_k_S=2, top_p_S=0.7))))[0]
    assert set(np.flatnonzero(kept)) == {0}


def test_greedy_takes_the_best_and_the_lowest_id_of_equals(logits):
    logits[0, [3, 90]] = 50
    result = run(logits, inputs(8, temperature_S=0))
    np.testing.assert_array_equal(result.tokens_S, np.argmax(logits, axis=-1))
    assert result.tokens_S[0] == 3


def test_forbidden_tokens_are_never_sampled(logits):
    best = np.argmax(logits, axis=-1)
    for temperature in (0, 1):
        result = run(logits, inputs(8, temperature_S=temperature), forbidden=set(best.tolist()))
        assert not set(result.tokens_S.tolist()) & set(best.tolist())


def test_draws_follow_the_distribution():
    """20,000 draws: each frequency within 5 standard deviations of its probability, and nothing outside the support."""
    num_draws, rows = 20_000, 500
    row = np.random.default_rng(1).normal(0, 2, size=VOCAB).astype(np.float32)
    temperature, k = 0.7, 12
    scaled = row / np.float32(temperature)
    expected = softmax(np.where(scaled >= np.sort(scaled)[-k], scaled, -np.inf))
    counts = np.zeros(VOCAB)
    for start in range(0, num_draws, rows):
        keys = np.stack([np.full(rows, 7), np.arange(start, start + rows)], axis=1)
        parameters = inputs(rows, temperature_S=temperature, top_k_S=k, keys_S2=keys, positions_S=3)
        tokens = run(np.tile(row, (rows, 1)), parameters).tokens_S
        counts += np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    deviation = np.sqrt(num_draws * expected * (1 - expected)) + 1e-9
    assert np.max(np.abs(counts - num_draws * expected)[expected > 0] / deviation[expected > 0]) < 5


def test_a_row_does_not_depend_on_its_place_or_its_neighbours(logits):
    generator = np.random.default_rng(2)
    fields = {
        "temperature_S": [0, 0.5, 1, 1, 2, 1, 1, 1],
        "top_k_S": [0, 0, 5, 0, 0, 0, 3, 0],
        "top_p_S": [1, 0.9, 1, 1, 0.5, 1, 1, 1],
        "keys_S2": generator.integers(0, 2**32, size=(8, 2)),
        "positions_S": generator.integers(0, 1000, size=8),
    }
    whole = run(logits, inputs(8, **fields)).tokens_S
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    shuffled = run(logits[order], inputs(8, **{name: np.asarray(value)[order] for name, value in fields.items()}))
    np.testing.assert_array_equal(shuffled.tokens_S, whole[order])


def test_key_and_position_decide(logits):
    logits = np.tile(logits[:1], (8, 1)) * np.float32(0.01)
    same = run(logits, inputs(8, positions_S=4)).tokens_S
    assert len(set(same.tolist())) == 1
    assert len(set(run(logits, inputs(8)).tokens_S.tolist())) > 4, "another position is another number"
    keys = np.stack([np.arange(8), np.zeros(8)], axis=1)
    assert len(set(run(logits, inputs(8, positions_S=4, keys_S2=keys)).tokens_S.tolist())) > 4


def test_log_probabilities_are_raw(logits):
    result = run(logits, inputs(8, temperature_S=0.5, top_k_S=2, logprobs_S=1))
    expected = np.log(np.stack([softmax(row) for row in logits]))
    rows = np.arange(8)
    np.testing.assert_allclose(result.scores.logprobs_S, expected[rows, result.tokens_S], atol=1e-5)
    np.testing.assert_array_equal(result.scores.top_ids_SQ, np.argsort(-logits, axis=-1)[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(result.scores.top_logprobs_SQ, -np.sort(-expected, axis=-1)[:, :MAX_LOGPROBS], atol=1e-5)
    ranks = [int((row > row[token]).sum()) + 1 for row, token in zip(logits, result.tokens_S, strict=True)]
    np.testing.assert_array_equal(result.scores.ranks_S, ranks)


def test_a_row_of_nonsense_is_marked_and_spares_the_others(logits):
    expected = np.argmax(logits, axis=-1)
    logits[2, 5] = np.nan
    logits[6, :] = -np.inf
    result = run(logits, inputs(8, temperature_S=0))
    assert result.tokens_S[2] == result.tokens_S[6] == -1
    others = [0, 1, 3, 4, 5, 7]
    np.testing.assert_array_equal(result.tokens_S[others], expected[others])


def test_a_certain_token_is_drawn_whatever_the_number():
    logits = jnp.full((8, VOCAB), -jnp.inf).at[:, VOCAB - 1].set(0.0)
    assert set(run(np.asarray(logits), inputs(8)).tokens_S.tolist()) == {VOCAB - 1}
