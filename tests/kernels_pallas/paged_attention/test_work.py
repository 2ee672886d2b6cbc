"""The planner: what it covers, what it refuses, and that it needs no jax."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention.work import (
    empty_ragged_batch,
    num_decode_items,
    num_prefill_tiles,
    plan_ragged_batch,
)

BUCKET = {"num_seq_slots": 4, "num_decode_slots": 3, "max_decode_items": 5, "max_prefill_tiles": 4}
SIZES = {"split_size": 128, "query_tile": 16}


def test_worked_example_of_the_docstring():
    batch = plan_ragged_batch([7, 3], [200, 20], [1, 20], **BUCKET, **SIZES)
    assert batch.rows_S.tolist() == [7, 3, 0, 0]
    assert batch.kv_lens_S.tolist() == [200, 20, 0, 0]
    assert batch.cu_q_lens_S1.tolist() == [0, 1, 21, 21, 21]
    assert batch.num_seqs_1.tolist() == [2]
    assert batch.decode_items_W4[:2].tolist() == [[0, 7, 0, 128], [0, 7, 128, 200]]
    assert not batch.decode_items_W4[2:].any()
    assert batch.decode_first_D1.tolist() == [0, 2, 2, 2]
    assert batch.prefill_tiles_W4[:2].tolist() == [[1, 16, 3, 0], [17, 4, 3, 16]]
    assert not batch.prefill_tiles_W4[2:].any()
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


sequences = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 900), st.one_of(st.just(1), st.integers(1, 300))), max_size=12
)


@settings(deadline=None, max_examples=150)
@given(sequences=sequences, split_size=st.sampled_from([16, 128, 512]), query_tile=st.sampled_from([1, 8, 64]))
def test_items_cover_every_key_of_every_query_once(sequences, split_size, query_tile):
    sequences = sorted(sequences, key=lambda s: s[2] != 1)
    rows, past_lens, q_lens = (np.array([s[i] for s in sequences], np.int32) for i in range(3))
    kv_lens = past_lens + q_lens
    is_decode = q_lens == 1
    num_items = int(num_decode_items(kv_lens[is_decode], split_size).sum())
    num_tiles = int(num_prefill_tiles(q_lens[~is_decode], query_tile).sum())
    bucket = {
        "num_seq_slots": len(sequences) + 1,
        "num_decode_slots": int(is_decode.sum()) + 1,
        "max_decode_items": num_items,
        "max_prefill_tiles": num_tiles,
    }
    batch = plan_ragged_batch(rows, kv_lens, q_lens, **bucket, split_size=split_size, query_tile=query_tile)

    stop_of_token = {}
    for s, (row, kv_len, q_len) in enumerate(zip(rows, kv_lens, q_lens, strict=True)):
        for i in range(q_len):
            stop_of_token[batch.cu_q_lens_S1[s] + i] = (row, kv_len - q_len + i + 1)
    planned = {}
    for token in range(int(is_decode.sum())):
        items = batch.decode_items_W4[batch.decode_first_D1[token] : batch.decode_first_D1[token + 1]]
        assert items[:, 2].tolist() == list(range(0, kv_lens[token], split_size)), "ranges start at multiples, in order"
        assert items[1:, 2].tolist() == items[:-1, 3].tolist(), "ranges touch"
        assert set(items[:, 0]) == {token}
        assert set(items[:, 1]) == {rows[token]}
        planned[token] = (rows[token], items[-1, 3])
    for q_start, q_len, row, position in batch.prefill_tiles_W4:
        assert 1 <= q_len <= query_tile
        for i in range(q_len):
            assert q_start + i not in planned, "a token in two tiles"
            planned[q_start + i] = (row, position + i + 1)
    assert planned == stop_of_token

    if num_items:
        with pytest.raises(ValueError, match="decode items"):
            plan_ragged_batch(
                rows,
                kv_lens,
                q_lens,
                **{**bucket, "max_decode_items": num_items - 1},
                split_size=split_size,
                query_tile=query_tile,
            )
    if num_tiles:
        with pytest.raises(ValueError, match="prefill tiles"):
            plan_ragged_batch(
                rows,
                kv_lens,
                q_lens,
                **{**bucket, "max_prefill_tiles": num_tiles - 1},
                split_size=split_size,
                query_tile=query_tile,
            )


def test_out_is_overwritten_whole_and_returned():
    out = empty_ragged_batch(**BUCKET)
    for array in out:
        array.fill(99)
    batch = plan_ragged_batch([7, 3], [200, 20], [1, 20], **BUCKET, **SIZES, out=out)
    assert batch is out
    fresh = plan_ragged_batch([7, 3], [200, 20], [1, 20], **BUCKET, **SIZES)
    for mine, expected in zip(batch, fresh, strict=True):
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize(
    ("sequences", "match"),
    [
        (([0], [5], [2, 2]), "equally long"),
        (([0, 1], [5, 9], [2, 1]), "must come first"),
        (([0], [1], [2]), "q_len <= kv_len"),
        (([0], [1], [0]), "1 <= q_len"),
        (([-1], [1], [1]), "row >= 0"),
        (([0] * 5, [2] * 5, [2] * 5), "sequences: the batch needs 5, the bucket has 4"),
        (([0] * 4, [1] * 4, [1] * 4), "decode tokens: the batch needs 4, the bucket has 3"),
        (([0], [700], [1]), "decode items: the batch needs 6, the bucket has 5"),
        (([0], [65], [65]), "prefill tiles: the batch needs 5, the bucket has 4"),
    ],
)
def test_what_does_not_fit_is_refused(sequences, match):
    with pytest.raises(ValueError, match=match):
        plan_ragged_batch(*sequences, **BUCKET, **SIZES)


def test_out_of_another_bucket_is_refused():
    out = empty_ragged_batch(**{**BUCKET, "max_decode_items": 6})
    with pytest.raises(ValueError, match="out: expected int32 buffers"):
        plan_ragged_batch([7], [200], [1], **BUCKET, **SIZES, out=out)


def test_planning_imports_no_jax():
    modules = "kernels_pallas.paged_attention.work, kernels_pallas.paged_attention.tiling"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
