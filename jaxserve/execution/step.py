"""The programs of a step, as pure functions (ADR 0003).

`backbone` computes this step's tokens and leaves the hidden state of each sampling sequence in its row; `head` turns
rows into tokens. `score_tokens` and `pool` read hidden states for prompt log-probabilities and embeddings. All run per device
inside one `shard_map`; what takes a state gives it back.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.batch import FROM_DEVICE, StepInputs
from jaxserve.execution.logits import LogitsProcessor, Rows, SamplingInputs
from jaxserve.execution.row_state import RowState
from jaxserve.execution.sampling import Sampled, sample
from jaxserve.execution.scores import Scores, score
from jaxserve.execution.state import DeviceState
from jaxserve.execution.struct import struct
from jaxserve.models.attention import AttentionContext, PagedCache
from jaxserve.models.model import Model, ModelContext
from jaxserve.plan import kv_groups
from sharding.axes import TENSOR_AXES

HeadState = tuple[jax.Array, RowState]
"""last_token_R of the state, and what is kept of rows for sampling."""

Scored = TypeVar("Scored", Sampled, Scores)


@struct
class ScoreInputs:
    """Which tokens are scored.

    Attributes:
        places_C: where in the step's tokens the hidden state lies that predicts it.
        token_ids_C: the token.
    """

    places_C: jax.Array
    token_ids_C: jax.Array


def _slots(table_RP: jax.Array, rows_T: jax.Array, positions_T: jax.Array, num_pages: int, page_size: int) -> jax.Array:
    """Returns page * Z + offset of each token; one past the last slot for padding, which the write drops.

    Never -1: a negative index wraps even under mode="drop" and would destroy the last slot.
    """
    is_padding_T = positions_T < 0
    rows_T = jnp.minimum(rows_T, table_RP.shape[0] - 1)
    pages_T = table_RP[rows_T, jnp.maximum(positions_T, 0) // page_size]
    return jnp.where(is_padding_T, num_pages * page_size, pages_T * page_size + positions_T % page_size)


def backbone(
    params: Any,
    state: DeviceState,
    inputs: StepInputs,
    *,
    model: Model,
    ctx: ModelContext,
    attention: AttentionContext,
    num_hidden: int,
) -> tuple[DeviceState, jax.Array, jax.Array]:
    """Computes one step's tokens.

    Args:
        num_hidden: M, the most tokens of any step, where every token's hidden state is given back; 0 where none is.

    Returns:
        The state; hidden states [R, D] in which the rows that sample are filled; and those of all tokens [M, D].
    """
    groups = kv_groups(model.kv_specs())
    num_rows = state.last_token_R.shape[0]
    block_tables = []
    for group, table_RP in enumerate(state.block_tables):
        update_group, row, index, page = inputs.page_updates_U4.T
        row = jnp.where(update_group == group, row, num_rows)
        block_tables.append(table_RP.at[row, index].set(page, mode="drop"))

    last_T = state.last_token_R[jnp.minimum(inputs.rows_T, num_rows - 1)]
    tokens_T = jnp.where(inputs.tokens_T == FROM_DEVICE, last_T, inputs.tokens_T)
    num_pages, _, page_size, _ = state.k_pages[0].shape
    cache = PagedCache(
        specs=model.kv_specs(),
        group_of_layer=tuple(groups.index(spec) for spec in model.kv_specs()),
        k_pages=state.k_pages,
        v_pages=state.v_pages,
        block_tables=tuple(block_tables),
        slots=tuple(_slots(t, inputs.rows_T, inputs.positions_T, num_pages, page_size) for t in block_tables),
        rows_T=inputs.rows_T,
        positions_T=inputs.positions_T,
        prompt_lens_T=inputs.prompt_lens_T,
        batch=inputs.ragged,
        context=attention,
    )
    hidden_TD = model.backbone(params, tokens_T, inputs.positions_T, cache, ctx)
    hidden_RD = jnp.zeros((num_rows, hidden_TD.shape[1]), hidden_TD.dtype)
    hidden_RD = hidden_RD.at[inputs.sampled_rows_S].set(hidden_TD[inputs.sampled_tokens_S], mode="drop")
    state = DeviceState(tuple(cache.k_pages), tuple(cache.v_pages), tuple(block_tables), state.last_token_R)
    all_hidden_MD = jnp.pad(hidden_TD, ((0, num_hidden - hidden_TD.shape[0]), (0, 0))) if num_hidden else hidden_RD[:0]
    return state, hidden_RD, all_hidden_MD


def head(
    params: Any,
    state: HeadState,
    hidden_RD: jax.Array,
    rows_S: jax.Array,
    allowed_SW: jax.Array,
    inputs: SamplingInputs,
    *,
    model: Model,
    ctx: ModelContext,
    max_logprobs: int,
    processors: Sequence[LogitsProcessor],
    has_all: bool,
) -> tuple[HeadState, Sampled]:
    """Samples the token of each of `rows_S`, and counts it where the row has penalties.

    Over several devices each computes the logits of its part of the vocabulary, they exchange parts for rows
    (all-to-all, [S, V/t] to [S/t, V]), and each samples its rows: nobody ever holds all logits.

    Returns:
        The state with these rows' tokens, and the tokens with their log-probabilities, on every device; but for
        `Scores.all_SV`, whose rows stay where they are.
    """
    last_token_R, row_state = state
    clipped_S = jnp.minimum(rows_S, last_token_R.shape[0] - 1)
    cut = RowCut(ctx, rows_S.shape[0])
    logits = cut.exchange(model.logits(params, hidden_RD[clipped_S], ctx))[:, : model.vocab_size]
    my_inputs, my_allowed_SW, my_rows_S = jax.tree.map(cut.mine, (inputs, allowed_SW, clipped_S))
    sampled = sample(
        logits,
        my_allowed_SW,
        my_inputs,
        Rows(row_state, my_rows_S),
        max_logprobs=max_logprobs,
        has_all=has_all,
        processors=processors,
    )
    sampled = cut.gather(sampled)
    tokens_S = jnp.maximum(sampled.tokens_S, 0)
    last_token_R = last_token_R.at[rows_S].set(tokens_S, mode="drop")
    counts_RV = row_state.counts_RV.at[rows_S, tokens_S].add(jnp.where(inputs.has_penalties_S, 2, 0), mode="drop")
    return (last_token_R, dataclasses.replace(row_state, counts_RV=counts_RV)), sampled


def score_tokens(
    params: Any,
    hidden_MD: jax.Array,
    inputs: ScoreInputs,
    *,
    model: Model,
    ctx: ModelContext,
    max_logprobs: int,
) -> Scores:
    """Scores given tokens after given positions of a step: what prompt log-probabilities are made of."""
    cut = RowCut(ctx, inputs.token_ids_C.shape[0])
    logits = cut.exchange(model.logits(params, hidden_MD[inputs.places_C], ctx))[:, : model.vocab_size]
    width = min(max_logprobs, model.vocab_size)
    return cut.gather(score(logits, cut.mine(inputs.token_ids_C), width, has_all=True))


def pool(params: Any, hidden_MD: jax.Array, rows_M: jax.Array, *, model: Model, num_rows: int) -> jax.Array:
    """Returns float32 [R, D]: the sum of each row's normed hidden states; `rows_M` is R where a position counts for nobody."""
    normed_MD = model.final_norm(params, hidden_MD).astype(jnp.float32)
    return jnp.zeros((num_rows, normed_MD.shape[1]), jnp.float32).at[rows_M].add(normed_MD, mode="drop")


