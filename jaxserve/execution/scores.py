"""From logits to log-probabilities: of one token a row, of the most likely ones, of tokens that were asked for, of all."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.struct import Leaf, struct
from jaxserve.models import sums
from jaxserve.request import MAX_LOGPROB_TOKEN_IDS


@struct
class Scores:
    """Zeros in a batch where nobody asked.

    Attributes:
        logprobs_S: of a row's token.
        ranks_S: 1 for the most likely.
        top_ids_SQ, top_logprobs_SQ: the most likely tokens, best first.
        picked_logprobs_SI, picked_ranks_SI: of the tokens that a row asks for.
        all_SV: of the whole vocabulary; of width 0 unless the program gives them. Rows cut over the devices.
    """

    logprobs_S: Leaf
    ranks_S: Leaf
    top_ids_SQ: Leaf
    top_logprobs_SQ: Leaf
    picked_logprobs_SI: Leaf
    picked_ranks_SI: Leaf
    all_SV: Leaf


def no_scores(num_rows: int, vocab_size: int, width: int, *, has_all: bool) -> Scores:
    """Returns zeros in the shapes of `score`."""
    picked = num_rows, MAX_LOGPROB_TOKEN_IDS
    return Scores(
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, width), jnp.int32),
        jnp.zeros((num_rows, width), jnp.float32),
        jnp.zeros(picked, jnp.float32),
        jnp.zeros(picked, jnp.int32),
        jnp.zeros((num_rows, vocab_size if has_all else 0), jnp.float32),
    )


def score(logits_SV: jax.Array, tokens_S: jax.Array, width: int, *, has_all: bool, is_deterministic: bool = False) -> Scores:
    """Returns the scores of one token a row, without `picked`.

    Args:
        logits_SV: float32; -inf where a token is impossible.
        tokens_S: token ids.
        width: static number of alternatives.
        has_all: whether all_SV is given.
        is_deterministic: a row's bits do not depend on how many rows there are.
    """
    logprobs_SV = _log_softmax(logits_SV, is_deterministic=is_deterministic)
    chosen_S = jnp.take_along_axis(logprobs_SV, tokens_S[:, None], axis=-1)[:, 0]
    top_SQ, ids_SQ = lax.top_k(logprobs_SV, width)
    empty = no_scores(logits_SV.shape[0], logits_SV.shape[1], width, has_all=False)
    return Scores(
        chosen_S,
        _ranks(logprobs_SV, chosen_S),
        ids_SQ.astype(jnp.int32),
        top_SQ,
        empty.picked_logprobs_SI,
        empty.picked_ranks_SI,
        logprobs_SV if has_all else empty.all_SV,
    )


def with_picked(scores: Scores, logits_SV: jax.Array, ids_SI: jax.Array, *, is_deterministic: bool = False) -> Scores:
    """Returns the scores of given tokens beside the others; padding of ids_SI is past the vocabulary and gives anything."""
    logprobs_SV = _log_softmax(logits_SV, is_deterministic=is_deterministic)
    picked_SI = jnp.take_along_axis(logprobs_SV, jnp.minimum(ids_SI, logits_SV.shape[-1] - 1), axis=-1)
    ranks_IS = lax.map(lambda logprobs_S: _ranks(logprobs_SV, logprobs_S), picked_SI.T)
    return dataclasses.replace(scores, picked_logprobs_SI=picked_SI, picked_ranks_SI=ranks_IS.T)


def _log_softmax(logits_SV: jax.Array, *, is_deterministic: bool) -> jax.Array:
    return sums.log_softmax(logits_SV) if is_deterministic else jax.nn.log_softmax(logits_SV, axis=-1)


def _ranks(logprobs_SV: jax.Array, logprobs_S: jax.Array) -> jax.Array:
    return jnp.sum(logprobs_SV > logprobs_S[:, None], axis=-1, dtype=jnp.int32) + 1
