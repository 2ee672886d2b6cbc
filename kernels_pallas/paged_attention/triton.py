"""Ragged paged attention as Pallas-Triton kernels: decode over splits, its combine, and prefill over query tiles.

Knows how the host's work items map to programs: one (item, block of a KV head's query heads) of the padded list a program;
padding leaves at once. Decode packs query heads into the rows of the matrix unit, prefill query tokens x heads. Both walk
the same splits with `_attend_split` and merge them left to right with `_merge`, in float32, so that a position's order of
operations is the same in either. Scores live in base 2 (exp2 is one instruction): scale * log2(e) is one factor.

Source: split-KV with host-planned items, FlashInfer (MLSys 2025); head packing, FlashAttention-3 (PackGQA).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import dispatch, pallas_triton
from kernels_pallas.paged_attention.tiling import Tiling
from kernels_pallas.paged_attention.work import RaggedBatch

LOG2_E = math.log2(math.e)
MIN_DOT_ROWS = 16
"""The matrix unit's rows: fewer are padded to it by Triton and are not faster."""
MAX_HEAD_DIM = 256
MAX_PREFILL_ROWS = 128
COMBINE_ELEMENTS = 4096
"""Elements of a combine program's accumulator: twice as many spill on an A100 (two warps hold two of them)."""


