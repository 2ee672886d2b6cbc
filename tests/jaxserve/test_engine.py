"""The engine around the fake runner: what a request's deltas say, put together, and that nothing of it depends on its company."""

import math

import pytest

from jaxserve.engine import Engine
from jaxserve.errors import IntegrityError, InvalidRequestError, JaxserveError
from jaxserve.models import toy
from jaxserve.outputs import Logprob
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, expected, toy_config, toy_request
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer

PROMPT = tuple(b"the quick brown fox jumps over the lazy dog")


def spell(text):
    """Returns a model that says `text` after any prompt of `PROMPT`'s length, and then `~` for ever."""
    return lambda context: (text.encode() + b"~" * 100)[len(context) - len(PROMPT)]


class Driver:
    """An engine and all that came out of it."""

    def __init__(self, *, tokenizer=AsciiTokenizer(), next_token=toy.next_token, **config):  # noqa: B008
        self.config = toy_config(**config)
        self.runner = FakeRunner(self.config, next_token=next_token)
        self.engine = Engine(Scheduler(self.config), self.runner, tokenizer)
        self.deltas = {}

    def add(self, *args, **kwargs):
        request = toy_request(*args, **kwargs)
        self.engine.add(request)
        self.deltas[request.request_id] = []
        return request

    def step(self):
        self._note(self.engine.step())

    def abort(self, *request_ids):
        self._note(self.engine.abort(request_ids))

    def _note(self, deltas):
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)

    def run(self, limit=500):
        for _ in range(limit):
            if not self.engine.has_work:
                self.engine.check_integrity()
                return self
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def text(self, request_id="a"):
        return "".join(d.text for d in self.deltas[request_id])

    def tokens(self, request_id="a"):
        return [t for d in self.deltas[request_id] for t in d.token_ids]

    def end(self, request_id="a"):
        """Returns (finish reason, stop reason) of the last delta, which alone has one."""
        *before, last = self.deltas[request_id]
        assert all(d.finish_reason is None and d.timings is None for d in before)
        return last.finish_reason, last.stop_reason


def say(text, **sampling):
    """Runs one request whose model says `text`."""
    driver = Driver(next_token=spell(text))
    driver.add("a", PROMPT, **{"max_tokens": len(text), **sampling})
    return driver.run()


def test_deltas_put_together_are_the_whole_answer():
    driver = Driver()
    requests = [driver.add(name, PROMPT[i : 40 - i], max_tokens=12 + i) for i, name in enumerate("abcdef")]
    driver.run()
    for r in requests:
        tokens, reason = expected(r, driver.config)
        assert driver.tokens(r.request_id) == tokens
        assert driver.text(r.request_id) == bytes(tokens).decode()
        assert driver.end(r.request_id) == (reason, None)
        assert {d.num_prompt_tokens for d in driver.deltas[r.request_id]} == {len(r.prompt_token_ids)}
        assert all(d.logprobs is None for d in driver.deltas[r.request_id])


def test_each_step_brings_what_it_made_one_step_later():
    driver = Driver()
    driver.add("a", PROMPT[:4], max_tokens=3)
    counts = []
    while driver.engine.has_work:
        driver.step()
        counts.append(len(driver.tokens()))
    assert counts == [0, 1, 2, 3]


def test_an_id_in_use_is_refused_and_free_again_after_its_end():
    driver = Driver()
    driver.add("a", PROMPT[:4], max_tokens=2)
    with pytest.raises(InvalidRequestError, match="request_id must be unused by any running request, got 'a'"):
        driver.engine.add(toy_request("a"))
    driver.run()
    driver.add("a", PROMPT[:5], max_tokens=2)
    assert driver.run().tokens() == toy.continuation(PROMPT[:5], 2)


def test_without_a_tokenizer_and_without_detokenize_there_is_no_text():
    driver = Driver(tokenizer=None)
    driver.add("a", PROMPT[:4], max_tokens=3, logprobs=0)
    driver.run()
    assert driver.text() == ""
    assert [p.decoded_token for d in driver.deltas["a"] for entry in d.logprobs for p in entry.values()] == [None] * 3
    driver = Driver()
    driver.add("a", PROMPT[:4], max_tokens=3, detokenize=False)
    assert driver.run().text() == ""
    assert len(driver.tokens()) == 3


