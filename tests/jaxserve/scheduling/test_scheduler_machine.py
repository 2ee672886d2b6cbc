"""The scheduler under any sequence of events: each request gets exactly the tokens that it would get alone.

One state machine: requests arrive with any lengths, parameters and priorities, steps run with one in flight, requests are ended
at any time, ids are used again at once, the pool is so small that sequences are preempted all the time, and host memory is short.
Tokens are computed through the pages that the plans name, so a wrong page is a wrong token. Nobody starves: once nobody of better
priority arrives any more, a request ends within `bound_of`, whatever else arrives.
"""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jaxserve.models import toy
from jaxserve.scheduling import admission
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, expected, toy_config, toy_request

PAGE_SIZE = 4
MAX_SKIPS = 3
MAX_HOST_BYTES = 100
IDS = [f"r{i}" for i in range(12)]
STOPS = [[], [], [], [], [40, 80], list(range(32, 40)), list(range(32, 127))]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(admission, "MAX_SKIPS", MAX_SKIPS)


def bound_of(machine, sequence):
    """Returns steps within which a sequence ends, if from now on nobody of better priority arrives.

    Say L is the longest context and R the number of rows. Take the first in order of all that live; nobody comes before it.
    Running, it gets a token a step and is never preempted: L + 2 steps. Waiting, it sees two kinds of steps. In those in which
    somebody behind it may enter, it is skipped, MAX_SKIPS + 1 times. In the others those that run only become fewer: each
    gets a token a step and ends within L + 2 steps, or gives way in one of at most R steps. Then the pool is free. Only host
    memory may be lacking still, for which those that hold it go on, one after the other in the worst case. All that holds for
    each that goes before the sequence, and then for the sequence. Where decode items are short, those that run may have to
    take turns: R times as long.
    """
    config, live = machine.config, machine.scheduler._sequences.values()
    num_before = sum(s.order <= sequence.order for s in live)
    num_turns = MAX_SKIPS + 2 + sum(s.request.peak_host_bytes > 0 for s in live)
    turns = config.max_num_seqs if machine.is_short_of_items else 1
    return num_before * num_turns * turns * (config.max_model_len + config.max_num_seqs + 3)


