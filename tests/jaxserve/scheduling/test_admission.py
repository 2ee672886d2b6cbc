"""Who enters and who must leave for it: priorities, host memory, and the two together, decision by decision."""

import pytest

from jaxserve.errors import IntegrityError
from jaxserve.scheduling import admission
from jaxserve.testing.fake_runner import expected
from jaxserve.testing.scheduler_steps import Steps, running, waiting

PROMPT = tuple(range(40, 100))


def finish(steps, *requests):
    """Runs to the end; each request must have got what it would get alone."""
    steps.run()
    for r in requests:
        assert steps.tokens[r.request_id] == expected(r, steps.config)[0], r.request_id
    assert steps.scheduler.num_free_pages == steps.config.num_pages
    assert not steps.scheduler.holdings.host_bytes


# --- better priorities ---------------------------------------------------------------------------------------------------


def test_a_better_priority_takes_the_row_of_the_worst():
    steps = Steps(max_num_seqs=3, max_num_batched_tokens=32)
    low = [steps.add(name, PROMPT[:4], max_tokens=9, priority=priority) for name, priority in (("a", 1), ("b", 2), ("c", 2))]
    steps.step()
    urgent = steps.add("urgent", PROMPT[:6], max_tokens=3)
    assert steps.step() == {"a": 1, "b": 1, "urgent": 6}, "c came last of the worst; its token is given back"
    assert waiting(steps) == ["c"]
    finish(steps, urgent, *low)
    assert steps.scheduler.num_preemptions == 1


def test_equals_never_displace_each_other():
    steps = Steps(max_num_seqs=1)
    steps.add("first", PROMPT[:4], max_tokens=9)
    steps.step()
    steps.add("second", PROMPT[:4], max_tokens=9)
    for _ in range(5):
        steps.step()
    assert running(steps) == ["first"]
    assert steps.scheduler.num_preemptions == 0


def test_only_as_many_leave_as_must_the_worst_first():
    steps = Steps(num_pages=16, max_num_seqs=8, max_num_batched_tokens=64)
    low = [steps.add(f"low {i}", PROMPT[i : i + 15], max_tokens=5, priority=9 - i) for i in range(4)]
    steps.step()
    assert steps.scheduler.num_free_pages == 0
    urgent = steps.add("urgent", PROMPT[:29], max_tokens=3, priority=5)
    assert steps.step() == {"low 3": 1, "low 2": 1, "urgent": 29}, "eight pages: those of the two worst"
    finish(steps, urgent, *low)


def test_nobody_leaves_where_that_would_not_suffice():
    """The worse ones hold too little for it; preempting them would be for nothing, at each step."""
    steps = Steps(num_pages=16, max_num_seqs=8, max_num_batched_tokens=64)
    equal = steps.add("equal", PROMPT[:44], max_tokens=4)
    low = steps.add("low", PROMPT[:14], max_tokens=2, priority=1)
    steps.step()
    big = steps.add("big", PROMPT[:29], max_tokens=3)
    steps.step()
    assert (running(steps), waiting(steps), steps.scheduler.num_preemptions) == (["equal", "low"], ["big"], 0)
    finish(steps, equal, low, big)


def test_a_page_that_two_share_is_free_when_both_have_left():
    """Both worse ones begin with the same six pages; either alone gives too little."""
    steps = Steps(num_pages=16, max_num_seqs=8, max_num_batched_tokens=64, max_cached_pages=16)
    warm = steps.add("warm", PROMPT[:24], max_tokens=1)
    steps.run()
    low = [steps.add(name, (*PROMPT[:24], 33 + i), max_tokens=4, priority=1) for i, name in enumerate(("x", "y"))]
    other = steps.add("other", PROMPT[26:50], max_tokens=4)
    steps.step()
    assert steps.scheduler.num_free_pages == 2
    urgent = steps.add("urgent", PROMPT[7:40], max_tokens=3)
    steps.step()
    assert set(running(steps)) == {"other", "urgent"}
    finish(steps, warm, other, urgent, *low)