# --- stops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "include", "text", "num_tokens", "reason"),
    [
        ("END", False, "hello ", 9, "END"),
        ("END", True, "hello END", 9, "END"),
        (["zzz", "o E", "END"], False, "hell", 7, "o E"),
        ("h", False, "", 1, "h"),
        ("h", True, "h", 1, "h"),
        ("absent", False, "hello END of it", 15, None),
    ],
)
def test_stop_strings(stop, include, text, num_tokens, reason):
    driver = say("hello END of it", stop=stop, include_stop_str_in_output=include)
    assert driver.text() == text
    assert driver.tokens() == list(b"hello END of it"[:num_tokens]), "the tokens of a stop string stay"
    assert driver.end() == (("stop", reason) if reason else ("length", None))


def test_nothing_of_a_stop_string_is_sent_before_it_is_certain():
    driver = say("xENx", stop="END")
    assert [d.text for d in driver.deltas["a"]] == ["x", "", "", "ENx"]


def test_text_that_was_held_back_comes_with_the_end():
    assert say("hello EN", stop="END").text() == "hello EN"
    driver = Driver(next_token=spell("hello EN"))
    driver.add("a", PROMPT, max_tokens=20, stop="END")
    while driver.text() != "hello " or len(driver.tokens()) < 8:
        driver.step()
    driver.abort("a")
    assert (driver.text(), driver.end()) == ("hello EN", ("abort", None))


def test_a_stop_string_frees_the_request_at_once():
    driver = Driver(next_token=spell("hi END"))
    driver.add("a", PROMPT, max_tokens=20, stop="END")
    while not driver.deltas["a"] or driver.deltas["a"][-1].finish_reason is None:
        driver.step()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_free_pages) == (0, stats.num_pages)
    driver.run()
    assert len(driver.tokens()) == 6, "the token in flight is dropped"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_stays_in_the_tokens_and_not_in_the_text(include, text):
    driver = say("abcd", stop_token_ids=[ord("c")], include_stop_str_in_output=include)
    assert driver.tokens() == list(b"abc")
    assert driver.text() == text
    assert driver.end() == ("stop", ord("c"))


def test_a_stop_token_that_completes_a_stop_string_is_part_of_it_only_if_it_is_shown():
    """vLLM's order: the token is looked for first, and left out of the text in which strings are looked for."""
    driver = say("abcd", stop_token_ids=[ord("c")], stop="bc")
    assert (driver.text(), driver.end()) == ("ab", ("stop", ord("c")))
    driver = say("abcd", stop_token_ids=[ord("c")], stop="bc", include_stop_str_in_output=True)
    assert (driver.text(), driver.end()) == ("abc", ("stop", "bc"))


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 2), (1, 2), (2, 6), (5, 6), (6, 10)])
def test_stop_strings_count_only_after_min_tokens(min_tokens, num_tokens):
    driver = say("xSxxxSxxxS", stop="S", min_tokens=min_tokens)
    assert len(driver.tokens()) == num_tokens
    assert driver.end() == ("stop", "S")


def test_a_stop_string_begins_before_min_tokens_and_ends_after():
    driver = say("xxEND", stop="END", min_tokens=4)
    assert (driver.text(), driver.end()) == ("xx", ("stop", "END"))


# --- log-probabilities ---------------------------------------------------------------------------------------------------

LOG_NORM = math.log(math.exp(10) + 127)


def test_logprobs_hold_the_chosen_token_and_the_most_likely_ones():
    driver = Driver(next_token=lambda context: 65)
    for name, logprobs in (("chosen", 0), ("three", 3), ("none", None)):
        driver.add(name, PROMPT[:4], max_tokens=2, logprobs=logprobs)
    driver.run()
    best = Logprob(pytest.approx(10 - LOG_NORM), 1, "A")
    assert [d.logprobs for d in driver.deltas["chosen"]] == [[{65: best}]] * 2
    others = {0: Logprob(pytest.approx(-LOG_NORM), 2, "<eos>"), 1: Logprob(pytest.approx(-LOG_NORM), 3, "\x01")}
    assert [d.logprobs for d in driver.deltas["three"]] == [[{65: best} | others]] * 2
    assert [d.logprobs for d in driver.deltas["none"]] == [None] * 2


