"""Ragged paged attention in plain XLA operations: the CPU's implementation, and any platform's fallback.

Knows how to walk the host's work items in loops whose trip counts are data, so that the cost follows the sum of the live
lengths, not the bucket; allocates nothing as wide as a context. Every loop body has one fixed shape (a block of items,
or a tile), whatever the bucket, and splits merge left to right: a row's bits cannot see the rest of its batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.tiling import Tiling
from kernels_pallas.paged_attention.work import RaggedBatch

MIN_DOT_ROWS = 2
"""Fewest query rows in a dot. XLA:CPU computes one row by a matrix-vector routine that adds in another order: measured,
jax 0.10.2, a row's bits are those of a 192-row dot from 2 rows up, and differ at 1."""

MIN_SUM_ELEMENTS = 4096
"""Fewest elements of a block's scores. XLA:CPU sums an array's last axis by another routine, with other bits, from 4096
elements in all (measured on jax 0.10.2, 0.11.2 and 0.12.0.1: 31 rows of 128 differ from 3072 rows, 32 do not)."""

EXP_ELEMENTS = 64
"""A multiple of every vector's length."""

DOT_COLUMNS, DOT_ROWS = 64, 32
"""Where the columns of weights @ values are no multiple of the first, a product has at most as many rows as the second.
XLA:CPU's dots are YNNPACK's, which then takes another routine, with other bits, for many rows than for few (measured, jax
0.10.2 on an AMD EPYC with AVX-512: 32, 80, 96 and 160 columns differ between 48 rows and 56; 64, 128 and 256 never)."""

BLOCK_BYTES = 1 << 20
"""Keys of a block of decode items, which with its values should stay in a core's caches: 0.5 to 2 MiB are alike, 4 slower."""