def test_pages_that_others_hold_too_are_not_freed():
    """Of the low one's seven pages, six belong to the one that stays as well."""
    steps = Steps(num_pages=16, max_num_seqs=8, max_num_batched_tokens=64, max_cached_pages=16)
    warm = steps.add("warm", PROMPT[:24], max_tokens=1)
    steps.run()
    stays = [steps.add("stays", (*PROMPT[:24], 33), max_tokens=3), steps.add("other", PROMPT[30:53], max_tokens=2)]
    low = steps.add("low", (*PROMPT[:24], 34), max_tokens=3, priority=1)
    steps.step()
    assert steps.scheduler.num_free_pages == 2
    urgent = steps.add("urgent", PROMPT[7:42], max_tokens=2)
    steps.step()
    assert (running(steps), waiting(steps)) == (["stays", "other", "low"], ["urgent"])
    finish(steps, warm, *stays, low, urgent)


def test_cached_pages_of_the_displaced_are_not_room_for_new_ones():
    """Three of the low one's four pages are those that the urgent one finds in the cache; it needs four more."""
    steps = Steps(num_pages=16, max_num_seqs=8, max_num_batched_tokens=64, max_cached_pages=16)
    low = steps.add("low", PROMPT[:14], max_tokens=3, priority=1)
    equal = steps.add("equal", PROMPT[20:58], max_tokens=3)
    steps.step()
    assert steps.scheduler.num_free_pages == 2
    urgent = steps.add("urgent", (*PROMPT[:12], *range(32, 45)), max_tokens=2)
    steps.step()
    assert (running(steps), waiting(steps)) == (["equal", "low"], ["urgent"])
    finish(steps, low, equal, urgent)


def test_a_displaced_one_is_not_computed_and_comes_back():
    steps = Steps(max_num_seqs=1, max_num_batched_tokens=16)
    low = steps.add("low", PROMPT[:40], max_tokens=3, priority=1)
    steps.step()
    urgent = steps.add("urgent", PROMPT[:4], max_tokens=2)
    assert steps.step() == {"urgent": 4}
    assert waiting(steps) == ["low"]
    finish(steps, urgent, low)


def test_a_stream_of_urgent_ones_preempts_no_more_often_than_there_are_of_them():
    steps = Steps(max_num_seqs=2, num_pages=32, max_num_batched_tokens=32)
    low = [steps.add(f"low {i}", PROMPT[:8], max_tokens=20, priority=1) for i in range(4)]
    urgent = []
    for i in range(12):
        urgent.append(steps.add(f"urgent {i}", PROMPT[:5], max_tokens=4))
        for _ in range(3):
            steps.step()
    finish(steps, *urgent, *low)
    assert 0 < steps.scheduler.num_preemptions <= len(urgent)


# --- host memory -----------------------------------------------------------------------------------------------------------


def test_host_memory_is_a_value_of_admission():
    steps = Steps(max_host_bytes=100, max_num_seqs=4, num_pages=64, max_num_batched_tokens=64)
    requests = [
        steps.add(name, PROMPT[:4], max_tokens=4, peak_host_bytes=size)
        for name, size in (("a", 60), ("b", 50), ("c", 40), ("d", 0))
    ]
    steps.step()
    assert (running(steps), waiting(steps)) == (["a", "c", "d"], ["b"]), "b is passed"
    assert sum(steps.scheduler.holdings.host_bytes.values()) == 100
    finish(steps, *requests)


def test_an_abort_gives_host_memory_back():
    steps = Steps(max_host_bytes=100, max_num_batched_tokens=64)
    steps.add("a", PROMPT[:4], peak_host_bytes=100)
    b = steps.add("b", PROMPT[:4], peak_host_bytes=100)
    steps.step()
    steps.scheduler.finish("a")
    steps.scheduler.check_integrity()
    steps.step()
    assert running(steps) == ["b"]
    finish(steps, b)


def test_a_preempted_sequence_keeps_its_host_memory():
    steps = Steps(max_host_bytes=100, max_num_seqs=1)
    low = steps.add("low", PROMPT[:4], max_tokens=9, priority=2, peak_host_bytes=60)
    steps.step()
    urgent = steps.add("urgent", PROMPT[:4], max_tokens=3, peak_host_bytes=40)
    steps.step()
    assert waiting(steps) == ["low"]
    assert sum(steps.scheduler.holdings.host_bytes.values()) == 100
    greedy = steps.add("greedy", PROMPT[:4], max_tokens=3, priority=1, peak_host_bytes=50)
    finish(steps, low, urgent, greedy)