def paged_attention_triton(
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
    interpret: bool = False,
) -> jax.Array:
    """See `api.paged_attention`.

    Raises:
      NotImplementedError: a dtype, head_dim or tiling that the kernels are not written for, or a platform without Triton.
    """
    refusals = _refusals(q_TNH, k_pages_GKZH, tiling, interpret)
    if refusals:
        raise NotImplementedError("; ".join(refusals))
    T = q_TNH.shape[0]
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32) * LOG2_E,)
    attend = _Attend(q_TNH, k_pages_GKZH, block_tables_RP, scale, sliding_window, soft_cap, tiling, interpret)
    out_TNH = jnp.zeros_like(q_TNH)
    operands = (q_TNH, k_pages_GKZH, v_pages_GKZH, block_tables_RP)
    if batch.prefill_tiles_W4.shape[0]:
        out_TNH = _prefill(attend, operands, batch, sinks, out_TNH)
    num_decode_slots = batch.decode_first_D1.shape[0] - 1
    if num_decode_slots > T:
        raise ValueError(f"{num_decode_slots} decode slots in a bucket of {T} tokens")
    if num_decode_slots and batch.decode_items_W4.shape[0]:
        out_TNH = _decode(attend, operands, batch, sinks, out_TNH)
    return out_TNH


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n: Triton has no other array sizes."""
    return 1 << (n - 1).bit_length()


def _refusals(q_TNH, k_pages_GKZH, tiling, interpret) -> list[str]:
    _, N, H = q_TNH.shape
    dtype = q_TNH.dtype
    heads = min(_power_of_two(N // k_pages_GKZH.shape[1]), tiling.head_block)
    rows = heads * tiling.query_tile
    checks = (
        (interpret or dispatch.current_platform() == "gpu", f"no Triton on platform {dispatch.current_platform()!r}"),
        (dtype in (jnp.bfloat16, jnp.float16, jnp.float32), f"q is {dtype}, not bfloat16, float16 or float32"),
        (k_pages_GKZH.dtype == dtype, f"pages are {k_pages_GKZH.dtype}, q is {dtype}"),
        (H <= MAX_HEAD_DIM, f"head_dim {H} > {MAX_HEAD_DIM}"),
        (tiling.kv_block >= 16 and tiling.kv_block == _power_of_two(tiling.kv_block), "kv_block not a power of two >= 16"),
        (tiling.split_size % tiling.kv_block == 0, f"split_size {tiling.split_size} % kv_block {tiling.kv_block}"),
        (rows == _power_of_two(rows), f"query_tile {tiling.query_tile} or head_block {heads} not a power of two"),
        (rows <= MAX_PREFILL_ROWS, f"query_tile {tiling.query_tile} x {heads} heads > {MAX_PREFILL_ROWS} rows"),
    )
    return [reason for holds, reason in checks if not holds]


class _Attend:
    """The static part of a launch, and attention of M query rows to one KV split inside a kernel."""

    def __init__(self, q_TNH, k_pages_GKZH, block_tables_RP, scale, sliding_window, soft_cap, tiling, interpret):
        self.num_tokens, self.num_q_heads, self.head_dim = q_TNH.shape
        self.num_pages, self.num_kv_heads, self.page_size, _ = k_pages_GKZH.shape
        self.table_width = block_tables_RP.shape[1]
        self.group = self.num_q_heads // self.num_kv_heads
        self.block_heads = min(_power_of_two(self.group), tiling.head_block)
        self.blocks_per_group = -(-self.group // self.block_heads)
        self.num_blocks = self.num_kv_heads * self.blocks_per_group
        self.padded_head_dim = max(_power_of_two(self.head_dim), 16)
        self.scale, self.sliding_window, self.soft_cap = scale, sliding_window, soft_cap
        self.tiling, self.interpret = tiling, interpret

    def rows(self, num_rows, rows_per_token, block):
        """Returns the block's KV head and (token offset, query head, is a head) of each of M rows.

        Row m is token m // rows_per_token. Worked example, 2 KV heads of 7 query heads, block_heads 4: block 3 is the second
        half of KV head 1, so 4 rows a token are query heads 11, 12, 13 and none.
        """
        kv_head = block // self.blocks_per_group
        row_M = jnp.arange(num_rows, dtype=jnp.int32)
        in_block_M = row_M % rows_per_token
        in_group_M = (block % self.blocks_per_group) * self.block_heads + in_block_M
        is_head_M = (in_block_M < self.block_heads) & (in_group_M < self.group)
        return kv_head, (row_M // rows_per_token, kv_head * self.group + in_group_M, is_head_M)

    def head_mask(self, mask_M):
        """Returns (index along head_dim, mask of the padded [M, head_dim] tile)."""
        index_H = jnp.arange(self.padded_head_dim, dtype=jnp.int32)
        return index_H[None, :], mask_M[:, None] & (index_H < self.head_dim)[None, :]

    def first_seen(self, position):
        """Returns the oldest position seen from `position`."""
        if self.sliding_window is None:
            return jnp.zeros_like(position)
        return jnp.maximum(position - (self.sliding_window - 1), 0)

    def split(self, refs, q_MH, position_M, row, kv_head, kv_first, kv_start, kv_stop):
        """Returns the (accumulator, maximum, sum) of M rows over [kv_start, kv_stop), from the block of kv_first on.

        Blocks before kv_first are out of every row's window; leaving them out changes no bit. Keys from kv_stop on are
        never read: they may be NaN.
        """
        k_ref, v_ref, table_ref = refs
        X, Z = self.tiling.kv_block, self.page_size

        def next_block(j, state):
            acc_MH, max_M, sum_M = state
            kv_position_X = kv_start + j * X + jnp.arange(X, dtype=jnp.int32)
            alive_X = kv_position_X < kv_stop
            page_X = pallas_triton.load_tile(table_ref, (row, kv_position_X // Z), alive_X)
            page_X = jnp.clip(page_X, 0, self.num_pages - 1)
            index_1H, mask_XH = self.head_mask(alive_X)
            where_XH = (page_X[:, None], kv_head, (kv_position_X % Z)[:, None], index_1H)
            k_XH = pallas_triton.load_tile(k_ref, where_XH, mask_XH)
            v_XH = pallas_triton.load_tile(v_ref, where_XH, mask_XH)

            score_MX = pallas_triton.dot(q_MH, k_XH, trans_b=True)
            if self.soft_cap is None:
                score_MX = score_MX * (self.scale * LOG2_E)
            else:
                score_MX = jnp.tanh(score_MX * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2_E)
            # What a query sees ends before kv_stop: blocks never cross a split, and its own position is a live one.
            age_MX = position_M[:, None] - kv_position_X[None, :]
            seen_MX = age_MX >= 0 if self.sliding_window is None else age_MX.astype(jnp.uint32) < self.sliding_window
            score_MX = jnp.where(seen_MX, score_MX, -jnp.inf)
            new_max_M = jnp.maximum(max_M, jnp.max(score_MX, axis=1))
            finite_M = _finite(new_max_M)
            weight_MX = jnp.exp2(score_MX - finite_M[:, None])
            shrink_M = jnp.exp2(max_M - finite_M)
            sum_M = sum_M * shrink_M + jnp.sum(weight_MX, axis=1)
            acc_MH = acc_MH * shrink_M[:, None] + pallas_triton.dot(weight_MX.astype(v_XH.dtype), v_XH)
            return acc_MH, new_max_M, sum_M

        first = jnp.maximum(kv_first - kv_start, 0) // X
        last = (kv_stop - kv_start + (X - 1)) // X
        return lax.fori_loop(first, last, next_block, _nothing_seen(*q_MH.shape))


def _finite(maximum):
    """Returns the maximum, or 0 where a row has seen nothing, so that -inf - (-inf) never arises."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def _nothing_seen(M, H):
    return jnp.zeros((M, H), jnp.float32), jnp.full((M,), -jnp.inf, jnp.float32), jnp.zeros((M,), jnp.float32)


