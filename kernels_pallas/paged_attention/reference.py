"""The specification of ragged paged attention, in plain jnp.

Knows what the answer is; does not know splits, tiles or work items, and does not care what it costs: it gathers every
token's whole context. Reads `rows`, `kv_lens`, `cu_q_lens` and `num_seqs` of the batch and nothing else.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.paged_attention.work import RaggedBatch


def paged_attention_reference(
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
) -> jax.Array:
    """Returns causal attention of each query token over the pages of its sequence; zeros for tokens of no sequence.

    The arithmetic is float64 when q is, else float32. A query at position p sees positions (p - sliding_window, p].
    """
    T, N, H = q_TNH.shape
    _, K, Z, _ = k_pages_GKZH.shape
    R, P = block_tables_RP.shape
    dtype = jnp.float64 if q_TNH.dtype == jnp.float64 else jnp.float32

    token_T = jnp.arange(T, dtype=jnp.int32)
    num_tokens = batch.cu_q_lens_S1[batch.num_seqs_1[0]]
    seq_T = jnp.searchsorted(batch.cu_q_lens_S1, token_T, side="right").astype(jnp.int32) - 1
    seq_T = jnp.clip(seq_T, 0, batch.num_seqs_1[0] - 1)
    # Token t is the (end - t)-th from the end of its sequence, whose last token is at position kv_len - 1.
    position_T = jnp.asarray(batch.kv_lens_S)[seq_T] - (jnp.asarray(batch.cu_q_lens_S1)[seq_T + 1] - token_T)

    pages_TP = block_tables_RP[jnp.asarray(batch.rows_S)[seq_T]]
    k_TCKH, v_TCKH = (
        jnp.swapaxes(pages.at[pages_TP].get(mode="clip"), 2, 3).reshape(T, P * Z, K, H).astype(dtype)
        for pages in (k_pages_GKZH, v_pages_GKZH)
    )
    kv_position_C = jnp.arange(P * Z, dtype=jnp.int32)
    seen_TC = kv_position_C[None, :] <= position_T[:, None]
    if sliding_window is not None:
        seen_TC &= kv_position_C[None, :] > position_T[:, None] - sliding_window

    q_TKNH = q_TNH.reshape(T, K, N // K, H).astype(dtype)
    score_TKNC = jnp.einsum("tkgh,tckh->tkgc", q_TKNH, k_TCKH, precision="highest") * scale
    if soft_cap is not None:
        score_TKNC = soft_cap * jnp.tanh(score_TKNC / soft_cap)
    score_TKNC = jnp.where(seen_TC[:, None, None, :], score_TKNC, -jnp.inf)
    # A sink is one more key with a logit of its own and a value of zero; a logit of minus infinity adds nothing.
    sinks_N = jnp.full((N,), -jnp.inf, dtype) if sinks_N is None else sinks_N.astype(dtype)
    sink_TKN1 = jnp.broadcast_to(sinks_N.reshape(1, K, N // K, 1), (T, K, N // K, 1))
    max_TKN1 = jnp.maximum(jnp.max(score_TKNC, axis=-1, keepdims=True), sink_TKN1)
    weight_TKNC = jnp.exp(score_TKNC - max_TKN1)
    total_TKN1 = jnp.sum(weight_TKNC, axis=-1, keepdims=True) + jnp.exp(sink_TKN1 - max_TKN1)
    # Unseen values are zeroed, not only weighted by zero: stale pages may hold NaN, and 0 * NaN is NaN.
    v_TCKH = jnp.where(seen_TC[:, :, None, None], v_TCKH, 0)
    out_TKNH = jnp.einsum("tkgc,tckh->tkgh", weight_TKNC / total_TKN1, v_TCKH, precision="highest")
    out_TNH = out_TKNH.reshape(T, N, H).astype(q_TNH.dtype)
    return jnp.where((token_T < num_tokens)[:, None, None], out_TNH, 0)
