"""Plans the work items of one ragged attention step, on the host, in numpy.

Knows how sequences of any query length are cut into decode items and prefill tiles; knows nothing of devices, pages'
contents or kernels, and must not import jax, so that a scheduler can budget with it. The caller owns every buffer.

Why fixed splits: a position's keys are always reduced in the ranges [0, split), [split, 2 * split), ... whichever
sequences share its step. A split *count* chosen from the batch (as FlashDecoding does) would make a row's bits depend on
its neighbours (DESIGN section 9).
"""

import functools
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Count = TypeVar("Count", int, np.ndarray)


class RaggedBatch(NamedTuple):
    """Which tokens belong to which sequence, and the work that attention does for them; every array is int32.

    The first four fields are the ragged signature that TPU kernels use too; the last three are the host's plan. A pytree:
    numpy when `plan_ragged_batch` makes it, jax arrays inside a step. The lengths of all arrays are the bucket's.

    Worked example, split_size 128, query_tile 16: a decode of kv_len 200 in row 7 and a 20-token prompt in row 3 give
    decode_items [(0, 7, 0, 128), (0, 7, 128, 200)], decode_first [0, 2] and
    prefill_tiles [(1, 16, 3, 0), (17, 4, 3, 16)].
    """

    rows_S: np.ndarray
    """Block-table row of each sequence; padding 0."""
    kv_lens_S: np.ndarray
    """KV length of each sequence [tokens], those of this step included; padding 0."""
    cu_q_lens_S1: np.ndarray
    """Queries of sequence s are tokens [cu[s], cu[s + 1]), at positions kv_len - q_len + i; flat after the last."""
    num_seqs_1: np.ndarray
    """Number of sequences."""
    decode_items_W4: np.ndarray
    """(token, row, kv_start, kv_stop) of each split of each one-token sequence, in order; padding kv_start == kv_stop == 0."""
    decode_first_D1: np.ndarray
    """Items of token t are [first[t], first[t + 1]); flat after the last, so its last entry is the number of items."""
    prefill_tiles_W4: np.ndarray
    """(q_start, q_len, row, position of the first query) of each tile of the other sequences; padding q_len == 0."""