class RowCut:
    """Rows of a batch cut over the devices that share the model; everything as it is on one device."""

    def __init__(self, ctx: ModelContext, num_rows: int):
        self._ctx = ctx
        self._num_rows = num_rows
        self._padding = -num_rows % ctx.parallel.size

    def _padded(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, self._padding),) + ((0, 0),) * (x.ndim - 1))

    def exchange(self, logits: jax.Array) -> jax.Array:
        """Returns my rows over the whole vocabulary, from all rows over my part of it."""
        if self._ctx.parallel.size == 1:
            return logits
        return lax.all_to_all(self._padded(logits), TENSOR_AXES, split_axis=0, concat_axis=1, tiled=True)

    def mine(self, x: jax.Array) -> jax.Array:
        """Returns my rows of an array that everybody has."""
        if self._ctx.parallel.size == 1:
            return x
        share = (self._num_rows + self._padding) // self._ctx.parallel.size
        return lax.dynamic_slice_in_dim(self._padded(x), self._ctx.device_index() * share, share)

    def gather(self, scored: Scored) -> Scored:
        """Returns everybody's rows, but for the whole vocabulary's log-probabilities."""
        if self._ctx.parallel.size == 1:
            return scored

        def whole(path: Any, x: jax.Array) -> jax.Array:
            if path[-1].name == "all_SV":
                return x
            return lax.all_gather(x, TENSOR_AXES, tiled=True)[: self._num_rows]

        return jax.tree_util.tree_map_with_path(whole, scored)
