"""The scheduler, decision by decision. Each plan is run by `FakeRunner`, which refuses one that does not fit its bucket."""

import dataclasses

import numpy as np
import pytest

from jaxserve.errors import IntegrityError
from jaxserve.models import toy
from jaxserve.plan import PageUpdate, SampledToken, StepResult
from jaxserve.request import RepetitionDetection
from jaxserve.scheduling import admission
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import expected, toy_config, toy_request
from jaxserve.testing.scheduler_steps import Steps, running, waiting

PROMPT = tuple(range(40, 100))


# --- what a step computes ------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_step():
    assert Scheduler(toy_config()).plan() is None


def test_a_long_prompt_is_cut_by_the_budget_and_samples_once():
    steps = Steps(max_num_batched_tokens=16)
    steps.add("a", PROMPT[:40], max_tokens=1)
    assert [steps.step() for _ in range(3)] == [{"a": 16}, {"a": 16}, {"a": 8}]
    chunks = [p.sequences[0] for p in steps.runner.plans]
    assert [(s.start, s.samples) for s in chunks] == [(0, False), (16, False), (32, True)]
    assert sum((s.token_ids for s in chunks), ()) == PROMPT[:40]
    steps.run()
    assert steps.tokens["a"] == toy.continuation(PROMPT[:40], 1)


def test_prompts_share_a_step_in_order_of_arrival():
    steps = Steps(max_num_batched_tokens=16)
    for name in "abc":
        steps.add(name, PROMPT[:10])
    assert steps.plan() == {"a": 10, "b": 6}
    steps.commit()
    assert steps.plan() == {"a": 1, "b": 4, "c": 10}


def test_decodes_come_first_in_the_batch_whatever_their_order_of_service():
    steps = Steps(max_num_batched_tokens=16)
    steps.add("late", PROMPT[:4], priority=1)
    steps.step()
    steps.add("first", PROMPT[:8], priority=0)
    steps.step()
    steps.add("urgent", PROMPT[:9], priority=-1)
    steps.step()
    assert [(s.request_id, s.num_tokens) for s in steps.last_plan.sequences] == [("first", 1), ("late", 1), ("urgent", 9)]


def test_the_token_in_flight_is_left_to_the_device_and_counted_once():
    steps = Steps()
    steps.add("a", PROMPT[:4], max_tokens=3)
    steps.plan()
    [sequence] = steps.scheduler._running
    assert (sequence.num_known, sequence.num_in_flight, sequence.num_computed) == (4, 1, 4)
    steps.plan()
    assert steps.last_plan.sequences[0].token_ids == ()
    assert (sequence.num_known, sequence.num_in_flight, sequence.num_computed) == (4, 2, 5)
    steps.commit()
    assert (sequence.num_known, sequence.num_in_flight, sequence.num_computed) == (5, 1, 5)


def test_a_token_that_landed_before_it_was_computed_is_sent_by_the_host():
    steps = Steps()
    steps.add("a", PROMPT[:4], max_tokens=3)
    steps.plan()
    steps.land()
    steps.plan()
    assert steps.last_plan.sequences[0].token_ids == tuple(toy.continuation(PROMPT[:4], 1))


def test_a_running_prompt_leaves_a_token_for_each_decode_behind_it():
    """Otherwise an urgent or a resumed long prompt would stop every decode that comes later in the order."""
    steps = Steps(max_num_batched_tokens=16, max_num_seqs=4)
    for name in "ab":
        steps.add(name, PROMPT[:2], max_tokens=20, priority=1)
    steps.step()
    steps.add("long", PROMPT[:50], max_tokens=1, priority=0)
    taken = [steps.step() for _ in range(4)]
    assert taken == [{"a": 1, "b": 1, "long": 14}] * 3 + [{"a": 1, "b": 1, "long": 8}]


def test_one_token_at_a_time_when_the_budget_is_the_number_of_rows():
    steps = Steps(max_num_batched_tokens=4, max_num_seqs=4)
    requests = [steps.add(name, PROMPT[:7], max_tokens=6) for name in "abcd"]
    steps.run()
    for r in requests:
        assert (steps.tokens[r.request_id], steps.ends[r.request_id][0]) == expected(r, steps.config)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_each_group_has_pages_of_its_own(num_groups):
    steps = Steps(num_groups=num_groups, num_pages=16)
    requests = [steps.add(name, PROMPT[i : i + 9], max_tokens=30) for i, name in enumerate("abc")]
    steps.run(2000)
    assert steps.scheduler.num_preemptions > 0
    for r in requests:
        assert steps.tokens[r.request_id] == expected(r, steps.config)[0]