def paged_attention_xla(
    q_TNH: jax.Array,
    k_pages_GKZH: jax.Array,
    v_pages_GKZH: jax.Array,
    block_tables_RP: jax.Array,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    tiling: Tiling,
) -> jax.Array:
    """See `api.paged_attention`; every argument that it accepts works here."""
    T, N, H = q_TNH.shape
    Z = k_pages_GKZH.shape[2]
    if tiling.split_size % Z:
        raise NotImplementedError(f"split_size {tiling.split_size} is not a multiple of the page size {Z}")
    attend = _Attend(k_pages_GKZH, v_pages_GKZH, block_tables_RP, scale, sliding_window, soft_cap, tiling)
    # A logit of minus infinity adds exactly zero.
    sinks_N = jnp.full((N,), -jnp.inf, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    # Tiles read and write whole; the last one may reach past the last token.
    out_TNH = jnp.zeros((T + tiling.query_tile, N, H), q_TNH.dtype)
    if batch.prefill_tiles_W4.shape[0]:
        out_TNH = _prefill(q_TNH, out_TNH, batch, sinks_N, attend)
    if batch.decode_first_D1.shape[0] > 1 and batch.decode_items_W4.shape[0]:
        out_TNH = _decode(q_TNH, out_TNH, batch, sinks_N, attend)
    return out_TNH[:T]


class _Attend:
    """Attention of query blocks to one KV split each, over one layer's pages."""

    def __init__(self, k_pages_GKZH, v_pages_GKZH, block_tables_RP, scale, sliding_window, soft_cap, tiling):
        self.k_pages_GKZH, self.v_pages_GKZH = k_pages_GKZH, v_pages_GKZH
        self.block_tables_RP = block_tables_RP
        self.scale, self.sliding_window, self.soft_cap = scale, sliding_window, soft_cap
        self.tiling = tiling
        self.num_kv_heads = k_pages_GKZH.shape[1]

    def first_split_start(self, position):
        """Returns where the split that holds the oldest key seen from `position` starts."""
        if self.sliding_window is None:
            return jnp.zeros_like(position)
        oldest = jnp.maximum(position - (self.sliding_window - 1), 0)
        return oldest - oldest % self.tiling.split_size

    def split(self, q_BKMH, position_BM, row_B, kv_start_B, kv_stop_B):
        """Returns the (accumulator, maximum, sum) of M query rows a block over [kv_start, kv_stop), in float32.

        A row that sees no key gets (0, -inf, 0). Keys from kv_stop on are never let into a product: they may be NaN.
        """
        B, K = q_BKMH.shape[:2]
        Z, H = self.k_pages_GKZH.shape[2:]
        C = self.tiling.split_size
        P = self.block_tables_RP.shape[1]
        kv_position_BC = kv_start_B[:, None] + jnp.arange(C, dtype=jnp.int32)[None, :]
        page_index_BQ = kv_start_B[:, None] // Z + jnp.arange(C // Z, dtype=jnp.int32)[None, :]
        # The last split may reach past the table's end, and entries past a sequence's pages may hold anything.
        page_BQ = self.block_tables_RP.at[row_B[:, None], jnp.minimum(page_index_BQ, P - 1)].get(mode="clip")
        head_K = jnp.arange(K, dtype=jnp.int32)
        k_BKCH, v_BKCH = (
            pages.at[page_BQ[:, None, :], head_K[None, :, None]].get(mode="clip").reshape(B, K, C, H)
            for pages in (self.k_pages_GKZH, self.v_pages_GKZH)
        )
        alive_BC = kv_position_BC < kv_stop_B[:, None]
        v_BKCH = jnp.where(alive_BC[:, None, :, None], v_BKCH.astype(jnp.float32), 0)

        score_BKMC = jnp.einsum("bkmh,bkch->bkmc", q_BKMH, k_BKCH.astype(jnp.float32), precision="highest")
        score_BKMC *= self.scale
        if self.soft_cap is not None:
            score_BKMC = self.soft_cap * jnp.tanh(score_BKMC * (1 / self.soft_cap))
        seen_BMC = (kv_position_BC[:, None, :] <= position_BM[:, :, None]) & alive_BC[:, None, :]
        if self.sliding_window is not None:
            seen_BMC &= kv_position_BC[:, None, :] > position_BM[:, :, None] - self.sliding_window
        score_BKMC = jnp.where(seen_BMC[:, None], score_BKMC, -jnp.inf)
        max_BKM = jnp.max(score_BKMC, axis=-1)
        weight_BKMC = jnp.exp(score_BKMC - _finite(max_BKM)[..., None])
        sum_BKM = jnp.sum(weight_BKMC, axis=-1)
        return _weighted_sum(weight_BKMC, v_BKCH), max_BKM, sum_BKM


def _weighted_sum(weight_BKMC, v_BKCH):
    """Returns weights @ values, a row's bits whatever the number of rows (see DOT_ROWS)."""
    M, H = weight_BKMC.shape[2], v_BKCH.shape[3]
    rows = DOT_ROWS if H % DOT_COLUMNS else M
    parts = (weight_BKMC[:, :, i : i + rows] for i in range(0, M, rows))
    return jnp.concatenate([jnp.einsum("bkmc,bkch->bkmh", w, v_BKCH, precision="highest") for w in parts], axis=2)


def _finite(maximum):
    """Returns the maximum, or 0 where a row has seen nothing, so that -inf - (-inf) never arises."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def _exp(x):
    """Returns exp(x) by one routine, whatever is around it and however small it is.

    A loop that also reads along another layout, and what is left over when vectors are full, take a scalar one, whose result
    differs by an ulp (measured, jax 0.12.0.1).
    """
    flat = jnp.pad(x.reshape(-1), (0, -x.size % EXP_ELEMENTS))
    return lax.optimization_barrier(jnp.exp(lax.optimization_barrier(flat)))[: x.size].reshape(x.shape)


def _merge(left, right):
    """Returns the state of two adjacent KV ranges; exactly the other one where a side has seen nothing.

    One product and one sum an element, on purpose, and the product rounded before it is added. In `a * x + b * y` the compiler
    may fuse either product into the sum, in `a + b * y` the only one; it chose differently in the decode and in the prefill
    program (jax 0.10.2 the former, 0.12 the latter): equal splits, different bits past the first.
    """
    acc_l, max_l, sum_l = left
    acc_r, max_r, sum_r = right
    right_is_high = max_r > max_l
    maximum = jnp.maximum(max_l, max_r)
    shrink = _exp(jnp.minimum(max_l, max_r) - _finite(maximum))
    high = right_is_high[..., None]
    products = (jnp.where(high, acc_l, acc_r) * shrink[..., None], jnp.where(right_is_high, sum_l, sum_r) * shrink)
    acc, total = lax.optimization_barrier(products)
    return jnp.where(high, acc_r, acc_l) + acc, maximum, jnp.where(right_is_high, sum_r, sum_l) + total


def _finish(state, sink):
    """Returns the output of a state; a sink is one more key of value zero. Rows that have seen nothing give zero."""
    acc, maximum, total = state
    final = _finite(jnp.maximum(maximum, sink))
    keep = _exp(maximum - final)
    total = total * keep + _exp(sink - final)
    return acc * (keep / jnp.where(total == 0, 1.0, total))[..., None]


def _nothing_seen(*shape):
    *rows, H = shape
    return jnp.zeros(shape, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)


def _decode(q_TNH, out_TNH, batch, sinks_N, attend):
    """Attends the one-token sequences: partials of every item, block by block, then their combine by token."""
    _, N, H = q_TNH.shape
    K = attend.num_kv_heads
    M = max(N // K, MIN_DOT_ROWS)
    first_D1 = batch.decode_first_D1
    D = first_D1.shape[0] - 1
    # An operation costs 1 to 2 µs whatever it holds: few sequences take few items at once, many as many as caches hold.
    item_bytes = K * attend.tiling.split_size * H * 4
    B = max(attend.tiling.decode_block, min(D, BLOCK_BYTES // item_bytes))
    B = max(B, -(-MIN_SUM_ELEMENTS // (K * M * attend.tiling.split_size)))
    if D + attend.tiling.query_tile > out_TNH.shape[0]:
        raise ValueError(f"{D} decode slots in a bucket of {out_TNH.shape[0] - attend.tiling.query_tile} tokens")
    num_items = first_D1[-1]
    # Blocks are whole even at the end of the list: a dynamic_slice that would overrun moves its start back.
    items_W4 = jnp.pad(batch.decode_items_W4, ((0, -batch.decode_items_W4.shape[0] % B), (0, 0)))
    W = items_W4.shape[0]

    def partials_of_block(i, partials):
        item_B4 = lax.dynamic_slice_in_dim(items_W4, i * B, B)
        token_B, row_B, start_B, stop_B = (item_B4[:, j] for j in range(4))
        q_BKMH = q_TNH.at[token_B].get(mode="clip").reshape(B, K, N // K, H).astype(jnp.float32)
        q_BKMH = jnp.pad(q_BKMH, ((0, 0), (0, 0), (0, M - N // K), (0, 0)))
        # The query's position is one before its sequence's end, which is the end of the token's last item.
        last_B = first_D1.at[token_B + 1].get(mode="clip") - 1
        position_B = items_W4.at[last_B, 3].get(mode="clip") - 1
        position_BM = jnp.broadcast_to(position_B[:, None], (B, M))
        new = attend.split(q_BKMH, position_BM, row_B, start_B, stop_B)
        return jax.tree.map(lambda all_W, one_B: lax.dynamic_update_slice_in_dim(all_W, one_B, i * B, 0), partials, new)

    num_blocks = (num_items + (B - 1)) // B
    partials = lax.fori_loop(0, num_blocks, partials_of_block, _nothing_seen(W, K, M, H))

    count_D = first_D1[1:] - first_D1[:-1]

    def merge_next(j, state):
        item_D = first_D1[:-1] + j
        right = jax.tree.map(lambda a: a.at[item_D].get(mode="clip"), partials)
        merged = _merge(state, right)
        alive_D = j < count_D
        return jax.tree.map(lambda new, old: jnp.where(alive_D.reshape(-1, *[1] * (new.ndim - 1)), new, old), merged, state)

    state = lax.fori_loop(0, jnp.max(count_D), merge_next, _nothing_seen(D, K, M, H))
    sink_DKM = jnp.pad(sinks_N.reshape(1, K, N // K), ((0, 0), (0, 0), (0, M - N // K)))
    new_DNH = _finish(state, sink_DKM)[:, :, : N // K].reshape(D, N, H).astype(out_TNH.dtype)
    # Slots past the decodes are tokens of prefill tiles.
    new_DNH = jnp.where((count_D > 0)[:, None, None], new_DNH, out_TNH[:D])
    return lax.dynamic_update_slice_in_dim(out_TNH, new_DNH, 0, 0)


def _prefill(q_TNH, out_TNH, batch, sinks_N, attend):
    """Attends the tiles of the other sequences, each over its splits up to the causal bound."""
    _, N, H = q_TNH.shape
    K, U, C = attend.num_kv_heads, attend.tiling.query_tile, attend.tiling.split_size
    G = N // K
    tiles_W4 = batch.prefill_tiles_W4
    q_TNH = jnp.pad(q_TNH, ((0, U), (0, 0), (0, 0)))
    sink_1KM = jnp.tile(sinks_N.reshape(1, K, 1, G), (1, 1, U, 1)).reshape(1, K, U * G)

    def attend_tile(i, out_TNH):
        q_start, q_len, row, position = (tiles_W4[i, j] for j in range(4))
        q_UNH = lax.dynamic_slice_in_dim(q_TNH, q_start, U).astype(jnp.float32)
        q_1KMH = q_UNH.reshape(U, K, G, H).swapaxes(0, 1).reshape(1, K, U * G, H)
        position_1M = jnp.repeat(position + jnp.arange(U, dtype=jnp.int32), G)[None, :]
        kv_stop = position + q_len
        first = attend.first_split_start(position) // C

        def next_split(j, state):
            start_1 = (j * C)[None]
            return _merge(state, attend.split(q_1KMH, position_1M, row[None], start_1, kv_stop[None]))

        state = lax.fori_loop(first, (kv_stop + (C - 1)) // C, next_split, _nothing_seen(1, K, U * G, H))
        new_UNH = _finish(state, sink_1KM).reshape(K, U, G, H).swapaxes(0, 1).reshape(U, N, H)
        # Rows past q_len belong to the next sequence (or to nobody): leave them as they are.
        mine_U11 = (jnp.arange(U, dtype=jnp.int32) < q_len)[:, None, None]
        old_UNH = lax.dynamic_slice_in_dim(out_TNH, q_start, U)
        new_UNH = jnp.where(mine_U11, new_UNH.astype(out_TNH.dtype), old_UNH)
        return lax.dynamic_update_slice_in_dim(out_TNH, new_UNH, q_start, 0)

    num_tiles = jnp.sum(tiles_W4[:, 1] > 0, dtype=jnp.int32)
    return lax.fori_loop(0, num_tiles, attend_tile, out_TNH)
