"""The engine thread: nobody who submitted is left without an answer, whatever happens.

Threads meet at events, never by sleeping: `Gate` holds the engine inside a step. The timeouts only end a test that hangs.
"""

import functools
import queue
import threading

import pytest

from jaxserve.engine import Engine
from jaxserve.engine_thread import EngineThread
from jaxserve.errors import DrainingError, EngineDeadError, IntegrityError, InvalidRequestError
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, expected, toy_config, toy_request
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer

TIMEOUT_S = 20
PROMPT = tuple(range(40, 80))


class Gate:
    """Holds the engine thread in `wait` of each step, until opened."""

    def __init__(self, runner):
        self.reached = threading.Event()
        self.open = threading.Event()
        runner.before_wait = self._pass

    def _pass(self, plan):
        self.reached.set()
        assert self.open.wait(TIMEOUT_S)


class Inbox:
    """A listener that keeps every batch it was called with."""

    def __init__(self):
        self.batches = queue.SimpleQueue()
        self.threads = set()

    def __call__(self, batch):
        self.threads.add(threading.get_ident())
        self.batches.put(list(batch))

    def until_ends(self, num_ends):
        """Returns the batches up to and including the one that ends the `num_ends`-th request."""
        seen = []
        while num_ends > 0:
            seen.append(self.batches.get(timeout=TIMEOUT_S))
            num_ends -= sum(d.finish_reason is not None for d in seen[-1])
        return seen

    def end(self):
        """Returns the one last delta."""
        return self.until_ends(1)[-1][-1]


def tokens_of(batches):
    tokens = {}
    for delta in (d for batch in batches for d in batch):
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


@pytest.fixture
def config():
    return toy_config()


@pytest.fixture
def runner(config):
    return FakeRunner(config)


@pytest.fixture
def thread(config, runner):
    thread = EngineThread(Engine(Scheduler(config), runner, AsciiTokenizer()))
    yield thread
    in_thread(thread.close)


def in_thread(function):
    """Runs `function` in a thread of its own and gives up on it in time, where it would hang the test run."""
    worker = threading.Thread(target=function, daemon=True)
    worker.start()
    worker.join(TIMEOUT_S)
    assert not worker.is_alive(), f"{function} hangs"


def close_soon(thread):
    """Starts close() in another thread and returns once it has been called, before it is done."""
    worker = threading.Thread(target=thread.close, daemon=True)
    worker.start()
    while not thread._is_closed:  # close() sets it before anything that blocks
        pass
    return worker


# --- the ordinary ---------------------------------------------------------------------------------------------------------


def test_many_threads_submit_and_each_listener_hears_of_its_own(thread, config, runner):
    inboxes = [Inbox() for _ in range(6)]
    requests = [[toy_request(f"{i}.{n}", PROMPT[i : i + 9], max_tokens=5 + n) for n in range(4)] for i in range(6)]
    together = threading.Barrier(6)

    def submit(i):
        together.wait(TIMEOUT_S)
        for request in requests[i]:
            thread.submit(request, inboxes[i])

    workers = [threading.Thread(target=submit, args=(i,), daemon=True) for i in range(6)]
    for worker in workers:
        worker.start()
    for i, inbox in enumerate(inboxes):
        batches = inbox.until_ends(4)
        assert tokens_of(batches) == {r.request_id: expected(r, config)[0] for r in requests[i]}
        assert inbox.threads == {thread._thread.ident}
    assert thread.drain(TIMEOUT_S)
    assert all(inbox.batches.empty() for inbox in inboxes)


def test_a_listener_is_called_once_a_step_with_all_its_requests(thread, runner):
    gate = Gate(runner)
    thread.submit(toy_request("hold", max_tokens=1), Inbox())
    assert gate.reached.wait(TIMEOUT_S)
    both, other = Inbox(), Inbox()
    for name, inbox in (("a", both), ("b", both), ("c", other)):
        thread.submit(toy_request(name, PROMPT[:3], max_tokens=2), inbox)
    gate.open.set()
    assert [[d.request_id for d in batch] for batch in both.until_ends(2)] == [["a", "b"], ["a", "b"]]
    assert [[d.request_id for d in batch] for batch in other.until_ends(1)] == [["c"], ["c"]]