# --- where a sequence ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_nothing_is_planned_past_a_certain_end(max_tokens):
    steps = Steps()
    steps.add("a", PROMPT[:4], max_tokens=max_tokens)
    taken = []
    while (step := steps.plan()) is not None:
        taken.append(step)
    assert taken == [{"a": 4}] + [{"a": 1}] * (max_tokens - 1)
    [last] = steps.commit()
    assert last.finish_reason == "length"
    assert steps.scheduler.num_running == 0


def test_the_models_length_ends_a_sequence_too():
    steps = Steps(max_model_len=16)
    for name, prompt_len in (("a", 10), ("b", 15)):
        steps.add(name, PROMPT[:prompt_len], max_tokens=None if name == "a" else 100)
    steps.run()
    assert {name: len(tokens) for name, tokens in steps.tokens.items()} == {"a": 6, "b": 1}
    assert steps.ends == {"a": ("length", None), "b": ("length", None)}


def test_a_stop_token_ends_a_sequence_and_the_surplus_token_is_dropped():
    answer = toy.continuation(PROMPT[:4], 10)
    index = next(i for i in range(2, 10) if answer[i] not in answer[:i])
    steps = Steps()
    steps.add("a", PROMPT[:4], max_tokens=10, stop_token_ids=[answer[index]])
    steps.run()
    assert steps.tokens["a"] == answer[: index + 1]
    assert steps.ends["a"] == ("stop", answer[index])
    assert len(steps.runner.plans) == index + 2, "one step more than tokens: it was dispatched before the stop was known"


@pytest.mark.parametrize(("is_own", "ignore_eos", "reason"), [(False, False, None), (True, False, None), (True, True, "id")])
def test_the_end_of_sequence_token_is_no_stop_reason(is_own, ignore_eos, reason):
    """vLLM's order: the model's end-of-sequence token counts as such even where a request lists it among its own."""
    eos = toy.continuation(PROMPT[:4], 1)[0]
    request = toy_request("a", PROMPT[:4], stop_token_ids=[eos] if is_own else [], ignore_eos=ignore_eos)
    request = type(request)(
        request_id="a",
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        stop_token_ids=frozenset([eos]),
        eos_token_ids=frozenset([eos]),
    )
    steps = Steps()
    steps.tokens["a"] = []
    steps.scheduler.add(request)
    steps.run()
    assert steps.tokens["a"] == [eos]
    assert steps.ends["a"] == ("stop", eos if reason else None)


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_stop_tokens_are_forbidden_before_min_tokens(min_tokens):
    stops = list(range(32, 127))  # everything that the toy says
    steps = Steps()
    request = steps.add("a", PROMPT[:4], max_tokens=8, min_tokens=min_tokens, stop_token_ids=stops)
    steps.run()
    sampled = [s for p in steps.runner.plans for s in p.sequences if s.samples]
    assert [s.forbidden for s in sampled[:min_tokens]] == [tuple(stops)] * min_tokens
    assert {s.forbidden for s in sampled[min_tokens:]} == {()}
    assert steps.tokens["a"] == expected(request, steps.config)[0]
    assert steps.tokens["a"][:-1] == [0] * min_tokens
    assert steps.ends["a"][0] == "stop"


def test_a_stop_token_that_comes_in_spite_of_min_tokens_does_not_end():
    """A request that forbids the whole vocabulary leaves the device no choice; min_tokens holds all the same."""
    scheduler = Scheduler(toy_config())
    scheduler.add(toy_request("a", PROMPT[:4], max_tokens=8, min_tokens=2, stop_token_ids=[50]))
    ends = []
    for step in range(2):
        scheduler.plan()
        ends += [c.finish_reason for c in scheduler.commit(StepResult(step, {"a": SampledToken(50)}))]
    assert ends == [None, "stop"]