@pytest.mark.parametrize(("logprobs", "ranks"), [(1, [(2, 2), (65, 1)]), (4, [(2, 2), (65, 1), (0, 2), (1, 3)])])
def test_the_chosen_token_stands_first_and_once_with_its_own_rank(logprobs, ranks):
    """Its rank counts tokens that are more likely; among equals the place in the list would be another number."""
    driver = Driver(next_token=lambda context: 65)
    driver.add("a", PROMPT[:4], max_tokens=1, min_tokens=1, logprobs=logprobs, stop_token_ids=[0, 1, 65])
    driver.run()
    [[entry]] = [d.logprobs for d in driver.deltas["a"]]
    assert [(token, p.rank) for token, p in entry.items()] == ranks


# --- ends that come from outside, and errors ------------------------------------------------------------------------------


def test_abort_gives_a_last_delta_and_frees_everything():
    driver = Driver()
    driver.add("a", PROMPT[:4], max_tokens=30)
    driver.add("b", PROMPT[:4], max_tokens=30)
    for _ in range(5):
        driver.step()
    before = driver.tokens()
    driver.abort("a", "nobody", "a")
    assert driver.end() == ("abort", None)
    assert driver.deltas["a"][-1].token_ids == []
    driver.run()
    assert driver.tokens() == before
    assert len(driver.tokens("b")) == 30


def test_abort_before_the_first_step():
    driver = Driver()
    driver.add("a")
    driver.abort("a")
    assert (driver.end(), driver.engine.has_work) == (("abort", None), False)


def test_a_request_whose_logits_are_not_finite_ends_with_an_error_and_the_others_do_not():
    driver = Driver()
    driver.runner.nonfinite.add("bad")
    good = driver.add("good", PROMPT[:6], max_tokens=8)
    driver.add("bad", PROMPT[:6], max_tokens=8)
    driver.run()
    [last] = driver.deltas["bad"]
    assert (last.finish_reason, last.token_ids, last.text) == ("error", [], "")
    assert isinstance(last.error, JaxserveError)
    assert "no finite logits for request bad" in str(last.error)
    assert driver.tokens("good") == expected(good, driver.config)[0]
    assert driver.deltas["good"][-1].error is None


def test_a_request_that_can_never_start_is_an_error_and_no_endless_loop():
    """`build` refuses such a pool; should it ever not, the engine must end loudly instead of spinning."""
    driver = Driver(num_pages=2)
    driver.add("a", PROMPT[:12], max_tokens=1)
    with pytest.raises(IntegrityError, match="nothing can be computed for any of 1 requests"):
        driver.step()


# --- books ---------------------------------------------------------------------------------------------------------------


def test_timings_are_in_order_and_only_in_the_last_delta():
    driver = Driver(max_num_seqs=1)
    for name in "ab":
        driver.add(name, PROMPT[:4], max_tokens=3)
    driver.run()
    a, b = (driver.deltas[name][-1].timings for name in "ab")
    for name, timings in (("a", a), ("b", b)):
        made_s = [delta.made_s for delta in driver.deltas[name]]
        assert made_s == sorted(made_s)
        assert made_s[0] == timings.first_token
        assert made_s[-1] <= timings.finished
    for t in (a, b):
        assert t.arrived <= t.scheduled <= t.first_token <= t.finished
    assert b.scheduled >= a.first_token, "there is one row"


def test_scheduled_is_when_it_was_scheduled_first():
    driver = Driver(num_pages=8, max_model_len=32)
    for name in "ab":
        driver.add(name, PROMPT[:8], max_tokens=20)
    driver.run()
    assert driver.engine.stats().num_preemptions > 0
    assert driver.deltas["b"][-1].timings.scheduled <= driver.deltas["a"][-1].timings.first_token


def test_stats_count():
    driver = Driver(max_num_seqs=1)
    for name in "ab":
        driver.add(name, PROMPT[:4], max_tokens=3)
    driver.step()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert (stats.num_pages, stats.num_free_pages) == (32, 31)
    driver.run()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (0, 0, 6)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (8, 6)
    assert stats.num_free_pages == 32