@st.composite
def configs(draw):
    max_model_len = draw(st.integers(12, 40))
    max_num_seqs = draw(st.sampled_from([3, 2, 5, 1]))
    longest = -(-max_model_len // PAGE_SIZE)
    changes = {}
    if draw(st.booleans()):  # fewer than a full step of decodes needs, at least the longest context's
        changes["max_decode_items"] = -(-max_model_len // 8) + draw(st.integers(0, 3))
    max_tokens = max_num_seqs + draw(st.sampled_from([11, 3, 40, 0]))
    return toy_config(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        long_prefill_token_threshold=min(max_tokens, draw(st.sampled_from([100, 5, 1]))),
        max_host_bytes=MAX_HOST_BYTES,
        page_size=PAGE_SIZE,
        num_pages=longest + draw(st.integers(0, 4)),
        max_cached_pages=draw(st.sampled_from([longest, 0])),
        **changes,
    )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(config=configs(), num_groups=st.integers(1, 2))
    def make(self, config, num_groups):
        self.config = config
        self.scheduler = Scheduler(config, num_groups)
        self.runner = FakeRunner(config, num_groups)
        self.in_flight = None
        self.live = {}  # id -> (request, tokens that it must get, why it must end, tokens so far)
        self.finished = []
        self.num_preempted_in_flight = self.num_displaced = self.num_flooded = 0
        self.is_short_of_items = config.max_decode_items < config.max_num_seqs * -(-config.max_model_len // 8)

    @rule(
        request_id=st.sampled_from(IDS),
        prompt_len=st.sampled_from([6, 9, 3, 14, 1, 25, 40]),
        seed=st.integers(0, 5),
        max_tokens=st.sampled_from([20, 12, None, 3, 1]),
        priority=st.integers(-1, 1),
        stops=st.sampled_from(STOPS),
        min_tokens=st.sampled_from([0, 0, 1, 7]),
        logprobs=st.sampled_from([None, 0, 2]),
        peak_host_bytes=st.sampled_from([0, 0, 40, MAX_HOST_BYTES]),
    )
    def arrive(self, request_id, prompt_len, seed, max_tokens, priority, stops, min_tokens, logprobs, peak_host_bytes):
        if request_id in self.live:
            return
        request = toy_request(
            request_id,
            [32 + (seed * 31 + i * i * 7) % 95 for i in range(min(prompt_len, self.config.max_model_len - 1))],
            priority=priority,
            stop_token_ids=stops,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or 20),
            logprobs=logprobs,
            peak_host_bytes=peak_host_bytes,
        )
        self.live[request_id] = (request, *expected(request, self.config), [])
        self.scheduler.add(request)

    @rule(request_id=st.sampled_from(IDS))
    def end(self, request_id):
        assert self.scheduler.finish(request_id) == (request_id in self.live)
        self.live.pop(request_id, None)

    @rule(count=st.sampled_from([5, 1, 2, 12]))
    def steps(self, count):
        for _ in range(count):
            self._step()

    @rule(
        prompt_len=st.sampled_from([9, 3, 1]),
        max_tokens=st.sampled_from([10, 4]),
        priority=st.integers(-2, 1),
        worse_by=st.sampled_from([0, 1]),
        peak_host_bytes=st.sampled_from([0, 40]),
    )
    def flood(self, prompt_len, max_tokens, priority, worse_by, peak_host_bytes):
        """One that needs much, amid many that need little and keep coming, none of better priority, ends all the same."""
        if "big" in self.live:
            return
        limit = 4 * self.config.max_num_seqs  # until they have every row or every page
        arrived = 0
        while arrived < limit:
            if arrived == 2 * self.config.max_num_seqs:
                self._arrive("big", self.config.max_model_len - 3, 7, 3, priority, MAX_HOST_BYTES if peak_host_bytes else 0)
                limit = bound_of(self, self.scheduler._sequences["big"])
            worse = priority + worse_by * (arrived % 2)
            self._arrive(f"flood {arrived}", prompt_len, arrived, max_tokens, worse, peak_host_bytes)
            arrived += 1
            self._step()
            if arrived > 2 * self.config.max_num_seqs and "big" not in self.live:
                break
            if len(self.live) > len(IDS) + 2 * self.config.max_num_seqs:
                self.end(max((name for name in self.live if name.startswith("flood")), key=lambda n: int(n.split()[1])))
        else:
            raise AssertionError(f"'big' has not ended after {limit} steps amid as many arrivals")
        self.num_flooded += arrived
        for name in [name for name in self.live if name.startswith("flood")]:
            self.end(name)

    def _arrive(self, request_id, prompt_len, seed, max_tokens, priority, peak_host_bytes):
        self.arrive(request_id, prompt_len, seed, max_tokens, priority, [], 0, None, peak_host_bytes)

    def _step(self):
        running = list(self.scheduler._running)
        plan = self.scheduler.plan()
        previous, self.in_flight = self.in_flight, None
        self.num_preempted_in_flight += sum(s.row is None and s.num_in_flight for s in running)
        if plan is not None:
            self.in_flight = self.runner.dispatch(plan)
            self._check_plan(plan, running)
        elif previous is None:
            assert not self.live, "there is work, nothing is in flight, and nothing is planned: it would hang"
        if previous is not None:
            self._commit(self.runner.wait(previous))
        return plan is not None or previous is not None

    def _check_plan(self, plan, running):
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        takes = {s.request_id: s.num_tokens for s in plan.sequences}
        assert len(takes) == len(plan.sequences) <= self.config.max_num_seqs
        displaced = [s for s in running if s.row is None]
        if plan.admissions and displaced:
            self.num_displaced += len(displaced)
            best = min(self.live[a.request_id][0].priority for a in plan.admissions)
            assert all(s.priority > best for s in displaced), "equals do not displace each other"
        for s in running:  # whoever ran and still runs goes on, unless its last token is in flight
            is_done = s.num_known + s.num_in_flight >= s.max_total_len and s.request_id not in takes
            assert s.row is None or is_done or s.request_id in takes or self.is_short_of_items
        for s in plan.sequences:
            request = self.live[s.request_id][0]
            assert s.num_logprobs == request.sampling.logprobs
            assert s.start + s.num_tokens <= len(request.prompt_token_ids) + len(self.live[s.request_id][3]) + 1
            limit = request.sampling.max_tokens or self.config.max_model_len
            assert s.start + s.num_tokens < min(self.config.max_model_len, len(request.prompt_token_ids) + limit)

    def _commit(self, result):
        for committed in self.scheduler.commit(result):
            request, answer, reason, tokens = self.live[committed.request_id]
            tokens.append(committed.token.token_id)
            assert tokens == answer[: len(tokens)]
            assert (committed.finish_reason is not None) == (tokens == answer)
            if committed.finish_reason is not None:
                assert committed.finish_reason == reason
                assert committed.stop_reason == (tokens[-1] if reason == "stop" else None)
                del self.live[committed.request_id]
                self.finished.append(request)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert set(self.scheduler.request_ids()) == self.live.keys()
        assert len(self.scheduler._sampling_in) <= 1

    def teardown(self):
        """Whatever is left ends within a bounded number of steps, and nothing of it stays."""
        if not hasattr(self, "scheduler"):
            return
        # Alone, a request takes at most a step a token; each preemption costs it at most that again.
        lone = sum(len(r.prompt_token_ids) + len(answer) for r, answer, _, _ in self.live.values())
        bound = 10 + 3 * lone
        num_steps = 0
        while self._step():
            num_steps += 1
            assert num_steps <= bound, f"{len(self.live)} requests are not done after {num_steps} steps"
        assert not self.live
        self.scheduler.check_integrity()
        assert self.scheduler.num_free_pages == self.config.num_pages
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


@pytest.mark.parametrize("num_examples", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_each_request_gets_what_it_would_get_alone(num_examples):
    examples = settings(max_examples=num_examples, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(SchedulerMachine, settings=examples)


def test_the_same_in_dense_traffic():
    """Hypothesis finds corners; this keeps the pool full for long, and shows that it was."""
    draw = random.Random(0)
    machine = SchedulerMachine()
    limits = {"max_model_len": 40, "num_pages": 13, "max_num_seqs": 5, "max_num_batched_tokens": 11, "max_cached_pages": 10}
    machine.make(toy_config(**limits, max_host_bytes=MAX_HOST_BYTES, long_prefill_token_threshold=5), 2)
    num_ended = 0
    for _ in range(400):
        machine.arrive(
            request_id=draw.choice(IDS),
            prompt_len=draw.choice([1, 5, 9, 14, 30]),
            seed=draw.randrange(100),
            max_tokens=draw.choice([None, 1, 10, 20]),
            priority=draw.choice([0, 0, 0, -1, 1]),
            stops=draw.choice(STOPS),
            min_tokens=draw.choice([0, 0, 7]),
            logprobs=None,
            peak_host_bytes=draw.choice([0, 0, 40, MAX_HOST_BYTES]),
        )
        if draw.random() < 0.05:
            num_ended += 1
            machine.end(request_id=draw.choice(IDS))
        if draw.random() < 0.03:
            machine.flood(prompt_len=9, max_tokens=10, priority=-2, worse_by=0, peak_host_bytes=0)
        machine.steps(count=draw.choice([1, 2, 5]))
        machine.books_balance()
    machine.teardown()
    num_chunks = sum(not s.samples for p in machine.runner.plans for s in p.sequences)
    seen = {
        "preemptions": machine.scheduler.num_preemptions,
        "preempted with a token in flight": machine.num_preempted_in_flight,
        "displaced by a better priority": machine.num_displaced,
        "tokens from the prefix cache": machine.scheduler.num_cached_tokens,
        "arrived in floods": machine.num_flooded,
        "chunks": num_chunks,
        "finished": len(machine.finished),
        "ended": num_ended,
    }
    assert min(seen.values()) > 10, f"traffic must reach what this test is about: {seen}"


def test_the_toy_can_tell_pages_apart():
    """Without this the machine could not fail: swapped, stale and missing tokens must change the next one."""
    context = list(range(40, 60))
    answer = toy.next_token(context)
    swapped = [*context[4:8], *context[:4], *context[8:]]
    stale = [*context[:-1], context[-1] + 1]
    assert len({answer, toy.next_token(swapped), toy.next_token(stale), toy.next_token(context[:-1])}) == 4