def test_min_tokens_counts_across_a_preemption():
    steps = Steps(num_pages=8, max_model_len=32)
    first = steps.add("first", PROMPT[:8], max_tokens=20)
    request = steps.add("a", PROMPT[:8], max_tokens=20, min_tokens=12, stop_token_ids=list(range(32, 127)))
    steps.run()
    assert steps.scheduler.num_preemptions > 0
    for r in (first, request):
        assert steps.tokens[r.request_id] == expected(r, steps.config)[0]


def test_a_sequence_without_finite_logits_ends_alone():
    steps = Steps()
    steps.runner.nonfinite.add("bad")
    good = steps.add("good", PROMPT[:4], max_tokens=5)
    steps.add("bad", PROMPT[:4], max_tokens=5)
    steps.run()
    assert steps.ends == {"bad": ("error", None), "good": ("length", None)}
    assert steps.tokens == {"good": expected(good, steps.config)[0], "bad": []}


# --- pages under pressure ------------------------------------------------------------------------------------------------


def test_page_updates_are_told_once_and_again_in_a_new_row():
    steps = Steps(num_pages=8, max_model_len=32, max_num_batched_tokens=8)
    steps.add("old", PROMPT[:8], max_tokens=20)
    steps.add("young", PROMPT[:8], max_tokens=20)
    steps.run()
    assert steps.scheduler.num_preemptions > 0
    owners, told = {}, {}
    for plan in steps.runner.plans:
        for seated in plan.admissions:
            owners[seated.row] = seated.request_id
            told[seated.row] = []
        for update in plan.page_updates:
            told[update.row].append(update.place)
        for row, indices in told.items():
            assert indices == list(range(len(indices))), f"row {row} of {owners[row]}: each entry once, in order"
        for s in plan.sequences:
            assert len(told[s.row]) == -(-(s.start + s.num_tokens) // 4), "exactly the pages in use so far"


def test_page_updates_name_the_pages_of_the_pool():
    steps = Steps(page_size=4)
    steps.add("a", PROMPT[:9])
    steps.plan()
    [sequence] = steps.scheduler._running
    assert steps.last_plan.page_updates == tuple(PageUpdate(0, sequence.row, i, p) for i, p in enumerate(sequence.pages[0]))


def test_a_prompt_is_admitted_only_when_all_of_it_fits():
    steps = Steps(num_pages=16, max_num_batched_tokens=16)
    steps.add("a", PROMPT[:30], max_tokens=2)
    steps.add("b", PROMPT[:40], max_tokens=2)
    steps.step()
    assert (running(steps), waiting(steps)) == (["a"], ["b"])
    assert steps.scheduler.num_free_pages == 16 - 8
    steps.run()
    assert steps.scheduler.num_preemptions == 0
    assert len(steps.ends) == 2


def test_the_lowest_priority_and_then_the_latest_gives_way():
    steps = Steps(num_pages=8, max_model_len=32, max_num_batched_tokens=16)
    steps.add("low", PROMPT[:8], max_tokens=20, priority=5)
    steps.add("high", PROMPT[:8], max_tokens=20, priority=-5)
    steps.add("middle", PROMPT[:8], max_tokens=20)
    order = []
    for _ in range(30):
        before = set(running(steps))
        steps.step()
        order += [name for name in ("low", "middle", "high") if name in before - set(running(steps)) - steps.ends.keys()]
    assert order[:2] == ["low", "middle"]
    assert "high" not in order
    steps.run()
    assert {end[0] for end in steps.ends.values()} == {"length"}


def test_nobody_is_admitted_in_a_step_that_preempts():
    steps = Steps(num_pages=8, max_model_len=32, max_num_batched_tokens=32, max_num_seqs=2)
    for name, prompt_len in (("a", 12), ("b", 15), ("tiny", 2)):
        steps.add(name, PROMPT[:prompt_len], max_tokens=17)
    while not steps.scheduler.num_preemptions:
        taken = steps.step()
    assert (taken, waiting(steps)) == ({"a": 1}, ["b", "tiny"]), "there are a row and pages for tiny, but not yet"
    assert steps.step() == {"a": 1, "tiny": 2}
    steps.run()
    assert len(steps.ends) == 3


def test_a_preempted_sequence_waits_for_its_token_and_is_computed_again_from_its_tokens():
    steps = Steps(num_pages=8, max_model_len=32, max_num_batched_tokens=32)
    steps.add("a", PROMPT[:12], max_tokens=8)
    b = steps.add("b", PROMPT[:16], max_tokens=8)
    while not steps.scheduler.num_preemptions:
        steps.plan()
    [sequence] = steps.scheduler._waiting
    assert (sequence.request_id, sequence.num_in_flight, sequence.num_computed, sequence.row) == ("b", 1, 0, None)
    num_known = sequence.num_known
    steps.scheduler.finish("a")  # room for b, whose token is still on the device
    assert steps.scheduler.plan() is None
    steps.commit()
    assert (sequence.num_known, sequence.num_in_flight) == (num_known + 1, 0)
    assert steps.plan() == {"b": num_known + 1}
    again = steps.last_plan.sequences[0]
    assert again.token_ids == (*PROMPT[:16], *steps.tokens["b"])
    assert again.samples
    assert [a.request_id for a in steps.last_plan.admissions] == ["b"]
    steps.commit()
    steps.run()
    assert steps.tokens["b"] == expected(b, steps.config)[0]


def test_a_preempted_sequence_whose_last_token_is_in_flight_just_ends():
    steps = Steps(num_pages=8, max_model_len=32, max_num_batched_tokens=32)
    steps.add("a", PROMPT[:16], max_tokens=8)
    b = steps.add("b", PROMPT[:16], max_tokens=1)
    steps.plan()
    assert steps.plan() == {"a": 1}, "a takes the page of b, which has nothing left to compute"
    assert steps.scheduler.num_preemptions == 1
    steps.commit()
    assert steps.tokens["b"] == expected(b, steps.config)[0]
    assert steps.ends["b"] == ("length", None)
    assert waiting(steps) == []


# --- waiting -------------------------------------------------------------------------------------------------------------


def _with_a_big_one_waiting(**config):
    """A pool of 16 pages: "holder" keeps 12 of them for long, and "big" waits for 8."""
    steps = Steps(num_pages=16, max_num_batched_tokens=64, **config)
    steps.add("holder", PROMPT[:44], max_tokens=4)
    steps.step()
    steps.add("big", PROMPT[:32], max_tokens=2)
    return steps


def test_who_lacks_pages_is_passed_by_those_behind():
    steps = _with_a_big_one_waiting()
    steps.add("small", PROMPT[:4], max_tokens=2)
    assert "small" in steps.step()
    assert waiting(steps) == ["big"]


def test_who_was_passed_too_often_is_passed_no_more(monkeypatch):
    monkeypatch.setattr(admission, "MAX_SKIPS", 2)
    steps = _with_a_big_one_waiting()
    admitted = []
    for i in range(6):
        steps.add(f"small {i}", PROMPT[:4], max_tokens=1)
        taken = steps.step() or {}
        admitted += [name for name in taken if name.startswith("small") or name == "big"]
    assert admitted[:2] == ["small 0", "small 1"]
    assert admitted[2] == "big", "after two steps nobody passes it any more"
    steps.run()
    assert len(steps.ends) == 8


def test_patience_starts_anew_when_a_sequence_is_admitted():
    steps = _with_a_big_one_waiting()
    steps.step()
    [big] = steps.scheduler._waiting
    assert big.num_skips > 0
    while waiting(steps):
        steps.step()
    assert big.num_skips == 0


def test_a_stream_of_small_ones_cannot_starve_a_big_one():
    """Without ageing it would never start: some small ones hold pages at any time."""
    steps = Steps(num_pages=16, max_num_batched_tokens=64, max_num_seqs=8)
    for i in range(3):
        steps.add(f"early {i}", PROMPT[:9], max_tokens=10 + i)
    steps.step()
    steps.add("big", PROMPT[:56], max_tokens=1)
    num_steps = 0
    while "big" not in steps.ends:
        num_steps += 1
        steps.add(f"small {num_steps}", PROMPT[:9], max_tokens=10)
        steps.step()
        assert num_steps < admission.MAX_SKIPS + 40
    assert num_steps > admission.MAX_SKIPS, "it was passed for a while"


def test_urgent_ones_go_before_an_aged_one(monkeypatch):
    monkeypatch.setattr(admission, "MAX_SKIPS", 0)
    steps = _with_a_big_one_waiting()
    steps.add("urgent", PROMPT[:4], max_tokens=1, priority=-1)
    steps.add("small", PROMPT[:4], max_tokens=1)
    taken = steps.step()
    assert "urgent" in taken
    assert "small" not in taken


def test_a_step_looks_past_a_bounded_number_of_waiting_sequences(monkeypatch):
    monkeypatch.setattr(admission, "MAX_PASSED", 3)
    steps = Steps(num_pages=16, max_num_batched_tokens=64)
    steps.add("holder", PROMPT[:56], max_tokens=4)
    steps.step()
    for i in range(3):
        steps.add(f"big {i}", PROMPT[:32], max_tokens=1)
    steps.add("small", PROMPT[:4], max_tokens=1)
    assert steps.step() == {"holder": 1}
    assert [s.num_skips for s in steps.scheduler._waiting] == [1, 1, 1, 0]


def test_rows_bound_what_runs():
    steps = Steps(max_num_seqs=2)
    for name in "abc":
        steps.add(name, PROMPT[:2], max_tokens=2)
    assert steps.step() == {"a": 2, "b": 2}
    assert (running(steps), waiting(steps)) == (["a", "b"], ["c"])
    steps.run()
    assert len(steps.ends) == 3


def test_decode_items_bound_a_step():
    """At split_size 8 a decode at position 23 takes 3 items; a lone token that does not fit waits, a chunk goes on."""
    steps = Steps(max_decode_items=8, split_size=8, max_num_batched_tokens=64)
    for name in "abc":
        steps.add(name, PROMPT[:23], max_tokens=3)
    assert steps.step() == {"a": 23, "b": 23, "c": 18}
    assert steps.step() == {"a": 1, "b": 1, "c": 5}, "3 items each for a and b"
    assert steps.step() == {"a": 1, "b": 1}, "4 items each for a and b, nothing for c"
    steps.run()
    for name in "abc":
        assert steps.tokens[name] == toy.continuation(PROMPT[:23], 3)


# --- ends that come from outside -----------------------------------------------------------------------------------------


def _state_waiting(steps):
    steps.scheduler.finish("other")
    for name in ("x", "y"):
        steps.add(name, PROMPT[:2], max_tokens=50)
    steps.plan()
    steps.add("a", PROMPT[:4])
    assert "a" in waiting(steps)


def _state_mid_prefill(steps):
    steps.add("a", PROMPT[:40])
    steps.step()
    assert 0 < steps.scheduler._sequences["a"].num_computed < 40


def _state_in_flight(steps):
    steps.add("a", PROMPT[:4])
    steps.plan()
    assert steps.scheduler._sequences["a"].num_in_flight == 1


def _state_decode(steps):
    steps.add("a", PROMPT[:4])
    for _ in range(4):
        steps.step()
    assert len(steps.tokens["a"]) >= 2


def _preempt(steps):
    steps.scheduler.finish("other")
    steps.add("b", PROMPT[:12], max_tokens=40)
    steps.add("a", PROMPT[:16], max_tokens=40)
    while not steps.scheduler.num_preemptions:
        steps.plan()
    assert waiting(steps) == ["a"]


def _state_preempted_in_flight(steps):
    _preempt(steps)
    assert steps.scheduler._sequences["a"].num_in_flight == 1


def _state_preempted(steps):
    _preempt(steps)
    steps.commit()
    assert steps.scheduler._sequences["a"].num_in_flight == 0


STATES = [
    _state_waiting,
    _state_mid_prefill,
    _state_in_flight,
    _state_decode,
    _state_preempted,
    _state_preempted_in_flight,
]


def _in_state(reach):
    steps = Steps(num_pages=16, max_num_seqs=2, max_num_batched_tokens=16)
    if reach in (_state_preempted, _state_preempted_in_flight):
        steps = Steps(num_pages=16, max_num_seqs=2, max_num_batched_tokens=32)
    steps.add("other", PROMPT[:3], max_tokens=30)
    steps.plan()
    reach(steps)
    return steps


@pytest.mark.parametrize("reach", STATES)
def test_finish_in_any_state_frees_everything_and_drops_what_comes(reach):
    steps = _in_state(reach)
    num_tokens = len(steps.tokens["a"])
    assert steps.scheduler.finish("a")
    steps.scheduler.check_integrity()
    assert not steps.scheduler.finish("a"), "it is gone"
    steps.run()
    assert len(steps.tokens["a"]) == num_tokens
    assert steps.scheduler.num_free_pages == 16
    assert not steps.scheduler._sequences
    assert not steps.scheduler._sampling_in


@pytest.mark.parametrize("reach", STATES)
def test_an_id_can_be_used_again_at_once(reach):
    """Also while a token of its last bearer is in flight: that token belongs to nobody."""
    steps = _in_state(reach)
    steps.scheduler.finish("a")
    again = steps.add("a", PROMPT[20:26], max_tokens=5)
    steps.run()
    assert steps.tokens["a"] == expected(again, steps.config)[0]


# --- the books -----------------------------------------------------------------------------------------------------------


def test_commit_takes_only_steps_that_were_planned():
    steps = Steps()
    steps.add("a", PROMPT[:4])
    steps.plan()
    result = steps.runner.wait(steps.in_flight)
    steps.scheduler.commit(result)
    with pytest.raises(KeyError):
        steps.scheduler.commit(result)


def _share_a_row(scheduler):
    scheduler._running[0].row = scheduler._running[1].row


def _lose_a_page(scheduler):
    scheduler._running[0].pages[0].pop()


def _lose_a_sequence(scheduler):
    scheduler._waiting.pop()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_share_a_row, "held twice"),
        (_lose_a_page, "wrong reference counts"),
        (_lose_a_sequence, "sequences are lost"),
    ],
)
def test_check_integrity_finds_damage(damage, message):
    steps = Steps(max_num_seqs=2)
    for name in "abc":
        steps.add(name, PROMPT[:4])
    steps.plan()
    steps.scheduler.check_integrity()
    damage(steps.scheduler)
    with pytest.raises(IntegrityError, match=message):
        steps.scheduler.check_integrity()


