"""The request sets: alike for every seed but for the tokens."""

import pytest

from benchmarks import workloads


@pytest.mark.parametrize("name", workloads.NAMES)
def test_seeds_change_tokens_and_nothing_else(name):
    one, other = (workloads.requests(name, 32000, seed) for seed in (0, 1))
    assert [(len(r.prompt), r.max_tokens) for r in one] == [(len(r.prompt), r.max_tokens) for r in other]
    assert all(a.prompt != b.prompt for a, b in zip(one, other, strict=True))
    assert one == workloads.requests(name, 32000, 0)


def test_workloads_are_what_their_names_say():
    sizes = {name: workloads.requests(name, 32000, 0) for name in workloads.NAMES}
    assert [len(requests) for requests in sizes.values()] == [1, 8, 32, 32, 1]
    assert len({len(r.prompt) for r in sizes["32 mixed"]}) > 16
    assert len({tuple(r.prompt[:256]) for r in sizes["shared prefix"]}) == 1
    assert len({tuple(r.prompt) for r in sizes["shared prefix"]}) == 32
    assert len(sizes["long prompt"][0].prompt) == 2048
    longest = max(len(r.prompt) + r.max_tokens for requests in sizes.values() for r in requests)
    assert longest <= workloads.MAX_MODEL_LEN
