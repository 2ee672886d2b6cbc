"""The tuned sizes: that every real shape gets one that its backend takes."""

import pytest

from kernels_pallas.paged_attention.cases import CASES
from kernels_pallas.paged_attention.tiling import Tiling, default_tiling


@pytest.mark.parametrize("platform", ["cpu", "cuda", "gpu", "tpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_default(case, platform):
    tiling = default_tiling(
        platform,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
    )
    assert tiling.split_size % case.page_size == 0
    assert tiling.split_size % 128 == 0, "the determinism of XLA:CPU was measured for multiples of 128"
    assert tiling.split_size % tiling.kv_block == 0
    assert hash(tiling) == hash(Tiling(**vars(tiling)))


def test_gpu_query_tile_fills_the_rows_with_the_group():
    shape = {"head_dim": 128, "page_size": 64}
    assert default_tiling("gpu", num_q_heads=32, num_kv_heads=8, **shape).query_tile == 16
    assert default_tiling("gpu", num_q_heads=8, num_kv_heads=8, **shape).query_tile == 64
    assert default_tiling("gpu", num_q_heads=28, num_kv_heads=4, **shape).query_tile == 8
    l4 = default_tiling("gpu", num_q_heads=32, num_kv_heads=8, device_kind="NVIDIA L4", **shape)
    assert l4.query_tile == 8


@pytest.mark.parametrize(
    ("group", "head_block", "query_tile"), [(16, 16, 4), (33, 64, 1), (64, 64, 1), (71, 64, 1), (128, 64, 1)]
)
def test_gpu_blocks_of_heads_hold_what_the_rows_hold(group, head_block, query_tile):
    tiling = default_tiling("gpu", num_q_heads=group, num_kv_heads=1, head_dim=128, page_size=64)
    assert (tiling.head_block, tiling.query_tile) == (head_block, query_tile)


def test_a_device_may_have_its_own_entry():
    shape = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256, "page_size": 64}
    tiles = {
        kind: default_tiling("gpu", device_kind=kind, **shape).query_tile for kind in ("NVIDIA H200", "NVIDIA A100", "")
    }
    assert tiles == {"NVIDIA H200": 32, "NVIDIA A100": 16, "": 16}


def test_splits_hold_whole_pages():
    tiling = default_tiling("cpu", num_q_heads=8, num_kv_heads=8, head_dim=64, page_size=48)
    assert tiling.split_size == 144


@pytest.mark.parametrize("value", [0, -1, 2.0, "8"])
def test_sizes_are_positive_integers(value):
    with pytest.raises(ValueError, match="Tiling.split_size must be a positive integer"):
        Tiling(split_size=value)