def test_how_a_row_samples_is_told_at_admission():
    steps = Steps()
    steps.add("warm", PROMPT[:2], temperature=0.001, top_k=-1, top_p=0.5, min_p=0.1)
    steps.add("cold", PROMPT[:2], temperature=1e-6)
    steps.plan()
    warm, cold = (a.sampling for a in steps.last_plan.admissions)
    assert warm[:4] == (0.001, 0, 0.5, 0.1), "-1 is no top_k, like 0"
    assert cold.temperature == 0.0


def test_logprobs_are_asked_for_by_sequence():
    steps = Steps()
    for name, logprobs in (("none", None), ("chosen", 0), ("three", 3)):
        steps.add(name, PROMPT[:2], logprobs=logprobs)
    steps.plan()
    assert [s.num_logprobs for s in steps.last_plan.sequences] == [None, 0, 3]


def test_an_output_that_repeats_itself_ends():
    """Not before min_tokens; the pattern may be as long as was asked for."""
    detection = RepetitionDetection(max_pattern_size=2, min_count=3)
    for min_tokens, length in ((0, 6), (9, 9)):
        steps = Steps(next_token=lambda context: 65 + len(context) % 2)
        steps.add("a", max_tokens=20, min_tokens=min_tokens, repetition_detection=detection)
        steps.run()
        assert len(steps.tokens["a"]) == length
        assert steps.ends["a"] == ("repetition", None)


def test_a_form_that_is_complete_ends_before_min_tokens():
    """Where a constraint leaves nothing but a stop token, it is sampled however early, and it is the end."""
    steps = Steps(next_token=lambda context: 7)
    request = dataclasses.replace(toy_request("a", max_tokens=9, min_tokens=5, stop_token_ids=[7]), constraint=object())
    steps.tokens["a"] = []
    steps.scheduler.add(request)
    handle = steps.runner.dispatch(steps.scheduler.plan())
    steps.runner.sample(handle, {"a": np.array([1 << 7, 0, 0, 0], np.uint32)})
    (committed,) = steps.scheduler.commit(steps.runner.wait(handle))
    assert (committed.token.token_id, committed.finish_reason) == (7, "stop")
