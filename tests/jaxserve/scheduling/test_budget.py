"""What a step has left: what was taken and given back is as if it had never been taken."""

import pytest

from jaxserve.scheduling.budget import Budget
from jaxserve.scheduling.sequence import Sequence
from jaxserve.testing.fake_runner import toy_config, toy_request

CONFIG = toy_config(max_num_batched_tokens=16, split_size=8, max_decode_items=8, long_prefill_token_threshold=6)


def sequence(num_known, num_computed):
    prompt = [65] * num_known
    made = Sequence(toy_request("a", prompt), 0, max_total_len=64, token_ids=prompt, pages=[[]])
    made.num_computed = num_computed
    return made


def left(budget):
    return budget.tokens, budget.decode_items


@pytest.mark.parametrize(("num_computed", "take", "items"), [(39, 1, 5), (32, 6, 0), (35, 5, 0)])
def test_what_is_given_back_was_never_taken(num_computed, take, items):
    budget, lone = Budget(CONFIG), sequence(40, num_computed)
    assert budget.take(lone) == take
    assert left(budget) == (16 - take, 8 - items)
    budget.give_back(lone, take)
    assert left(budget) == (16, 8)


def test_a_lone_token_needs_as_many_items_as_its_context_has_splits():
    budget = Budget(CONFIG)
    assert [budget.take(sequence(40, 39)) for _ in range(2)] == [1, 0]
    assert budget.take(sequence(24, 23)) == 1
    assert left(budget) == (14, 0)


def test_all_that_is_left_beside_what_was_taken():
    budget, long = Budget(CONFIG), sequence(40, 0)
    taken = budget.take(long, num_left=15)
    assert (taken, left(budget)) == (1, (15, 7))
    assert budget.take_more(long, taken) == 16
    assert left(budget) == (0, 8), "a chunk costs no items"
