"""The ladder: any step that the scheduler may plan has a bucket, and the bucket has room for all of it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.execution.buckets import BackboneBucket, Ladder, powers_of_two
from jaxserve.testing.fake_runner import toy_config


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((1, 1), (1,)),
        ((1, 8), (1, 2, 4, 8)),
        ((1, 6), (1, 2, 4, 6)),
        ((32, 512, 4), (32, 128, 512)),
        ((32, 600, 4), (32, 128, 512, 600)),
        ((8, 8, 4), (8,)),
    ],
)
def test_powers_of_two(arguments, sizes):
    assert powers_of_two(*arguments) == sizes


@pytest.fixture
def ladder():
    config = toy_config(max_num_seqs=6, max_num_batched_tokens=20, max_model_len=64, page_size=4, split_size=8, query_tile=4)
    return Ladder(dataclasses.replace(config, token_buckets=(4, 8, 16, 20), max_decode_items=17))


def test_the_ladder_is_short_and_smallest_first(ladder):
    decode = [BackboneBucket(n, True) for n in (1, 2, 4, 6)]
    mixed = [BackboneBucket(n, False) for n in (4, 8, 16, 20)]
    assert set(ladder.backbones()) == {*decode, *mixed}
    assert [b.num_tokens for b in ladder.backbones()] == [1, 2, 4, 4, 6, 8, 16, 20]
    assert ladder.heads() == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("num_tokens", "is_decode", "size"),
    [(1, True, 1), (3, True, 4), (5, True, 6), (6, True, 6), (1, False, 4), (4, False, 4), (5, False, 8), (20, False, 20)],
)
def test_the_smallest_bucket_that_holds_a_step(ladder, num_tokens, is_decode, size):
    assert ladder.backbone_for(num_tokens, is_decode) == BackboneBucket(size, is_decode)


@pytest.mark.parametrize(("num_sequences", "size"), [(1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_the_smallest_head(ladder, num_sequences, size):
    assert ladder.head_for(num_sequences) == size


def test_what_a_bucket_has_room_for(ladder):
    decode, small, large = BackboneBucket(2, True), BackboneBucket(4, False), BackboneBucket(20, False)
    assert [ladder.num_sequences(b) for b in (decode, small, large)] == [2, 4, 6]
    assert [ladder.num_decode_items(b) for b in (decode, small, large)] == [16, 17, 17], "8 splits each, 17 in a step"
    assert [ladder.num_prefill_tiles(b) for b in (decode, small, large)] == [0, 1 + 2, 5 + 6]
    assert [ladder.num_page_updates(b) for b in (decode, small, large)] == [2, 1 + 4, 5 + 6]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_step_fits_its_bucket(data):
    """Any division of a step's tokens: no more tiles, items and pages begun than the bucket that it is padded to has."""
    config = toy_config(
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.integers(6, 40)),
        page_size=data.draw(st.sampled_from([1, 4, 8])),
        query_tile=data.draw(st.sampled_from([1, 3, 4, 16])),
    )
    ladder = Ladder(config)
    budget, takes, starts = config.max_num_batched_tokens, [], []
    for num_behind in reversed(range(data.draw(st.integers(1, config.max_num_seqs)))):
        takes.append(data.draw(st.integers(1, budget - num_behind)))
        starts.append(data.draw(st.integers(0, config.max_model_len - takes[-1])))
        budget -= takes[-1]
    bucket = ladder.backbone_for(sum(takes), is_decode=max(takes) == 1)
    assert sum(takes) <= bucket.num_tokens
    assert len(takes) <= ladder.num_sequences(bucket)
    assert sum(-(-t // config.query_tile) for t in takes if t > 1) <= ladder.num_prefill_tiles(bucket)
    begun = sum(-(-(s + t) // config.page_size) - -(-s // config.page_size) for s, t in zip(starts, takes, strict=True))
    assert begun <= ladder.num_page_updates(bucket)
    items = sum(-(-(s + 1) // config.split_size) for s, t in zip(starts, takes, strict=True) if t == 1)
    if items <= config.max_decode_items:  # the scheduler's budget
        assert items <= ladder.num_decode_items(bucket)