def _merge(left, right):
    """Returns the state of two adjacent KV ranges; exactly the other one where a side has seen nothing.

    One product and one sum an element: in `a * x + b * y` a compiler may fuse either product into the sum (see `xla`).
    """
    acc_l, max_l, sum_l = left
    acc_r, max_r, sum_r = right
    right_is_high = max_r > max_l
    maximum = jnp.maximum(max_l, max_r)
    shrink = jnp.exp2(jnp.minimum(max_l, max_r) - _finite(maximum))
    high = right_is_high[:, None]
    acc = jnp.where(high, acc_r, acc_l) + jnp.where(high, acc_l, acc_r) * shrink[:, None]
    total = jnp.where(right_is_high, sum_r, sum_l) + jnp.where(right_is_high, sum_l, sum_r) * shrink
    return acc, maximum, total


def _finish(state, sink_M=None):
    """Returns the output of a state; a sink is one more key of value zero. Rows that have seen nothing give zero."""
    acc_MH, max_M, sum_M = state
    keep_M = 1.0
    if sink_M is not None:
        final_M = _finite(jnp.maximum(max_M, sink_M))
        keep_M = jnp.exp2(max_M - final_M)
        sum_M = sum_M * keep_M + jnp.exp2(sink_M - final_M)
    return acc_MH * (keep_M / jnp.where(sum_M == 0, 1.0, sum_M))[:, None]


