"""The prefix cache by itself, and in the scheduler: hits, order of eviction and references, to the page."""

import pytest

from jaxserve.errors import IntegrityError
from jaxserve.models import toy
from jaxserve.scheduling.page_pool import PagePool
from jaxserve.scheduling.prefix_cache import PrefixCache, page_keys
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, toy_config, toy_request

PROMPT = tuple(range(40, 100))
Z = 4


# --- keys ----------------------------------------------------------------------------------------------------------------


def test_a_key_depends_on_everything_before_it_and_on_nothing_behind():
    keys = page_keys(PROMPT[:10], Z, [])
    assert len(keys) == 2, "two full pages"
    assert page_keys(PROMPT[:8], Z, []) == keys
    assert page_keys((*PROMPT[:3], 1, *PROMPT[4:8]), Z, [])[1] != keys[1]
    assert page_keys((*PROMPT[4:8], *PROMPT[:4]), Z, [])[1] != keys[0]


def test_keys_are_extended_and_not_computed_again():
    keys = page_keys(PROMPT[:8], Z, [])
    longer = page_keys(PROMPT[:16], Z, list(keys))
    assert longer == page_keys(PROMPT[:16], Z, [])
    known = [b"not recomputed", b"either"]
    assert page_keys(PROMPT[:12], Z, known)[:2] == [b"not recomputed", b"either"]


# --- the cache -----------------------------------------------------------------------------------------------------------


def make_cache(num_pages=4):
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool)


def test_lookup_ends_at_the_first_unknown_key():
    pool, cache = make_cache()
    pages = pool.allocate(3)
    cache.insert(b"a", pages[0])
    cache.insert(b"c", pages[2])
    assert cache.lookup([b"a", b"b", b"c"]) == [pages[0]]
    assert cache.lookup([b"b"]) == []


def test_a_page_is_found_until_it_is_handed_out_again():
    pool, cache = make_cache(2)
    pages = pool.allocate(2)
    for key, page in zip((b"a", b"b"), pages, strict=True):
        cache.insert(key, page)
    pool.release(pages)
    assert cache.lookup([b"a", b"b"]) == pages
    assert pool.allocate(1) == [pages[1]], "the end of a context goes first"
    assert cache.lookup([b"a", b"b"]) == [pages[0]]
    cache.check_integrity()


def test_the_first_page_of_a_key_stays_and_a_page_keeps_its_key():
    pool, cache = make_cache()
    one, other = pool.allocate(2)
    cache.insert(b"a", one)
    cache.insert(b"a", other)
    cache.insert(b"b", one)
    assert cache.lookup([b"a"]) == [one]
    assert cache.lookup([b"b"]) == []
    assert cache.num_pages == 1


def test_evicted_and_reset_pages_are_not_found():
    pool, cache = make_cache()
    pages = pool.allocate(3)
    for key, page in zip((b"a", b"b", b"c"), pages, strict=True):
        cache.insert(key, page)
    cache.evict([pages[0], pages[0]])
    assert cache.lookup([b"a"]) == []
    assert cache.lookup([b"b"]) == [pages[1]]
    cache.reset()
    assert cache.lookup([b"b"]) == []
    assert cache.num_pages == 0


def test_integrity_finds_a_key_without_its_page():
    pool, cache = make_cache()
    cache.insert(b"a", pool.allocate(1)[0])
    del cache._page_of[b"a"]
    with pytest.raises(IntegrityError, match="0 keys and 1 pages"):
        cache.check_integrity()


# --- in the scheduler ----------------------------------------------------------------------------------------------------


