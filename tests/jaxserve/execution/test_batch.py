"""One flat buffer says to the device what the host wrote; a plan becomes the right rows, positions and padding."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.execution.batch import (
    FROM_DEVICE,
    Field,
    PackedLayout,
    backbone_layout,
    pack_backbone,
)
from jaxserve.execution.buckets import Ladder
from jaxserve.plan import PageUpdate, SequencePlan, StepPlan
from jaxserve.testing.fake_runner import toy_config

LADDER = Ladder(toy_config(max_num_seqs=4, max_num_batched_tokens=32, token_buckets=(32,)))


def sequence(row, start, num_tokens, token_ids, samples=True, **more):
    return SequencePlan(f"r{row}", row, start, num_tokens, tuple(token_ids), samples, **more)


def packed(plan, is_decode):
    bucket = LADDER.backbone_for(plan.num_tokens, is_decode)
    layout = backbone_layout(LADDER, bucket, num_groups=1)
    views = layout.host_views(np.full(layout.size, 12345, np.int32))
    return views, pack_backbone(plan, bucket, LADDER, views)


def test_the_device_reads_what_the_host_wrote():
    layout = PackedLayout({"a": Field((3,)), "b": Field((2, 2), np.float32), "c": Field((2,), np.uint32)})
    buffer = np.zeros(layout.size, np.int32)
    views = layout.host_views(buffer)
    views["a"][:] = [1, -2, 3]
    views["b"][:] = [[0.1, -1e30], [np.inf, 0.0]]
    views["c"][:] = [2**32 - 1, 7]
    parts = jax.jit(layout.unpack)(jnp.asarray(buffer))
    for name, view in views.items():
        np.testing.assert_array_equal(np.asarray(parts[name]), view)


def test_a_mixed_step():
    """A decode in row 2 at position 9 whose token is on the device, and a chunk of three at position 4 of row 0."""
    sequences = (sequence(2, 9, 1, []), sequence(0, 4, 3, [7, 8, 9], samples=False))
    views, sampling = packed(StepPlan(0, (), (PageUpdate(0, 0, 1, 5),), sequences), is_decode=False)
    assert views["tokens_T"][:4].tolist() == [FROM_DEVICE, 7, 8, 9]
    assert views["rows_T"][:4].tolist() == [2, 0, 0, 0]
    assert views["positions_T"][:4].tolist() == [9, 4, 5, 6]
    assert set(views["rows_T"][4:].tolist()) == {LADDER.config.max_num_seqs}
    assert set(views["positions_T"][4:].tolist()) == {-1}
    assert views["page_updates_U4"][0].tolist() == [0, 0, 1, 5]
    assert set(views["page_updates_U4"][1:, 1].tolist()) == {LADDER.config.max_num_seqs}, "padding is no row"
    assert [s.row for s in sampling] == [2]
    assert views["sampled_tokens_S"][0] == 0
    assert views["sampled_rows_S"].tolist() == [2, 4, 4, 4]
    assert views["kv_lens_S"][:2].tolist() == [10, 7]


def test_nothing_of_the_last_step_stays_in_a_buffer():
    big = StepPlan(0, (), (), tuple(sequence(row, 5, 1, [1]) for row in range(4)))
    bucket = LADDER.backbone_for(4, True)
    layout = backbone_layout(LADDER, bucket, num_groups=1)
    reused, fresh = np.zeros(layout.size, np.int32), np.zeros(layout.size, np.int32)
    pack_backbone(big, bucket, LADDER, layout.host_views(reused))
    small = StepPlan(1, (), (), (sequence(1, 6, 1, [3]),))
    pack_backbone(small, bucket, LADDER, layout.host_views(reused))
    pack_backbone(small, bucket, LADDER, layout.host_views(fresh))
    np.testing.assert_array_equal(reused, fresh)