def test_a_bound_method_is_one_listener_however_often_it_is_looked_up(thread, runner):
    """`inbox.batches.put` is a new object each time; a front end passes its own method in the same way."""
    gate = Gate(runner)
    thread.submit(toy_request("hold", max_tokens=1), Inbox())
    assert gate.reached.wait(TIMEOUT_S)
    batches = queue.SimpleQueue()
    for name in "ab":
        thread.submit(toy_request(name, max_tokens=1), batches.put)
    gate.open.set()
    assert [d.request_id for d in batches.get(timeout=TIMEOUT_S)] == ["a", "b"]


def test_a_duplicate_id_is_told_to_its_own_listener_and_harms_nobody(thread, runner, config):
    gate = Gate(runner)
    first, second = Inbox(), Inbox()
    request = toy_request("a", PROMPT[:4], max_tokens=6)
    thread.submit(request, first)
    assert gate.reached.wait(TIMEOUT_S)
    thread.submit(toy_request("a", PROMPT[:9]), second)
    gate.open.set()
    refused = second.end()
    assert refused.finish_reason == "error"
    assert isinstance(refused.error, InvalidRequestError)
    assert refused.error.parameter == "request_id"
    assert tokens_of(first.until_ends(1))["a"] == expected(request, config)[0]


def test_abort_ends_what_runs_and_what_waits_and_ignores_the_rest(thread, runner):
    gate = Gate(runner)
    inbox = Inbox()
    for i in range(6):  # 4 rows
        thread.submit(toy_request(str(i), PROMPT[:3], max_tokens=10), inbox)
    assert gate.reached.wait(TIMEOUT_S)
    thread.abort(["0", "5", "nobody"])
    gate.open.set()
    ends = {d.request_id: d.finish_reason for batch in inbox.until_ends(6) for d in batch if d.finish_reason}
    assert ends == {"0": "abort", "5": "abort"} | dict.fromkeys("1234", "length")


def test_an_id_is_free_again_when_its_end_was_told(thread, config, runner):
    gate = Gate(runner)
    again = toy_request("a", PROMPT[:7], max_tokens=3)
    heard = queue.SimpleQueue()

    def listener(batch):
        for delta in batch:
            heard.put(delta)
            if delta.finish_reason == "abort":
                thread.submit(again, listener)

    thread.submit(toy_request("a", max_tokens=60), listener)
    assert gate.reached.wait(TIMEOUT_S)
    thread.abort(["a"])
    gate.open.set()
    deltas = []
    while not deltas or deltas[-1].finish_reason != "length":
        deltas.append(heard.get(timeout=TIMEOUT_S))
    cut = next(i for i, d in enumerate(deltas) if d.finish_reason == "abort")
    assert [t for d in deltas[cut + 1 :] for t in d.token_ids] == expected(again, config)[0]


def test_compilations_are_counted_from_ready_on(config, runner):
    counts = {}
    thread = EngineThread(Engine(Scheduler(config), runner, None), lambda thread: counts.setdefault(thread.name, 5))
    assert thread.stats().num_compilations_since_ready == 0
    counts["jaxserve-engine"] += 2
    assert thread.stats().num_compilations_since_ready == 2
    in_thread(thread.close)


def test_stats_are_a_snapshot(thread, runner):
    assert thread.stats().is_alive
    gate = Gate(runner)
    inbox = Inbox()
    thread.submit(toy_request("a", PROMPT[:4], max_tokens=2), inbox)
    assert gate.reached.wait(TIMEOUT_S)
    gate.open.set()
    inbox.end()
    assert thread.drain(TIMEOUT_S)
    stats = thread.stats()
    assert (stats.num_running, stats.num_prompt_tokens, stats.num_generated_tokens) == (0, 4, 2)
    assert stats.num_free_pages == stats.num_pages
    assert stats.is_draining


