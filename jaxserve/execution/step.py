"""The two programs of a step, as pure functions (ADR 0003).

`backbone` computes this step's tokens and leaves the hidden state of each sampling sequence in its row; `head` turns
rows into tokens. Both run per device inside one `shard_map`; both take the state and give it back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.batch import FROM_DEVICE, StepInputs
from jaxserve.execution.sampling import Sampled, SamplingInputs, sample
from jaxserve.execution.state import DeviceState
from jaxserve.models.attention import AttentionContext, PagedCache
from jaxserve.models.model import Model, ModelContext
from jaxserve.plan import kv_groups
from sharding.axes import TENSOR_AXES


def _slots(table_RP: jax.Array, rows_T: jax.Array, positions_T: jax.Array, num_pages: int, page_size: int) -> jax.Array:
    """Returns page * Z + offset of each token; one past the last slot for padding, which the write drops.

    Never -1: a negative index wraps even under mode="drop" and would destroy the last slot.
    """
    is_padding_T = positions_T < 0
    rows_T = jnp.minimum(rows_T, table_RP.shape[0] - 1)
    pages_T = table_RP[rows_T, jnp.maximum(positions_T, 0) // page_size]
    return jnp.where(is_padding_T, num_pages * page_size, pages_T * page_size + positions_T % page_size)


def backbone(
    params: Any, state: DeviceState, inputs: StepInputs, *, model: Model, ctx: ModelContext, attention: AttentionContext
) -> tuple[DeviceState, jax.Array]:
    """Computes one step's tokens.

    Returns:
        The state, and hidden states [R, D] in which the rows that sample are filled.
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
    return state, hidden_RD


def head(
    params: Any,
    last_token_R: jax.Array,
    hidden_RD: jax.Array,
    rows_S: jax.Array,
    allowed_SW: jax.Array,
    sampling: SamplingInputs,
    *,
    model: Model,
    ctx: ModelContext,
    max_logprobs: int,
) -> tuple[jax.Array, Sampled]:
    """Samples the token of each of `rows_S`.

    Over several devices each computes the logits of its part of the vocabulary, they exchange parts for rows
    (all-to-all, [S, V/t] to [S/t, V]), and each samples its rows: nobody ever holds all logits.

    Returns:
        last_token_R with these rows' tokens, and the tokens with their log-probabilities, on every device.
    """
    num_rows = last_token_R.shape[0]
    hidden_SD = hidden_RD[jnp.minimum(rows_S, num_rows - 1)]
    logits = model.logits(params, hidden_SD, ctx)
    devices = ctx.parallel.size
    if devices > 1:
        padding = -rows_S.shape[0] % devices
        logits = jnp.pad(logits, ((0, padding), (0, 0)))
        logits = lax.all_to_all(logits, TENSOR_AXES, split_axis=0, concat_axis=1, tiled=True)
        share = logits.shape[0]

        def my_rows(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
            return lax.dynamic_slice_in_dim(x, ctx.device_index() * share, share)

        sampling, allowed_SW = jax.tree.map(my_rows, (sampling, allowed_SW))
    sampled = sample(
        logits[:, : model.vocab_size], allowed_SW, sampling, max_logprobs, is_deterministic=ctx.linear.is_deterministic
    )
    if devices > 1:
        gathered = jax.tree.map(lambda x: lax.all_gather(x, TENSOR_AXES, tiled=True), sampled)
        sampled = jax.tree.map(lambda x: x[: rows_S.shape[0]], gathered)
    last_token_R = last_token_R.at[rows_S].set(jnp.maximum(sampled.tokens_S, 0), mode="drop")
    return last_token_R, sampled