def num_decode_items(kv_len: Count, split_size: int) -> Count:
    """Returns how many decode items a one-token sequence of `kv_len` tokens takes (elementwise for arrays)."""
    return -(-kv_len // split_size)


def num_prefill_tiles(q_len: Count, query_tile: int) -> Count:
    """Returns how many prefill tiles a sequence with `q_len` > 1 query tokens takes (elementwise for arrays)."""
    return -(-q_len // query_tile)


def empty_ragged_batch(
    *, num_seq_slots: int, num_decode_slots: int, max_decode_items: int, max_prefill_tiles: int
) -> RaggedBatch:
    """Returns the all-padding batch of a bucket: what a warm-up runs, and buffers for `plan_ragged_batch(out=)`."""
    shapes = (
        (num_seq_slots,),
        (num_seq_slots,),
        (num_seq_slots + 1,),
        (1,),
        (max_decode_items, 4),
        (num_decode_slots + 1,),
        (max_prefill_tiles, 4),
    )
    return RaggedBatch(*(np.zeros(shape, np.int32) for shape in shapes))


def _check_fits(name: str, needed: int, limit: int, remedy: str) -> None:
    if needed > limit:
        raise ValueError(f"{name}: the batch needs {needed}, the bucket has {limit}; {remedy}")


def _check_lengths(rows: np.ndarray, kv_lens: np.ndarray, q_lens: np.ndarray) -> int:
    """Checks the sequences and returns how many leading ones are decode (q_len 1)."""
    if not rows.shape == kv_lens.shape == q_lens.shape == (rows.size,):
        shapes = f"{rows.shape}, {kv_lens.shape}, {q_lens.shape}"
        raise ValueError(f"rows, kv_lens and q_lens must be one-dimensional and equally long, got {shapes}")
    is_decode = q_lens == 1
    num_decodes = int(np.count_nonzero(is_decode))
    if not is_decode[:num_decodes].all():
        raise ValueError("sequences with q_len == 1 must come first: order the step's sequences before planning it")
    if rows.size and (q_lens.min() < 1 or (kv_lens < q_lens).any() or rows.min() < 0):
        raise ValueError("every sequence needs 1 <= q_len <= kv_len (kv_len counts this step's tokens) and row >= 0")
    return num_decodes


@functools.lru_cache
def _splits_in_a_row(count: int, split_size: int) -> np.ndarray:
    """Returns (0, 0, kv_start, kv_stop) of the first splits of one endless sequence; never written to."""
    starts_W = np.arange(count, dtype=np.int32) * np.int32(split_size)
    splits_W4 = np.zeros((count, 4), np.int32)
    splits_W4[:, 2], splits_W4[:, 3] = starts_W, starts_W + np.int32(split_size)
    splits_W4.flags.writeable = False
    return splits_W4


def plan_ragged_batch(
    rows: ArrayLike,
    kv_lens: ArrayLike,
    q_lens: ArrayLike,
    *,
    num_seq_slots: int,
    num_decode_slots: int,
    max_decode_items: int,
    max_prefill_tiles: int,
    split_size: int,
    query_tile: int,
    out: RaggedBatch | None = None,
) -> RaggedBatch:
    """Packs the sequences of a step into a bucket.

    Args:
      rows: block-table row of each sequence.
      kv_lens: KV length of each sequence after this step [tokens].
      q_lens: query tokens of each sequence in this step; sequences with 1 come first, they are the decodes.
      num_seq_slots: S of the bucket.
      num_decode_slots: D of the bucket.
      max_decode_items: number of decode items of the bucket.
      max_prefill_tiles: number of prefill tiles of the bucket.
      split_size: tokens of a KV split.
      query_tile: query tokens of a prefill tile.
      out: buffers of the bucket's shapes to overwrite; None allocates.

    Returns:
      The batch; `out` itself when given.

    Raises:
      ValueError: the batch does not fit (take fewer sequences or a larger bucket), the sequences are malformed or out of
        order, or `out` has other shapes than the bucket.
    """
    rows, kv_lens, q_lens = (np.asarray(a, dtype=np.int32) for a in (rows, kv_lens, q_lens))
    num_decodes = _check_lengths(rows, kv_lens, q_lens)
    num_seqs = rows.size
    items_D = num_decode_items(kv_lens[:num_decodes], split_size)
    tiles_S = num_prefill_tiles(q_lens[num_decodes:], query_tile)
    num_items, num_tiles = int(items_D.sum()), int(tiles_S.sum())
    _check_fits("sequences", num_seqs, num_seq_slots, "plan fewer sequences")
    _check_fits("decode tokens", num_decodes, num_decode_slots, "plan fewer one-token sequences")
    _check_fits("decode items", num_items, max_decode_items, "budget with num_decode_items()")
    _check_fits("prefill tiles", num_tiles, max_prefill_tiles, "budget with num_prefill_tiles()")

    shape = {
        "num_seq_slots": num_seq_slots,
        "num_decode_slots": num_decode_slots,
        "max_decode_items": max_decode_items,
        "max_prefill_tiles": max_prefill_tiles,
    }
    if out is None:
        out = empty_ragged_batch(**shape)
    else:
        expected = ((num_seq_slots,),) * 2 + ((num_seq_slots + 1,), (1,))
        expected += ((max_decode_items, 4), (num_decode_slots + 1,), (max_prefill_tiles, 4))
        if tuple(a.shape for a in out) != expected or any(a.dtype != np.int32 for a in out):
            raise ValueError(f"out: expected int32 buffers of shapes {expected}, got {[a.shape for a in out]}")
        # Zero what is not about to be written; all of a large bucket would cost more than the plan.
        padding = (out.rows_S[num_seqs:], out.kv_lens_S[num_seqs:], out.cu_q_lens_S1[:1], out.decode_first_D1[:1])
        for array in (*padding, out.decode_items_W4[num_items:], out.prefill_tiles_W4[num_tiles:]):
            array.fill(0)

    out.rows_S[:num_seqs] = rows
    out.kv_lens_S[:num_seqs] = kv_lens
    np.cumsum(q_lens, out=out.cu_q_lens_S1[1 : num_seqs + 1])
    out.cu_q_lens_S1[num_seqs + 1 :] = out.cu_q_lens_S1[num_seqs]
    out.num_seqs_1[0] = num_seqs

    np.cumsum(items_D, out=out.decode_first_D1[1 : num_decodes + 1])
    out.decode_first_D1[num_decodes + 1 :] = num_items
    # Decode token t is sequence t and query token t, because the decodes come first.
    # At long contexts these items are what a step costs the host. Whole items are repeated, as the 16 bytes of a complex number,
    # and all columns are added at once: 66,000 items take 65 us, a column at a time they took 420.
    common_D4 = np.zeros((num_decodes, 4), np.int32)
    common_D4[:, 0] = np.arange(num_decodes)
    common_D4[:, 1] = rows[:num_decodes]
    common_D4[:, 2:] = out.decode_first_D1[:num_decodes, None] * -split_size
    repeated_W4 = np.repeat(common_D4.view(np.complex128)[:, 0], items_D).view(np.int32).reshape(num_items, 4)
    items_W4 = out.decode_items_W4[:num_items]
    np.add(repeated_W4, _splits_in_a_row(max_decode_items, split_size)[:num_items], out=items_W4)
    items_W4[out.decode_first_D1[1 : num_decodes + 1] - 1, 3] = kv_lens[:num_decodes]

    seq_W = np.repeat(np.arange(num_decodes, num_seqs, dtype=np.int32), tiles_S)
    first_S = np.cumsum(tiles_S) - tiles_S
    offset_W = (np.arange(num_tiles, dtype=np.int32) - first_S[seq_W - num_decodes]) * query_tile
    tiles_W4 = out.prefill_tiles_W4[:num_tiles]
    tiles_W4[:, 0] = out.cu_q_lens_S1[seq_W] + offset_W
    np.minimum(q_lens[seq_W] - offset_W, query_tile, out=tiles_W4[:, 1], casting="unsafe")
    tiles_W4[:, 2] = rows[seq_W]
    tiles_W4[:, 3] = kv_lens[seq_W] - q_lens[seq_W] + offset_W
    return out
