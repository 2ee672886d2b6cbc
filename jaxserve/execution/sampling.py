"""From logits to a token: temperature, min-p, top-k, top-p, one uniform a row, and log-probabilities.

Order of operations as in vLLM (`docs/compatibility.md`). No sort: each truncation keeps what lies at or above a
threshold, and a threshold is found bit by bit over the ordered bit patterns of float32, exactly, in 32 masked
reductions. Ties at a threshold are kept. A row's token depends on its logits, its parameters, its key and its position
alone, never on its place in the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.argmax import largest
from jaxserve.execution.logits import PROCESSED, LogitsProcessor, Rows, SamplingInputs, adjust, is_adjusted
from jaxserve.execution.scores import Scores, no_scores, score, with_picked
from jaxserve.execution.struct import Leaf, struct
from jaxserve.models import sums
from jaxserve.request import GREEDY_BELOW


@struct
class Sampled:
    """What came out.

    Attributes:
        tokens_S: -1 where the logits held no finite number or a NaN.
        scores: of these tokens, raw or processed as each row asks.
    """

    tokens_S: Leaf
    scores: Scores


def _ordered(x: jax.Array) -> jax.Array:
    """Returns uint32 in the same order as the float32 numbers."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    is_negative = bits >> 31 == 1
    return jnp.where(is_negative, ~bits, bits | jnp.uint32(0x80000000))