def test_nobody_is_displaced_for_host_memory():
    steps = Steps(max_host_bytes=100, max_num_seqs=1)
    low = steps.add("low", PROMPT[:4], max_tokens=9, priority=2, peak_host_bytes=60)
    steps.step()
    urgent = steps.add("urgent", PROMPT[:4], max_tokens=3, peak_host_bytes=50)
    for _ in range(4):
        steps.step()
    assert (running(steps), steps.scheduler.num_preemptions) == (["low"], 0)
    finish(steps, low, urgent)


@pytest.mark.parametrize("max_passed", [32, 1])
def test_who_waits_for_host_memory_lets_its_holder_pass(monkeypatch, max_passed):
    """Otherwise nothing would go on: the aged one waits for the preempted one, and that for the aged one.

    Also when the holder stands far behind in the line, and while others of worse priority keep arriving.
    """
    monkeypatch.setattr(admission, "MAX_SKIPS", 2)
    monkeypatch.setattr(admission, "MAX_PASSED", max_passed)
    steps = Steps(max_host_bytes=100, max_num_seqs=1)
    low = steps.add("low", PROMPT[:4], max_tokens=9, priority=9, peak_host_bytes=60)
    steps.step()
    steps.add("short", PROMPT[:4], max_tokens=1)
    steps.step()
    assert waiting(steps) == ["low"]
    urgent = steps.add("urgent", PROMPT[:4], max_tokens=2, peak_host_bytes=50)
    num_steps = 0
    while "urgent" not in steps.ends:
        num_steps += 1
        steps.add(f"between {num_steps}", PROMPT[:3], max_tokens=2, priority=5)
        steps.step()
        assert num_steps < 50
    assert "low" in steps.ends
    finish(steps, low, urgent)


def test_check_integrity_finds_lost_host_memory():
    steps = Steps(max_host_bytes=100)
    steps.add("a", PROMPT[:4], peak_host_bytes=60)
    steps.plan()
    steps.scheduler.check_integrity()
    holdings = steps.scheduler.holdings
    [sequence] = holdings.host_bytes
    holdings.host_bytes[sequence] = 59
    with pytest.raises(IntegrityError, match=r"1 sequences have reserved 60 of 100 bytes of host memory.* need 60"):
        steps.scheduler.check_integrity()
    holdings.host_bytes[sequence] = 60
    holdings._num_host_bytes = 70
    with pytest.raises(IntegrityError, match="host memory"):
        steps.scheduler.check_integrity()


# --- long prompts ----------------------------------------------------------------------------------------------------------


def test_long_prompts_share_a_step_and_a_short_one_behind_them_gets_its_turn():
    steps = Steps(max_num_batched_tokens=16, long_prefill_token_threshold=6, num_pages=64)
    requests = [steps.add(name, PROMPT[:30], max_tokens=2) for name in ("long", "longer")]
    requests.append(steps.add("short", PROMPT[:3], max_tokens=2))
    assert steps.step() == {"long": 7, "longer": 6, "short": 3}, "a token was left, and is the first one's"
    assert steps.step() == {"short": 1, "long": 9, "longer": 6}
    finish(steps, *requests)


def test_a_lone_long_prompt_has_the_whole_step():
    steps = Steps(max_num_batched_tokens=16, long_prefill_token_threshold=4)
    steps.add("long", PROMPT[:40], max_tokens=1)
    assert [steps.step() for _ in range(3)] == [{"long": 16}, {"long": 16}, {"long": 8}]


def test_a_threshold_of_one_token_costs_decode_items_like_a_decode():
    steps = Steps(
        max_num_batched_tokens=16, max_num_seqs=4, long_prefill_token_threshold=1, max_decode_items=8, num_pages=64
    )
    requests = [steps.add(name, PROMPT[:30], max_tokens=3) for name in "abcd"]
    finish(steps, *requests)