class Engine:
    """Requests one after the other, or together, through plans that the fake runner checks and computes."""

    def __init__(self, num_groups=1, **config):
        values = {"max_num_batched_tokens": 64, "max_cached_pages": 16, "num_pages": 32} | config
        self.scheduler = Scheduler(toy_config(**values), num_groups)
        self.runner = FakeRunner(self.scheduler.config, num_groups)
        self.pages = {}

    def run(self, *requests):
        """Returns each request's tokens; notes the pages that it held."""
        tokens = {r.request_id: [] for r in requests}
        for request in requests:
            self.scheduler.add(request)
        in_flight = None
        while self.scheduler.request_ids() or in_flight is not None:
            plan = self.scheduler.plan()
            for sequence in self.scheduler._running:
                self.pages[sequence.request_id] = [list(pages) for pages in sequence.pages]
            previous, in_flight = in_flight, None if plan is None else self.runner.dispatch(plan)
            if previous is not None:
                for committed in self.scheduler.commit(self.runner.wait(previous)):
                    tokens[committed.request_id].append(committed.token.token_id)
            self.scheduler.check_integrity()
        return tokens

    def first_chunk(self, request_id):
        """Returns (position, tokens) of the first chunk that was computed for a request."""
        first = next(s for plan in self.runner.plans for s in plan.sequences if s.request_id == request_id)
        return first.start, first.num_tokens


def request(name, prompt, max_tokens=3, **fields):
    return toy_request(name, prompt, max_tokens=max_tokens, **fields)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_hit_takes_the_very_pages_and_computes_the_rest(num_groups):
    engine = Engine(num_groups)
    engine.run(request("a", PROMPT[:14]))
    tokens = engine.run(request("b", (*PROMPT[:10], 1, 2, 3)))
    assert tokens["b"] == toy.continuation([*PROMPT[:10], 1, 2, 3], 3)
    for first, second in zip(engine.pages["a"], engine.pages["b"], strict=True):
        assert second[:2] == first[:2], "two full pages are the same"
        assert set(second[2:]).isdisjoint(first[:3])
    assert engine.first_chunk("b") == (8, 5)
    assert engine.scheduler.num_cached_tokens == 8


def test_a_full_hit_computes_the_last_token_again():
    engine = Engine()
    engine.run(request("a", PROMPT[:12], max_tokens=1))
    tokens = engine.run(request("b", PROMPT[:12]))
    assert tokens["b"] == toy.continuation(PROMPT[:12], 3)
    assert engine.first_chunk("b") == (8, 4), "its page too, so that no page of others is written"


def test_generated_tokens_are_found_too():
    engine = Engine()
    answer = engine.run(request("a", PROMPT[:6], max_tokens=8))["a"]
    engine.run(request("b", (*PROMPT[:6], *answer, 33)))
    assert engine.first_chunk("b")[0] == 12, "13 of the 14 tokens were computed, three pages of them are full"


def test_a_step_gives_what_it_computes_to_those_behind_at_once():
    """Each layer stores a step's keys and values before any token attends; c begins with what a and b compute together."""
    engine = Engine(max_num_batched_tokens=16, long_prefill_token_threshold=8)
    engine.run(request("a", PROMPT[:14]), request("b", (*PROMPT[:12], 7)), request("c", (*PROMPT[:12], 8)))
    first = {s.request_id: (s.start, s.num_tokens) for s in engine.runner.plans[0].sequences}
    assert first == {"a": (0, 10), "b": (8, 5), "c": (12, 1)}
    assert engine.pages["b"][0][:2] == engine.pages["a"][0][:2]
    assert engine.pages["c"][0][:3] == engine.pages["b"][0][:3]
    engine.run(request("d", PROMPT[:20]))
    assert engine.first_chunk("d")[0] == 12


def test_a_shared_page_lives_as_long_as_one_holder():
    engine = Engine()
    engine.run(request("a", PROMPT[:9]))
    engine.run(request("b", (*PROMPT[:8], 1, 2), max_tokens=12), request("c", (*PROMPT[:8], 3), max_tokens=2))
    assert engine.pages["b"][0][:2] == engine.pages["c"][0][:2] == engine.pages["a"][0][:2]