# --- the end --------------------------------------------------------------------------------------------------------------


def test_draining_refuses_and_waits_for_what_runs(thread, runner):
    gate = Gate(runner)
    inbox = Inbox()
    thread.submit(toy_request("a", PROMPT[:4], max_tokens=5), inbox)
    assert gate.reached.wait(TIMEOUT_S)
    assert thread.drain(0) is False
    with pytest.raises(DrainingError):
        thread.submit(toy_request("b"), inbox)
    gate.open.set()
    assert thread.drain(TIMEOUT_S) is True
    assert inbox.end().finish_reason == "length"
    assert inbox.batches.empty(), "nobody is told of b, whose submit raised"


def test_an_idle_engine_is_drained_at_once(thread):
    assert thread.drain(0)


def test_close_ends_what_runs_with_abort(thread, runner):
    gate = Gate(runner)
    inbox = Inbox()
    for i in range(6):
        thread.submit(toy_request(str(i), PROMPT[:3], max_tokens=50), inbox)
    assert gate.reached.wait(TIMEOUT_S)
    worker = close_soon(thread)
    gate.open.set()
    worker.join(TIMEOUT_S)
    assert not worker.is_alive()
    ends = [d.finish_reason for batch in inbox.until_ends(6) for d in batch if d.finish_reason]
    assert ends == ["abort"] * 6
    assert not thread.stats().is_alive
    assert thread.drain(0)
    with pytest.raises(DrainingError):
        thread.submit(toy_request("late"), inbox)
    in_thread(thread.close)


def test_a_request_submitted_just_before_close_hears_of_its_end(thread, runner):
    """It stands in the inbox while the engine ends its last request; the thread must look once more before it leaves."""
    gate = Gate(runner)
    first, second = Inbox(), Inbox()
    thread.submit(toy_request("a", max_tokens=1), first)
    assert gate.reached.wait(TIMEOUT_S)
    thread.submit(toy_request("b", max_tokens=50), second)
    worker = close_soon(thread)
    gate.open.set()
    worker.join(TIMEOUT_S)
    assert first.end().finish_reason in ("length", "abort")
    assert second.end().finish_reason == "abort"


def test_close_in_a_listener_does_not_wait_for_itself(thread):
    heard = Inbox()

    def listener(batch):
        thread.close()
        heard(batch)

    thread.submit(toy_request("a", max_tokens=50), listener)
    assert heard.end().finish_reason == "abort"


# --- death ----------------------------------------------------------------------------------------------------------------


class BrokenDeviceError(Exception):
    pass


def break_at(runner, step, gate=None):
    def before_wait(plan):
        if gate is not None:
            gate.reached.set()
            assert gate.open.wait(TIMEOUT_S)
        if plan.step == step:
            raise BrokenDeviceError("out of memory")

    runner.before_wait = before_wait


def assert_dead(delta):
    assert (delta.finish_reason, delta.token_ids) == ("error", [])
    assert isinstance(delta.error, EngineDeadError)
    assert isinstance(delta.error.__cause__, BrokenDeviceError)


def test_everybody_hears_of_an_engine_that_dies(thread, runner):
    gate = Gate(runner)
    break_at(runner, 0, gate)
    running, waiting, not_taken = Inbox(), Inbox(), Inbox()
    thread.submit(toy_request("hold", max_tokens=50), running)
    assert gate.reached.wait(TIMEOUT_S)
    for i in range(5):
        thread.submit(toy_request(str(i)), waiting)
    thread.submit(toy_request("last"), not_taken)
    gate.open.set()
    assert_dead(running.end())
    for delta in (d for batch in waiting.until_ends(5) for d in batch):
        assert_dead(delta)
    assert_dead(not_taken.end())
    with pytest.raises(EngineDeadError) as caught:
        thread.submit(toy_request("late"), running)
    assert isinstance(caught.value.__cause__, BrokenDeviceError)
    assert not thread.stats().is_alive
    assert thread.drain(TIMEOUT_S)
    thread.abort(["hold"])
    in_thread(thread.close)


