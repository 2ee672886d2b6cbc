"""Masks, bias, penalties, processors, temperature and truncation, in order, against a plain float64 recomputation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.execution.logits import PROCESSED, RAW, LogitsProcessor, Rows, SamplingInputs
from jaxserve.execution.row_state import RowState
from jaxserve.execution.sampling import sample
from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS, SamplingParams
from jaxserve.testing.oracle import log_softmax
from jaxserve.testing.sampling_oracle import adjusted, truncated

VOCAB, ROWS, MAX_LOGPROBS = 150, 12, 6
ATOL = 2e-5
"""float32 log-probabilities of logits up to 40."""

PROCESSORS = (
    LogitsProcessor("scale", lambda logits_SV, params_SP, positions_S: logits_SV * params_SP[:, :1], 1),
    LogitsProcessor(
        "ban_every_third",
        lambda logits_SV, params_SP, positions_S: jnp.where(
            (jnp.arange(VOCAB)[None, :] + positions_S[:, None]) % 3 == 0, -jnp.inf, logits_SV
        ),
    ),
)


@functools.cache
def compiled(has_all):
    def run(logits, allowed, inputs, state):
        rows = Rows(state, jnp.arange(len(logits), dtype=jnp.int32))
        return sample(logits, allowed, inputs, rows, max_logprobs=MAX_LOGPROBS, has_all=has_all, processors=PROCESSORS)

    return jax.jit(run)


class Batch:
    """Random rows: what they ask for, as plain Python, and as the head takes it."""

    def __init__(self, seed, **always):
        random = np.random.default_rng(seed)
        self.logits = random.normal(0, 4, (ROWS, VOCAB)).astype(np.float32)
        self.rows = [self.draw(random) | always for _ in range(ROWS)]

    @staticmethod
    def draw(random):
        def maybe(value, otherwise):
            return value if random.random() < 0.5 else otherwise

        ids = random.permutation(VOCAB)
        return {
            "allowed": maybe(sorted(ids[:60].tolist()), None),
            "bias": maybe({int(i): float(random.uniform(-8, 8)) for i in ids[:5]}, {}),
            "prompt": random.integers(0, VOCAB, 40).tolist(),
            "output": random.integers(0, VOCAB, 30).tolist(),
            "repetition": maybe(float(random.uniform(0.5, 2)), 1.0),
            "frequency": maybe(float(random.uniform(-2, 2)), 0.0),
            "presence": maybe(float(random.uniform(-2, 2)), 0.0),
            "scale": maybe(float(random.uniform(0.5, 1.5)), None),
            "ban_every_third": bool(random.random() < 0.3),
            "temperature": maybe(float(random.uniform(0.3, 2)), 0.0),
            "top_k": maybe(int(random.integers(1, 30)), 0),
            "top_p": maybe(float(random.uniform(0.3, 1)), 1.0),
            "min_p": maybe(float(random.uniform(0, 0.2)), 0.0),
            "position": int(random.integers(0, 100)),
            "key": random.integers(0, 2**32, 2).tolist(),
            "mode": int(random.choice([RAW, PROCESSED])),
            "picked": maybe(ids[: random.integers(1, 9)].tolist(), []),
        }

    def run(self, order=None, has_all=False):
        order = np.arange(ROWS) if order is None else np.asarray(order)
        rows = [self.rows[i] for i in order]

        def column(read, dtype=np.float32):
            return np.array([read(r) for r in rows], dtype)

        words = np.full((len(rows), -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32)
        bias_ids = np.full((len(rows), MAX_LOGIT_BIAS), VOCAB, np.int32)
        bias_values = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
        picked = np.full((len(rows), MAX_LOGPROB_TOKEN_IDS), VOCAB, np.int32)
        counts = np.zeros((len(rows), VOCAB), np.int32)
        for i, r in enumerate(rows):
            if r["allowed"] is not None:
                words[i] = 0
                for token in r["allowed"]:
                    words[i, token // 32] |= np.uint32(1 << token % 32)
            bias_ids[i, : len(r["bias"])] = list(r["bias"])
            bias_values[i, : len(r["bias"])] = list(r["bias"].values())
            picked[i, : len(r["picked"])] = r["picked"]
            counts[i] = 2 * np.bincount(r["output"], minlength=VOCAB) + np.isin(np.arange(VOCAB), r["prompt"])
        inputs = SamplingInputs(
            positions_S=column(lambda r: r["position"], np.int32),
            temperature_S=column(lambda r: r["temperature"]),
            top_k_S=column(lambda r: r["top_k"], np.int32),
            top_p_S=column(lambda r: r["top_p"]),
            min_p_S=column(lambda r: r["min_p"]),
            keys_S2=column(lambda r: r["key"], np.uint32),
            repetition_S=column(lambda r: r["repetition"]),
            frequency_S=column(lambda r: r["frequency"]),
            presence_S=column(lambda r: r["presence"]),
            is_masked_S=column(lambda r: r["allowed"] is not None, np.int32),
            has_bias_S=column(lambda r: bool(r["bias"]), np.int32),
            logprobs_S=column(lambda r: r["mode"], np.int32),
            picks_S=column(lambda r: bool(r["picked"]), np.int32),
            processors=(
                (column(lambda r: [r["scale"] or 0]), column(lambda r: r["scale"] is not None, np.int32)),
                (np.zeros((len(rows), 0), np.float32), column(lambda r: r["ban_every_third"], np.int32)),
            ),
        )
        state = RowState(counts, bias_ids, bias_values, picked)
        return jax.tree.map(np.asarray, compiled(has_all)(self.logits[order], words, inputs, state))


def processed(logits, r):
    """What a row samples from: the reference."""
    params = SamplingParams(
        allowed_token_ids=r["allowed"],
        logit_bias=r["bias"],
        repetition_penalty=r["repetition"],
        frequency_penalty=r["frequency"],
        presence_penalty=r["presence"],
        **{name: r[name] for name in ("temperature", "top_k", "top_p", "min_p")},
    )
    x = adjusted(logits, params, r["prompt"], r["output"])
    if r["scale"] is not None:
        x = x * r["scale"]
    if r["ban_every_third"]:
        x[(np.arange(VOCAB) + r["position"]) % 3 == 0] = -np.inf
    return truncated(x, params)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_and_log_probabilities_are_those_of_the_reference(seed):
    batch = Batch(seed)
    result = batch.run()
    scores = result.scores
    for i, r in enumerate(batch.rows):
        support = processed(batch.logits[i], r)
        token = result.tokens_S[i]
        assert np.isfinite(support[token]), (i, r)
        if r["temperature"] == 0:
            assert token == np.argmax(support)
        reported = log_softmax(support if r["mode"] == PROCESSED else batch.logits[i])
        np.testing.assert_allclose(scores.logprobs_S[i], reported[token], atol=ATOL)
        assert scores.ranks_S[i] == 1 + (reported > reported[token]).sum()
        order = np.argsort(-reported, kind="stable")[:MAX_LOGPROBS]
        np.testing.assert_allclose(scores.top_logprobs_SQ[i], reported[order], atol=ATOL)
        is_possible = np.isfinite(reported[order])
        np.testing.assert_array_equal(scores.top_ids_SQ[i][is_possible], order[is_possible])
        count = len(r["picked"])
        np.testing.assert_allclose(scores.picked_logprobs_SI[i, :count], reported[r["picked"]], atol=ATOL)
        ranks = [1 + int((reported > reported[token]).sum()) for token in r["picked"]]
        np.testing.assert_array_equal(scores.picked_ranks_SI[i, :count], ranks)


def test_the_whole_vocabulary():
    batch = Batch(30)
    result, without = batch.run(has_all=True), batch.run()
    np.testing.assert_array_equal(result.tokens_S, without.tokens_S)
    for i, r in enumerate(batch.rows):
        reported = log_softmax(processed(batch.logits[i], r) if r["mode"] == PROCESSED else batch.logits[i])
        np.testing.assert_allclose(result.scores.all_SV[i], reported, atol=ATOL)
    assert without.scores.all_SV.shape == (ROWS, 0)


def test_a_row_does_not_depend_on_its_place_or_its_neighbours():
    """Bit for bit, whatever the others ask for."""
    batch = Batch(31)
    whole = batch.run()
    order = np.random.default_rng(0).permutation(ROWS)
    for got, expected in zip(jax.tree.leaves(batch.run(order)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, expected[order])


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"top_p": 0.6},
        {"min_p": 0.1, "temperature": 1.5},
        {"allowed": list(range(0, VOCAB, 7)), "temperature": 2.0},
        {"repetition": 1.8, "frequency": 0.4, "presence": 1.0, "top_k": 20},
        {"bias": {3: 6.0, 9: -8.0}, "scale": 0.5, "ban_every_third": True},
    ],
    ids=["temperature", "top_p", "min_p", "allowed", "penalties", "bias_and_processors"],
)
def test_draws_follow_the_reference_distribution(setting):
    """20,000 seeded draws: each frequency within 5 standard deviations of its probability, none outside the support."""
    num_draws = 20_000
    plain = {
        "allowed": None,
        "bias": {},
        "repetition": 1.0,
        "frequency": 0.0,
        "presence": 0.0,
        "scale": None,
        "ban_every_third": False,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "picked": [],
        "position": 5,
    }
    batch = Batch(32)
    batch.rows = [batch.rows[0] | plain | setting | {"key": [7, i]} for i in range(num_draws)]
    batch.logits = np.tile(batch.logits[:1] / 2, (num_draws, 1))
    probabilities = np.exp(log_softmax(processed(batch.logits[0], batch.rows[0])))
    tokens = np.concatenate([batch.run(range(i, i + 2_000)).tokens_S for i in range(0, num_draws, 2_000)])
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0
    deviation = np.sqrt(num_draws * probabilities * (1 - probabilities))[probabilities > 0]
    assert (np.abs(counts - num_draws * probabilities)[probabilities > 0] < 5 * deviation + 1e-9).all()
