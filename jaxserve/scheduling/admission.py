"""Who of the waiting enters, and who must leave for it (ADR 0022). Owns no state.

In order of priority and arrival. One for which there is no room is passed, not a wall for those behind it, unless it has been
passed for too long. One of strictly better priority takes the place of running ones, the worst first, where it then surely fits.
"""

from collections.abc import Iterable, Iterator
from copy import copy

from jaxserve.scheduling.budget import Budget
from jaxserve.scheduling.holdings import FreedPages, Holdings, Pages
from jaxserve.scheduling.sequence import Sequence, in_order

MAX_SKIPS = 64
"""Steps that those behind may pass a waiting sequence for which there is no room; then nobody else is admitted before it."""

MAX_PASSED = 32
"""Waiting sequences that one step looks past: a scan of 10,000 took 100 ms a step."""


def admit(
    waiting: list[Sequence], running: list[Sequence], holdings: Holdings, budget: Budget, takes: dict[Sequence, int]
) -> tuple[list[Sequence], list[Sequence]]:
    """Gives rows, pages and tokens to those who enter, and takes them from those who must leave.

    Args:
        waiting, running: in order; not changed.
        takes: tokens that the step computes of each sequence; changed.

    Returns:
        Those who entered and those who left.
    """
    entered: list[Sequence] = []
    left: list[Sequence] = []
    num_passed, is_closed = 0, False
    for sequence in _line(waiting, len(running), holdings):
        num_staying = len(running) - len(left)
        can_displace = num_staying > 0 and running[num_staying - 1].priority > sequence.priority
        if not can_displace and (not holdings.free_rows or budget.tokens == 0):
            break
        if sequence.num_in_flight:
            continue  # preempted with a token on the device: known after the next commit
        if is_closed and sequence not in holdings.host_bytes:
            continue
        cached = holdings.lookup(sequence)
        if len(cached[0]) > budget.cached_pages:
            break  # the step's input has no room for as many; the next one's has
        victims = _victims(sequence, cached, running[:num_staying] if can_displace else (), holdings, budget, takes)
        if victims is None:
            num_passed += 1
            sequence.num_skips += 1
            is_closed |= num_passed == MAX_PASSED or sequence.num_skips > MAX_SKIPS
            continue
        for victim in victims:
            budget.give_back(victim, takes.pop(victim, 0))
            holdings.vacate(victim)
        left += victims
        holdings.seat(sequence, cached)
        budget.cached_pages -= len(cached[0])
        takes[sequence] = take = budget.take(sequence)
        if holdings.caches:
            # At once, so that those behind it that begin alike do not compute the same pages beside it. Nobody who enters later
            # can displace it: they come in order of priority.
            holdings.give_keys(sequence, sequence.num_computed + take)
        sequence.num_skips = 0
        entered.append(sequence)
    return entered, left


def _line(waiting: list[Sequence], num_running: int, holdings: Holdings) -> Iterator[Sequence]:
    """Yields those who may enter now, in order.

    Preempted sequences that keep host memory are among them however long the line is: one at its front may wait for that very
    memory, and everybody behind it for that one.
    """
    # As many as may be passed, and as many as may have a token in flight or find room.
    front = waiting[: MAX_PASSED + num_running + len(holdings.free_rows)]
    yield from front
    if len(front) < len(waiting) and holdings.host_bytes:
        last = front[-1].order
        yield from sorted((s for s in holdings.host_bytes if s.row is None and s.order > last), key=in_order)


def _victims(
    sequence: Sequence,
    cached: Pages,
    running: Iterable[Sequence],
    holdings: Holdings,
    budget: Budget,
    takes: dict[Sequence, int],
) -> list[Sequence] | None:
    """Returns who must leave, so that the sequence can enter now: nobody, some of worse priority, or None if that is not enough.

    Host memory is never taken from anybody: what was collected for an answer is there until it ends.
    """
    if not holdings.has_host_bytes(sequence):
        return None
    missing = holdings.missing_pages(sequence, cached)
    sequence.num_computed = len(cached[0]) * holdings.page_size  # what it takes of the budget depends on it
    try:
        if holdings.free_rows and max(missing) <= 0 and copy(budget).take(sequence):
            return []
        worse = [s for s in running if s.priority > sequence.priority]
        if sum(s.num_reserved for s in worse) < max(missing) * holdings.page_size:
            return None
        freed, trial = FreedPages(holdings, cached), copy(budget)
        for count, victim in enumerate(reversed(worse), start=1):
            freed.add(victim)
            trial.give_back(victim, takes.get(victim, 0))
            has_pages = all(map(int.__ge__, freed.counts, missing))
            if has_pages and copy(trial).take(sequence):
                return worse[: -count - 1 : -1]
        return None
    finally:
        sequence.num_computed = 0