def test_tokens_before_a_death_have_been_delivered(thread, runner):
    break_at(runner, 3)
    inbox = Inbox()
    thread.submit(toy_request("a", PROMPT[:4], max_tokens=50), inbox)
    *before, [last] = inbox.until_ends(1)
    assert len(before) == 3
    assert_dead(last)


def test_a_listener_that_raises_keeps_nobody_from_hearing(thread, runner):
    """Its exception ends the engine, as any bug does; also those whose end it interrupted hear of that."""
    gate = Gate(runner)
    hold = Inbox()
    thread.submit(toy_request("hold", max_tokens=1), hold)
    assert gate.reached.wait(TIMEOUT_S)

    def raising(batch):
        raise BrokenDeviceError("a listener's bug")

    others = [Inbox() for _ in range(3)]
    thread.submit(toy_request("0", max_tokens=1), others[0])
    thread.submit(toy_request("bad", max_tokens=1), raising)
    thread.submit(toy_request("1", max_tokens=1), others[1])
    thread.submit(toy_request("2", max_tokens=9), others[2])
    gate.open.set()
    assert hold.end().finish_reason == "length"
    assert others[0].end().finish_reason == "length", "it was told before"
    assert_dead(others[1].end())
    assert_dead(others[2].end())
    assert not thread.stats().is_alive


def test_books_that_do_not_balance_end_an_idle_engine(config):
    scheduler = Scheduler(config)
    inbox = Inbox()
    thread = EngineThread(Engine(scheduler, FakeRunner(config), None))
    thread.submit(toy_request("a", max_tokens=1), functools.partial(_leak, scheduler, inbox))
    inbox.end()
    thread._thread.join(TIMEOUT_S)
    with pytest.raises(EngineDeadError) as caught:
        thread.submit(toy_request("b"), inbox)
    assert isinstance(caught.value.__cause__, IntegrityError)
    in_thread(thread.close)


def _leak(scheduler, inbox, batch):
    scheduler.holdings.pools[0].allocate(1)
    inbox(batch)


# --- a step that does not return ------------------------------------------------------------------------------------------


def test_stalled_s_is_zero_when_idle_and_grows_while_a_step_hangs(thread, runner):
    gate = Gate(runner)
    inbox = Inbox()
    assert thread.stats().stalled_s == 0
    thread.submit(toy_request("a", max_tokens=3), inbox)
    assert gate.reached.wait(TIMEOUT_S)
    first = thread.stats().stalled_s
    thread.submit(toy_request("b", max_tokens=3), inbox)  # new work is no progress
    second = thread.stats().stalled_s
    assert 0 < first < second
    gate.open.set()
    inbox.until_ends(2)
    assert thread.drain(TIMEOUT_S)
    assert thread.stats().stalled_s == 0


def test_everybody_hears_that_an_engine_was_abandoned_once(thread, runner):
    gate = Gate(runner)
    running, not_taken = Inbox(), Inbox()
    thread.submit(toy_request("hold", max_tokens=50), running)
    assert gate.reached.wait(TIMEOUT_S)
    thread.submit(toy_request("next"), not_taken)
    in_thread(functools.partial(thread.abandon, "It hangs."))
    for inbox in (running, not_taken):
        delta = inbox.end()
        assert (delta.finish_reason, str(delta.error)) == ("error", "It hangs.")
        assert isinstance(delta.error, EngineDeadError)
    with pytest.raises(EngineDeadError, match="It hangs"):
        thread.submit(toy_request("late"), running)
    assert not thread.stats().is_alive
    assert thread.drain(TIMEOUT_S)
    in_thread(thread.close)  # although the step still hangs
    gate.open.set()
    thread._thread.join(TIMEOUT_S)
    assert not thread._thread.is_alive(), "once its step returns, it ends"
    assert running.batches.empty()
    assert not_taken.batches.empty()