def _largest_threshold(keys_SV: jax.Array, keeps_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest uint32 [S] for which `keeps_enough(keys >= threshold)` still holds; it must be monotonic."""

    def decide_bit(index: jax.Array, threshold_S: jax.Array) -> jax.Array:
        candidate_S = threshold_S | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(keeps_enough(keys_SV >= candidate_S[:, None]), candidate_S, threshold_S)

    return lax.fori_loop(0, 32, decide_bit, jnp.zeros(keys_SV.shape[0], jnp.uint32))


def truncate(logits_SV: jax.Array, inputs: SamplingInputs, *, is_deterministic: bool = False) -> jax.Array:
    """Returns the logits, already divided by temperature, with what min-p, top-k and top-p drop at -inf."""
    best_S = jnp.max(logits_SV, axis=-1)
    floor_S = best_S + sums.in_vectors(jnp.log, jnp.maximum(inputs.min_p_S, jnp.finfo(jnp.float32).tiny))
    floor_S = jnp.where(inputs.min_p_S > 0, floor_S, -jnp.inf)
    logits_SV = jnp.where(logits_SV >= floor_S[:, None], logits_SV, -jnp.inf)

    keys_SV = _ordered(logits_SV)
    top_k_S = jnp.where(inputs.top_k_S > 0, inputs.top_k_S, logits_SV.shape[-1])
    threshold_S = _largest_threshold(keys_SV, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= top_k_S)
    logits_SV = jnp.where(keys_SV >= threshold_S[:, None], logits_SV, -jnp.inf)

    if is_deterministic:
        _, weights_SV = sums.exp_below_max(logits_SV)
        total_S, sum_rows = sums.row_sums_in_a_loop(weights_SV), sums.row_sums
    else:
        weights_SV, sum_rows = jax.nn.softmax(logits_SV, axis=-1), partial(jnp.sum, axis=-1)
        total_S = sum_rows(weights_SV)
    target_S = inputs.top_p_S * total_S
    threshold_S = _largest_threshold(keys_SV, lambda kept: sum_rows(jnp.where(kept, weights_SV, 0.0)) >= target_S)
    keep = (keys_SV >= threshold_S[:, None]) | (inputs.top_p_S >= 1.0)[:, None]
    return jnp.where(keep, logits_SV, -jnp.inf)


def _draw(logits_SV: jax.Array, inputs: SamplingInputs, *, is_deterministic: bool) -> jax.Array:
    """Returns a token a row by inverse transform of one uniform number, from a key of request and position alone."""
    keys = jax.random.wrap_key_data(inputs.keys_S2, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, inputs.positions_S)
    uniform_S = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    if is_deterministic:
        _, weights_SV = sums.exp_below_max(logits_SV)
    else:
        weights_SV = jnp.exp(logits_SV - jnp.max(logits_SV, axis=-1, keepdims=True))
    cumulative_SV = jnp.cumsum(weights_SV, axis=-1)
    target_S = uniform_S * cumulative_SV[:, -1]
    drawn_S = jnp.sum(cumulative_SV <= target_S[:, None], axis=-1, dtype=jnp.int32)
    # uniform * total can round up to the total: fall back to the last token with any weight
    columns = jnp.arange(logits_SV.shape[-1], dtype=jnp.int32)[None, :]
    last_S = jnp.max(jnp.where(weights_SV > 0, columns, 0), axis=-1)
    return jnp.minimum(drawn_S, last_S)


def _process(logits_SV: jax.Array, inputs: SamplingInputs, *, is_deterministic: bool) -> jax.Array:
    """Returns the logits that rows with a temperature draw from; greedy rows' as they are."""
    scaled_SV = logits_SV / jnp.maximum(inputs.temperature_S, GREEDY_BELOW)[:, None]
    is_truncated = (inputs.top_k_S > 0) | (inputs.top_p_S < 1.0) | (inputs.min_p_S > 0.0)
    cut = partial(truncate, inputs=inputs, is_deterministic=is_deterministic)
    scaled_SV = lax.cond(jnp.any(is_truncated), cut, lambda x: x, scaled_SV)
    return jnp.where(_is_greedy(inputs)[:, None], logits_SV, scaled_SV)


def _is_greedy(inputs: SamplingInputs) -> jax.Array:
    return inputs.temperature_S < GREEDY_BELOW


def sample(
    raw_SV: jax.Array,
    allowed_SW: jax.Array,
    inputs: SamplingInputs,
    rows: Rows,
    *,
    max_logprobs: int,
    has_all: bool = False,
    is_deterministic: bool = False,
    processors: Sequence[LogitsProcessor] = (),
) -> Sampled:
    """Samples one token a row.

    Args:
        raw_SV: float32 logits.
        allowed_SW: uint32 words, a bit a token that may be sampled; read where a row is masked.
        inputs: parameters of each row.
        rows: what the device keeps of each row.
        max_logprobs: static width of the reported alternatives.
        has_all: whether the whole vocabulary's log-probabilities are given.
        is_deterministic: a row's bits do not depend on how many rows there are.
        processors: in the order of inputs.processors.
    """
    best_S, top_S = largest(raw_SV)
    is_sound_S = jnp.isfinite(top_S)
    width = min(max_logprobs, raw_SV.shape[1])
    nothing = no_scores(raw_SV.shape[0], raw_SV.shape[1], width, has_all=has_all)

    def plain(raw_SV: jax.Array) -> Sampled:
        """A greedy batch that asks for nothing else: one pass over the logits, nothing copied."""
        return Sampled(jnp.where(is_sound_S, best_S, -1), nothing)

    def full(raw_SV: jax.Array) -> Sampled:
        is_random = jnp.any(~_is_greedy(inputs))
        adjusted = partial(adjust, allowed_SW=allowed_SW, inputs=inputs, rows=rows, processors=processors)
        logits_SV = lax.cond(is_adjusted(inputs), adjusted, lambda x: x, raw_SV)
        process = partial(_process, inputs=inputs, is_deterministic=is_deterministic)
        logits_SV = lax.cond(is_random, process, lambda x: x, logits_SV)
        greedy_S, top_S = largest(logits_SV)
        draw = partial(_draw, inputs=inputs, is_deterministic=is_deterministic)
        tokens_S = lax.cond(
            is_random, lambda x: jnp.where(_is_greedy(inputs), greedy_S, draw(x)), lambda x: greedy_S, logits_SV
        )

        def scored(logits_SV: jax.Array) -> Scores:
            reported_SV = jnp.where((inputs.logprobs_S == PROCESSED)[:, None], logits_SV, raw_SV)
            scores = score(reported_SV, tokens_S, width, has_all=has_all, is_deterministic=is_deterministic)
            ids_SI = rows.state.picked_ids_RI[rows.rows_S]
            picked = partial(with_picked, scores, ids_SI=ids_SI, is_deterministic=is_deterministic)
            return lax.cond(jnp.any(inputs.picks_S > 0), picked, lambda x: scores, reported_SV)

        scores = lax.cond(wants_scores, scored, lambda x: nothing, logits_SV)
        return Sampled(jnp.where(is_sound_S & jnp.isfinite(top_S), tokens_S, -1), scores)

    wants_scores = jnp.any(inputs.logprobs_S > 0)
    is_plain = jnp.all(_is_greedy(inputs)) & ~is_adjusted(inputs) & ~wants_scores
    return lax.cond(is_plain, plain, full, raw_SV)
