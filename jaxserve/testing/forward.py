"""A model's logits at every position, without an engine: one sequence, prefilled whole into pages of its own on one device."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.attention import AttentionContext, PagedCache
from jaxserve.models.linear import LinearContext
from jaxserve.models.model import Model, ModelContext
from jaxserve.plan import kv_groups
from kernels_pallas.paged_attention.api import default_tiling, plan_ragged_batch
from sharding.mesh import TensorParallelism

PAGE_SIZE = 16


def all_logits(model: Model, leaves: Mapping[str, np.ndarray], token_ids: Sequence[int]) -> np.ndarray:
    """Returns float32 logits [T, V] of a prompt of at least 2 tokens.

    Args:
        model: cut over one device.
        leaves: the canonical tree, {path: array}.
        token_ids: the prompt.
    """
    num_tokens, specs = len(token_ids), model.kv_specs()
    num_pages = -(-num_tokens // PAGE_SIZE)
    tiling = default_tiling(
        "cpu",
        num_q_heads=model.num_heads,
        num_kv_heads=specs[0].num_kv_heads,
        head_dim=specs[0].head_dim,
        page_size=PAGE_SIZE,
    )
    batch = plan_ragged_batch(
        [0],
        [num_tokens],
        [num_tokens],
        num_seq_slots=1,
        num_decode_slots=0,
        max_decode_items=0,
        max_prefill_tiles=-(-num_tokens // tiling.query_tile),
        split_size=tiling.split_size,
        query_tile=tiling.query_tile,
    )
    ctx = ModelContext(LinearContext("cpu"), TensorParallelism())
    groups = kv_groups(specs)
    positions_T = jnp.arange(num_tokens, dtype=jnp.int32)

    def forward(leaves: Mapping[str, jax.Array], tokens_T: jax.Array) -> jax.Array:
        params = model.served_layout(leaves)
        pages = tuple(jnp.zeros((num_pages, s.num_kv_heads, PAGE_SIZE, s.head_dim), jnp.float32) for s in specs)
        cache = PagedCache(
            specs=specs,
            group_of_layer=tuple(groups.index(spec) for spec in specs),
            k_pages=pages,
            v_pages=pages,
            block_tables=(jnp.arange(num_pages, dtype=jnp.int32)[None, :],) * len(groups),
            slots=(positions_T,) * len(groups),
            rows_T=jnp.zeros(num_tokens, jnp.int32),
            positions_T=positions_T,
            prompt_lens_T=jnp.full(num_tokens, num_tokens, jnp.int32),
            batch=jax.tree.map(jnp.asarray, batch),
            context=AttentionContext(tiling),
        )
        return model.logits(params, model.backbone(params, tokens_T, positions_T, cache, ctx), ctx)

    on_device = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    return np.asarray(jax.jit(forward)(on_device, jnp.asarray(token_ids, jnp.int32)))
