"""The page pool: every page is free or held, and the books say by whom."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from jaxserve.errors import IntegrityError
from jaxserve.scheduling.page_pool import PagePool


def test_pages_are_handed_out_once():
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity(first + second)


def test_nothing_is_allocated_when_too_much_is_asked_for():
    pool = PagePool(3)
    held = pool.allocate(2)
    with pytest.raises(IntegrityError, match="asked for 2 pages with 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity(held)


def test_free_pages_wait_in_the_order_of_release_and_a_sequence_gives_its_last_page_first():
    pool = PagePool(4)
    context, other = pool.allocate(3), pool.allocate(1)
    pool.release(context)
    pool.release(other)
    assert pool.allocate(4) == [*reversed(context), *other]


def test_a_shared_page_is_free_only_after_its_last_holder():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    pool.share(page)
    pool.check_integrity([page, page])
    pool.release([page])
    assert pool.num_free == 1
    pool.check_integrity([page])
    pool.release([page])
    assert pool.num_free == 2


def test_misuse_raises():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    pool.release([page])
    with pytest.raises(IntegrityError, match=f"page {page} was released twice"):
        pool.release([page])


def test_a_free_page_that_is_shared_leaves_the_free_ones_and_keeps_what_is_in_it():
    pool, reused = PagePool(3), []
    pool.on_reuse = reused.append
    held = pool.allocate(3)
    pool.release(held)
    assert [pool.is_free(page) for page in held] == [True] * 3
    pool.share(held[1])
    assert reused == held
    assert pool.allocate(2) == [held[2], held[0]]
    assert reused == [*held, held[2], held[0]]
    pool.check_integrity(held)


@pytest.mark.parametrize("held", [[], [0], [0, 0, 1], [0, 1, 2]])
def test_check_integrity_finds_a_wrong_count(held):
    pool = PagePool(3)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(IntegrityError, match="wrong reference counts"):
        pool.check_integrity(held)


def test_check_integrity_finds_a_lost_page_and_one_that_is_free_and_held():
    pool = PagePool(3)
    held = pool.allocate(1)
    del pool._free[2]
    with pytest.raises(IntegrityError, match=r"1 used \+ 1 free pages are not the pool's 3"):
        pool.check_integrity(held)
    pool._free[held[0]] = None
    with pytest.raises(IntegrityError, match=r"1 used \+ 2 free"):
        pool.check_integrity(held)


class PoolMachine(RuleBasedStateMachine):
    """Holders allocate, share and release in any order; the model is the list of what each holds."""

    @initialize(num_pages=st.integers(1, 8))
    def make(self, num_pages):
        self.pool = PagePool(num_pages)
        self.holders = []

    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(0, self.pool.num_free))
        pages = self.pool.allocate(count)
        held = {p for holder in self.holders for p in holder}
        assert len(set(pages)) == count
        assert held.isdisjoint(pages)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data):
        pages = list(data.draw(st.sampled_from(self.holders)))
        for page in pages:
            self.pool.share(page)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def books_balance(self):
        held = [p for holder in self.holders for p in holder]
        self.pool.check_integrity(held)
        assert self.pool.num_free == self.pool.num_pages - len(set(held))

    def teardown(self):
        for holder in self.holders:
            self.pool.release(holder)
        assert sorted(self.pool.allocate(self.pool.num_free)) == list(range(self.pool.num_pages))


def test_any_order_of_use():
    run_state_machine_as_test(PoolMachine, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))