def test_the_least_recently_used_end_goes_first():
    engine = Engine(num_pages=16, max_model_len=64)
    engine.run(request("a", PROMPT[:17], max_tokens=1))
    engine.run(request("b", PROMPT[30:47], max_tokens=1))
    a, b = (engine.pages[name][0] for name in "ab")
    engine.run(
        request("c", PROMPT[20:44], max_tokens=17)
    )  # needs 10 pages: 6 that were never used, then a's, last page first
    assert engine.pages["c"][0] == [*(set(range(16)) - {*a, *b}), *reversed(a)][:10]
    engine.run(request("d", PROMPT[30:47]))
    assert engine.first_chunk("d")[0] == 16, "b is still there"
    assert engine.pages["d"][0][:4] == b[:4]


def test_too_few_pages_leave_the_cached_ones_as_they_were():
    engine = Engine(num_pages=16)
    engine.run(request("a", PROMPT[:9], max_tokens=1))
    a = engine.pages["a"][0]
    hold = request("hold", PROMPT[20:52], max_tokens=12)
    late = request("late", (*PROMPT[:8], *range(32, 60)), max_tokens=1)
    tokens = engine.run(hold, late)
    assert tokens["late"] == toy.continuation(late.prompt_token_ids, 1)
    assert engine.pages["late"][0][:2] == a[:2]


def test_a_preempted_sequence_finds_its_own_pages():
    engine = Engine(num_pages=16, max_num_batched_tokens=40, max_num_seqs=2)
    one, other = request("one", PROMPT[:16], max_tokens=40), request("other", PROMPT[20:36], max_tokens=40)
    tokens = engine.run(one, other)
    assert engine.scheduler.num_preemptions > 0
    assert tokens == {r.request_id: toy.continuation(r.prompt_token_ids, 40) for r in (one, other)}
    resumed = [s for plan in engine.runner.plans[1:] for s in plan.sequences if s.num_tokens > 1 and s.start > 0]
    assert resumed, "it went on behind pages that were still there"


def test_a_broken_request_leaves_nothing_behind():
    engine = Engine()
    engine.runner.nonfinite = {"a"}
    engine.run(request("a", PROMPT[:12]))
    engine.runner.nonfinite = set()
    engine.run(request("b", PROMPT[:12]))
    assert engine.first_chunk("b")[0] == 0


def test_reset_forgets_and_running_sequences_go_on():
    engine = Engine()
    engine.run(request("a", PROMPT[:12]))
    engine.scheduler.reset_prefix_cache()
    engine.run(request("b", PROMPT[:12]))
    assert engine.first_chunk("b")[0] == 0
    assert engine.scheduler.num_cached_tokens == 0


def test_where_keys_depend_on_the_prompts_length_only_prompts_of_one_length_share():
    engine = Engine(reads_prompt_len=True)
    engine.run(request("a", PROMPT[:14]))
    engine.run(request("longer", PROMPT[:20]), request("equal", (*PROMPT[:12], 1, 2)))
    assert engine.first_chunk("longer")[0] == 0
    assert engine.first_chunk("equal")[0] == 12


def test_without_a_cache_nothing_is_shared():
    engine = Engine(max_cached_pages=0)
    engine.run(request("a", PROMPT[:12]))
    engine.run(request("b", PROMPT[:12]))
    assert engine.first_chunk("b")[0] == 0


def test_a_step_takes_no_more_cached_pages_than_its_input_has_room_for():
    engine = Engine(max_cached_pages=16, num_pages=64, max_num_seqs=4)
    prompts = [tuple(range(32 + i, 32 + i + 45)) for i in range(3)]
    for i, prompt in enumerate(prompts):
        engine.run(request(f"warm{i}", prompt, max_tokens=1))
    before = len(engine.runner.plans)
    hits = [request(f"hit{i}", prompt) for i, prompt in enumerate(prompts)]
    tokens = engine.run(*hits)
    assert all(tokens[r.request_id] == toy.continuation(r.prompt_token_ids, 3) for r in hits)
    admitted = [len(plan.admissions) for plan in engine.runner.plans[before : before + 3]]
    assert admitted == [1, 1, 1], "11 cached pages each, 16 a step"
