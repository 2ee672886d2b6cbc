"""The ragged paged attention that the engine calls: one signature over every backend.

Knows the contract and checks shapes; the backends know the arithmetic. Stateless.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.paged_attention.tiling import Tiling, default_tiling
from kernels_pallas.paged_attention.work import (
    RaggedBatch,
    empty_ragged_batch,
    num_decode_items,
    num_prefill_tiles,
    plan_ragged_batch,
)
from kernels_pallas.paged_attention.xla import paged_attention_xla

__all__ = [
    "RaggedBatch",
    "Tiling",
    "check_supported",
    "default_tiling",
    "empty_ragged_batch",
    "num_decode_items",
    "num_prefill_tiles",
    "paged_attention",
    "plan_ragged_batch",
]


def _paged_attention_triton(*args: Any, **kwargs: Any) -> jax.Array:
    from kernels_pallas.paged_attention.triton import (
        paged_attention_triton,
    )  # Pallas: 0.25 s to import, and a CPU needs none

    return paged_attention_triton(*args, **kwargs)


IMPLEMENTATIONS = {
    "triton": _paged_attention_triton,
    "triton_interpret": functools.partial(_paged_attention_triton, interpret=True),
    "xla": paged_attention_xla,
}


def paged_attention(
    q_TNH: jax.Array,
    k_pages_GKZH: jax.Array,
    v_pages_GKZH: jax.Array,
    block_tables_RP: jax.Array,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    tiling: Tiling,
    backend: str = "auto",
) -> jax.Array:
    """Attends each query token causally to the pages of its sequence.

    This step's keys and values must be in the pages already (`kv_write` first). A bucket without prefill tiles traces no
    prefill code, one without decode slots no decode code.

    Args:
      q_TNH: queries, tokens of a sequence together, one-token sequences first.
      k_pages_GKZH: the pool of keys.
      v_pages_GKZH: the pool of values.
      block_tables_RP: page ids of each row, in order; entries past a sequence's pages may be anything.
      batch: from `plan_ragged_batch` with this `tiling`'s split_size and query_tile.
      scale: multiplies q . k.
      sliding_window: a query at position p sees (p - sliding_window, p]; None sees all before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      sinks_N: one logit a head that takes its share of the softmax and adds nothing.
      tiling: sizes of splits and tiles, from `default_tiling`.
      backend: "auto", "xla", "triton", or "triton_interpret" (tests).

    Returns:
      [T, N, H] in q's dtype; tokens of no sequence hold something finite.

    Raises:
      ValueError: shapes that do not belong together, or an unknown backend.
      NotImplementedError: no backend takes the arguments; the message has every reason.
    """
    # A no-op on tracers; numpy arrays cannot be indexed by the kernels' loop counters.
    operands = jax.tree.map(jnp.asarray, (q_TNH, k_pages_GKZH, v_pages_GKZH, block_tables_RP, batch))
    _, N, H = q_TNH.shape
    _, K, _, page_H = k_pages_GKZH.shape
    if v_pages_GKZH.shape != k_pages_GKZH.shape or page_H != H or N % K:
        raise ValueError(
            f"q {q_TNH.shape} must be [tokens, heads, head_dim] with heads a multiple of the KV heads, and keys "
            f"{k_pages_GKZH.shape} and values {v_pages_GKZH.shape} both [pages, KV heads, page size, head_dim]"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 (the query itself) or None, got {sliding_window}")
    return dispatch.choose_and_call(
        "paged_attention",
        IMPLEMENTATIONS,
        backend,
        *operands,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks_N=None if sinks_N is None else jnp.asarray(sinks_N),
        tiling=tiling,
    )


def check_supported(
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str,
    tiling: Tiling,
    backend: str,
) -> None:
    """Raises NotImplementedError, with every reason, unless `backend` takes a model of this shape on this platform.

    Traces an empty step, so what it says and what a real step meets cannot differ.
    """
    batch = empty_ragged_batch(num_seq_slots=1, num_decode_slots=1, max_decode_items=1, max_prefill_tiles=1)
    q = jax.ShapeDtypeStruct((1, num_q_heads, head_dim), dtype)
    pages = jax.ShapeDtypeStruct((1, num_kv_heads, page_size, head_dim), kv_dtype)
    attend = functools.partial(paged_attention, scale=1.0, tiling=tiling, backend=backend)
    jax.eval_shape(attend, q, pages, pages, jax.ShapeDtypeStruct((1, 1), jnp.int32), batch)
