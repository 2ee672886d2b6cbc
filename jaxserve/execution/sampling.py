"""From logits to a token: masks, temperature, min-p, top-k, top-p, one uniform a row, and log-probabilities.

Order of operations as in vLLM (`docs/compatibility.md`). No sort: each truncation keeps what lies at or above a
threshold, and a threshold is found bit by bit over the ordered bit patterns of float32, exactly, in 32 masked
reductions. Ties at a threshold are kept. A row's token depends on its logits, its parameters, its key and its position
alone, never on its place in the batch.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.struct import Leaf, struct
from jaxserve.models import sums
from jaxserve.request import GREEDY_BELOW


@struct
class SamplingInputs:
    """How each row samples.

    Attributes:
        positions_S: position of the token to be sampled; with the key it decides the random number.
        temperature_S, top_k_S, top_p_S, min_p_S: as in SamplingParams; top_k 0 keeps all.
        keys_S2: two words of the request's key.
        wants_logprobs_S: 1 where log-probabilities are asked for.
    """

    positions_S: jax.Array
    temperature_S: jax.Array
    top_k_S: jax.Array
    top_p_S: jax.Array
    min_p_S: jax.Array
    keys_S2: jax.Array
    wants_logprobs_S: jax.Array


@struct
class Sampled:
    """What came out; the last four are zeros in a batch where nobody asked.

    Attributes:
        tokens_S: -1 where the logits held no finite number or a NaN.
        logprobs_S: of the token, under the raw distribution.
        ranks_S: 1 for the most likely.
        top_ids_SQ, top_logprobs_SQ: the most likely tokens, best first.
    """

    tokens_S: Leaf
    logprobs_S: Leaf
    ranks_S: Leaf
    top_ids_SQ: Leaf
    top_logprobs_SQ: Leaf


def expand_mask(words_SW: jax.Array, vocab_size: int) -> jax.Array:
    """Returns booleans [S, vocab_size]: bit t % 32 of word t // 32."""
    bits = (words_SW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
    return bits.reshape(words_SW.shape[0], -1)[:, :vocab_size].astype(bool)


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
    floor_S = best_S + jnp.log(jnp.maximum(inputs.min_p_S, jnp.finfo(jnp.float32).tiny))
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


def _sample_random(logits_SV: jax.Array, inputs: SamplingInputs, *, is_deterministic: bool) -> jax.Array:
    logits_SV = logits_SV / jnp.maximum(inputs.temperature_S, GREEDY_BELOW)[:, None]
    is_truncated = (inputs.top_k_S > 0) | (inputs.top_p_S < 1.0) | (inputs.min_p_S > 0.0)
    logits_SV = lax.cond(
        jnp.any(is_truncated), lambda x: truncate(x, inputs, is_deterministic=is_deterministic), lambda x: x, logits_SV
    )
    return _draw(logits_SV, inputs, is_deterministic=is_deterministic)


def _log_probabilities(
    raw_SV: jax.Array, tokens_S: jax.Array, width: int, *, is_deterministic: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    logprobs_SV = sums.log_softmax(raw_SV) if is_deterministic else jax.nn.log_softmax(raw_SV, axis=-1)
    chosen_S = jnp.take_along_axis(logprobs_SV, tokens_S[:, None], axis=-1)[:, 0]
    ranks_S = jnp.sum(logprobs_SV > chosen_S[:, None], axis=-1, dtype=jnp.int32) + 1
    top_SQ, ids_SQ = lax.top_k(logprobs_SV, width)
    return chosen_S, ranks_S, ids_SQ.astype(jnp.int32), top_SQ


def sample(
    raw_SV: jax.Array, allowed_SW: jax.Array, inputs: SamplingInputs, max_logprobs: int, *, is_deterministic: bool = False
) -> Sampled:
    """Samples one token a row.

    Args:
        raw_SV: float32 logits.
        allowed_SW: uint32 words, a bit a token that may be sampled.
        inputs: parameters of each row.
        max_logprobs: static width of the reported alternatives.
        is_deterministic: a row's bits do not depend on how many rows there are.
    """
    num_rows, vocab_size = raw_SV.shape
    masked_SV = jnp.where(expand_mask(allowed_SW, vocab_size), raw_SV, -jnp.inf)
    is_greedy_S = inputs.temperature_S < GREEDY_BELOW
    greedy_S = jnp.argmax(masked_SV, axis=-1).astype(jnp.int32)
    tokens_S = lax.cond(
        jnp.all(is_greedy_S),
        lambda logits: greedy_S,
        lambda logits: jnp.where(is_greedy_S, greedy_S, _sample_random(logits, inputs, is_deterministic=is_deterministic)),
        masked_SV,
    )
    is_sound_S = jnp.isfinite(jnp.max(masked_SV, axis=-1)) & ~jnp.any(jnp.isnan(raw_SV), axis=-1)
    width = min(max_logprobs, vocab_size)
    empty = (
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, width), jnp.int32),
        jnp.zeros((num_rows, width), jnp.float32),
    )
    details = lax.cond(
        jnp.any(inputs.wants_logprobs_S > 0),
        lambda x: _log_probabilities(x, tokens_S, width, is_deterministic=is_deterministic),
        lambda x: empty,
        raw_SV,
    )
    return Sampled(jnp.where(is_sound_S, tokens_S, -1), *details)