def _decode(attend, operands, batch, sinks, out_TNH):
    """Runs the split kernel over every item and the combine over every decode slot."""
    N, H = attend.num_q_heads, attend.head_dim
    W, D = batch.decode_items_W4.shape[0], batch.decode_first_D1.shape[0] - 1
    tiling = attend.tiling
    float_shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((W, N, H), (W, N), (W, N))]
    partials = pallas_triton.call(
        functools.partial(_decode_kernel, attend),
        (*operands, batch.decode_items_W4, batch.decode_first_D1),
        grid=(W, attend.num_blocks),
        out_shape=float_shapes,
        num_warps=tiling.decode_num_warps,
        num_stages=tiling.decode_num_stages,
        interpret=attend.interpret,
        name="paged_attention_decode",
    )
    (out_TNH,) = pallas_triton.call(
        functools.partial(_combine_kernel, attend),
        (out_TNH, *partials, batch.decode_first_D1, *sinks),
        grid=(D, -(-N // _combine_rows(attend))),
        out_shape=[jax.ShapeDtypeStruct(out_TNH.shape, out_TNH.dtype)],
        num_warps=2,
        num_stages=3,
        interpret=attend.interpret,
        name="paged_attention_combine",
        aliases={0: 0},
    )
    return out_TNH


def _decode_kernel(attend, q_ref, k_ref, v_ref, table_ref, items_ref, first_ref, acc_ref, max_ref, sum_ref):
    """One program: one item and one block of heads. Padding items make no trip and store nothing."""
    item, block = pallas_triton.program_id(0), pallas_triton.program_id(1)
    token, row, kv_start, kv_stop = (items_ref[item, j] for j in range(4))
    # The query's position is one before its sequence's end, which is the end of the token's last item.
    last_item = jnp.maximum(first_ref[token + 1] - 1, 0)
    position = items_ref[last_item, 3] - 1
    M = max(attend.block_heads, MIN_DOT_ROWS)
    # Rows past the block only fill the matrix unit. No two rows have one index: a masked store would put the old value back.
    kv_head, (_, head_M, is_head_M) = attend.rows(M, M, block)
    index_1H, mask_MH = attend.head_mask(is_head_M)
    q_MH = pallas_triton.load_tile(q_ref, (token, head_M[:, None], index_1H), mask_MH)
    position_M = jnp.full((M,), position, jnp.int32)
    refs = (k_ref, v_ref, table_ref)
    # An item whose keys are all out of the window starts past its end: no trip, and (0, -inf, 0) for the combine.
    kv_first = attend.first_seen(position)
    state = attend.split(refs, q_MH, position_M, row, kv_head, kv_first, kv_start, kv_stop)
    alive = kv_stop > kv_start
    pallas_triton.store_tile(acc_ref, (item, head_M[:, None], index_1H), state[0], mask_MH & alive)
    pallas_triton.store_tile(max_ref, (item, head_M), state[1], is_head_M & alive)
    pallas_triton.store_tile(sum_ref, (item, head_M), state[2], is_head_M & alive)


def _combine_rows(attend):
    """Returns how many heads a combine program merges: a group's, or fewer where those would not fit into registers."""
    return min(_power_of_two(attend.group), COMBINE_ELEMENTS // attend.padded_head_dim)


def _combine_kernel(attend, _, acc_ref, max_ref, sum_ref, first_ref, *sinks_and_out):
    """One program: one decode slot and some of its heads; merges the token's items in order."""
    *sinks_refs, out_ref = sinks_and_out
    token, first_head = pallas_triton.program_id(0), pallas_triton.program_id(1) * _combine_rows(attend)
    first, last = first_ref[token], first_ref[token + 1]
    head_M = first_head + jnp.arange(_combine_rows(attend), dtype=jnp.int32)
    is_head_M = head_M < attend.num_q_heads
    index_1H, mask_MH = attend.head_mask(is_head_M)

    def merge_next(item, state):
        acc_MH = pallas_triton.load_tile(acc_ref, (item, head_M[:, None], index_1H), mask_MH)
        max_M = pallas_triton.load_tile(max_ref, (item, head_M), is_head_M)
        sum_M = pallas_triton.load_tile(sum_ref, (item, head_M), is_head_M)
        return _merge(state, (acc_MH, max_M, sum_M))

    state = lax.fori_loop(first, last, merge_next, _nothing_seen(*mask_MH.shape))
    sinks = [pallas_triton.load_tile(ref, (head_M,), is_head_M) for ref in sinks_refs]
    # Slots past the decodes are tokens of prefill tiles: leave them as they are.
    mask_MH &= last > first
    pallas_triton.store_tile(out_ref, (token, head_M[:, None], index_1H), _finish(state, *sinks), mask_MH)


def _prefill(attend, operands, batch, sinks, out_TNH):
    """Runs the prefill kernel over every tile."""
    tiling = attend.tiling
    (out_TNH,) = pallas_triton.call(
        functools.partial(_prefill_kernel, attend),
        (out_TNH, *operands, batch.prefill_tiles_W4, *sinks),
        grid=(batch.prefill_tiles_W4.shape[0], attend.num_blocks),
        out_shape=[jax.ShapeDtypeStruct(out_TNH.shape, out_TNH.dtype)],
        num_warps=tiling.prefill_num_warps,
        num_stages=tiling.prefill_num_stages,
        interpret=attend.interpret,
        name="paged_attention_prefill",
        aliases={0: 0},
    )
    return out_TNH


def _prefill_kernel(attend, _, q_ref, k_ref, v_ref, table_ref, tiles_ref, *sinks_and_out):
    """One program: one query tile and one block of heads, over its splits up to the causal bound."""
    *sinks_refs, out_ref = sinks_and_out
    tile, block = pallas_triton.program_id(0), pallas_triton.program_id(1)
    q_start, q_len, row, position = (tiles_ref[tile, j] for j in range(4))
    C = attend.tiling.split_size
    M = max(attend.tiling.query_tile * attend.block_heads, MIN_DOT_ROWS)
    kv_head, (offset_M, head_M, is_head_M) = attend.rows(M, attend.block_heads, block)
    is_row_M = is_head_M & (offset_M < q_len)
    index_1H, mask_MH = attend.head_mask(is_row_M)
    where_MH = ((q_start + offset_M)[:, None], head_M[:, None], index_1H)
    q_MH = pallas_triton.load_tile(q_ref, where_MH, mask_MH)
    position_M = position + offset_M
    refs = (k_ref, v_ref, table_ref)
    tile_stop = position + q_len
    kv_first = attend.first_seen(position)

    def next_split(j, state):
        kv_start = j * C
        kv_stop = jnp.minimum(kv_start + C, tile_stop)
        return _merge(state, attend.split(refs, q_MH, position_M, row, kv_head, kv_first, kv_start, kv_stop))

    # Padding has tile_stop 0: no trip, and no row to store.
    state = lax.fori_loop(kv_first // C, (tile_stop + (C - 1)) // C, next_split, _nothing_seen(*q_MH.shape))
    sinks = [pallas_triton.load_tile(ref, (head_M,), is_head_M) for ref in sinks_refs]
    pallas_triton.store_tile(out_ref, where_MH, _finish(state, *sinks), mask_MH)
