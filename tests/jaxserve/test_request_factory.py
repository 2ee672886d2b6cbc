"""RequestFactory: a request that it makes is one that the engine is sure to serve."""

import concurrent.futures
import tracemalloc

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import Logprob
from jaxserve.request import SamplingParams
from jaxserve.request_factory import RequestFactory
from jaxserve.testing.fake_runner import toy_config
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer

EOS = 0


@pytest.fixture
def factory():
    return RequestFactory(toy_config(max_model_len=64), AsciiTokenizer(), (EOS,))


def test_a_text_is_tokenized_and_kept(factory):
    request = factory.make("hello")
    assert request.prompt_token_ids == tuple(b"hello")
    assert (request.prompt, request.priority, request.sampling) == ("hello", 0, SamplingParams())


def test_special_tokens_in_a_text_count_only_when_asked_for(factory):
    assert factory.make("a<eos>", parse_special=True).prompt_token_ids == (ord("a"), EOS)
    assert factory.make("a<eos>").prompt_token_ids == tuple(b"a<eos>")


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        np.array([5, 6]),
        np.array([5, 6], np.uint8),
        [np.int64(5), np.uint8(6)],
    ],
)
def test_token_ids_become_a_tuple_of_ints(factory, ids):
    request = factory.make(ids)
    assert request.prompt_token_ids == (5, 6)
    assert {type(i) for i in request.prompt_token_ids} == {int}
    assert request.prompt is None


@pytest.mark.parametrize(
    "prompt", [None, 5, 5.0, b"text", bytearray(b"t"), {5, 6}, {"prompt": "a"}, iter([5]), object(), np.int64(5)]
)
def test_what_is_neither_text_nor_token_ids_is_refused(factory, prompt):
    with pytest.raises(InvalidRequestError, match="^prompt must be a text or a list of token ids"):
        factory.make(prompt)


@pytest.mark.parametrize(
    "bad", [-1, 128, 2**63, 1.0, True, np.True_, "a", None, [5], np.float32(1), np.array([5, 6])], ids=lambda bad: repr(bad)
)
def test_a_bad_token_id_is_refused(factory, bad):
    with pytest.raises(InvalidRequestError, match=r"^prompt_token_ids must be whole numbers in \[0, 128\)"):
        factory.make([5, bad])


@pytest.mark.parametrize("ids", [np.array([[5, 6]]), np.array([5.0]), np.array([True])])
def test_an_array_of_anything_else_is_refused(factory, ids):
    with pytest.raises(InvalidRequestError, match="^prompt_token_ids must be"):
        factory.make(ids)


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], np.int32)])
def test_an_empty_prompt_is_refused(factory, prompt):
    with pytest.raises(InvalidRequestError, match="^prompt must be at least one token long"):
        factory.make(prompt)


def test_a_prompt_leaves_room_for_one_token(factory):
    assert len(factory.make([5] * 63).prompt_token_ids) == 63
    for prompt in ([5] * 64, "a" * 64):
        with pytest.raises(InvalidRequestError, match=r"^prompt must be shorter than max_model_len \(64 tokens\)"):
            factory.make(prompt)


def test_a_text_that_cannot_fit_is_not_even_tokenized(factory, monkeypatch):
    assert factory.max_prompt_chars == 64 * 64
    monkeypatch.setattr(AsciiTokenizer, "encode", None)
    with pytest.raises(InvalidRequestError, match="^prompt must be at most 4096 characters, got '4097 characters'"):
        factory.make("a" * 4097)


def test_without_a_tokenizer_a_text_is_refused_with_the_remedy():
    factory = RequestFactory(toy_config(), None)
    with pytest.raises(InvalidRequestError, match=r"no tokenizer.*Pass tokenizer="):
        factory.make("hello")
    assert factory.make([5]).stop_token_ids == frozenset()


# --- the model's limits on sampling ---------------------------------------------------------------------------------------


def test_logprobs_are_limited_by_the_engine(factory):
    assert factory.make("a", SamplingParams(logprobs=5)).sampling.logprobs == 5
    with pytest.raises(
        InvalidRequestError, match=r"^logprobs must be at most max_logprobs \(5\), got 6\. Raise max_logprobs"
    ):
        factory.make("a", SamplingParams(logprobs=6))


def test_stop_token_ids_are_in_the_vocabulary(factory):
    assert factory.make("a", SamplingParams(stop_token_ids=[127])).stop_token_ids == {127, EOS}
    with pytest.raises(InvalidRequestError, match=r"^stop_token_ids must be in the vocabulary, \[0, 128\), got 128"):
        factory.make("a", SamplingParams(stop_token_ids=[5, 128]))


@pytest.mark.parametrize(
    ("ignore_eos", "own", "stops"), [(False, [], {EOS}), (False, [7], {EOS, 7}), (True, [7], {7}), (True, [EOS], {EOS})]
)
def test_what_ends_a_request(factory, ignore_eos, own, stops):
    request = factory.make("a", SamplingParams(ignore_eos=ignore_eos, stop_token_ids=own))
    assert request.stop_token_ids == stops
    assert request.eos_token_ids == {EOS}


# --- identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1.0, "1", None, True, float("nan"), 2**31, -(2**31) - 1])
def test_a_bad_priority_is_refused(factory, bad):
    """The scheduler sorts by it: a string among numbers would end the engine."""
    with pytest.raises(InvalidRequestError, match="^priority must be a whole number"):
        factory.make("a", priority=bad)


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1, np.int32(3)])
def test_a_priority_is_kept(factory, priority):
    kept = factory.make("a", priority=priority).priority
    assert (kept, type(kept)) == (priority, int)


@pytest.mark.parametrize("bad", [5, b"a", ("a",)])
def test_a_request_id_is_a_string(factory, bad):
    with pytest.raises(InvalidRequestError, match="^request_id must be a string"):
        factory.make("a", request_id=bad)


def test_a_request_id_is_kept_or_made(factory):
    assert factory.make("a", request_id="mine").request_id == "mine"
    assert len({factory.make("a").request_id for _ in range(50)}) == 50


def test_a_seed_alone_decides_the_key():
    """On every engine, whatever came before it."""
    first, second = (RequestFactory(toy_config(seed=seed), AsciiTokenizer()) for seed in (0, 1))
    second.make("a")
    seeded = SamplingParams(seed=7)
    assert first.make("a", seeded).key == second.make("b", seeded).key
    assert first.make("a", SamplingParams(seed=8)).key != first.make("a", seeded).key
    assert all(0 <= word < 2**32 for word in first.make("a", seeded).key)


def test_without_a_seed_keys_differ_and_follow_from_the_engines_seed():
    first, same, other = (RequestFactory(toy_config(seed=seed), AsciiTokenizer()) for seed in (0, 0, 1))
    keys = [first.make("a").key for _ in range(20)]
    assert len(set(keys)) == 20
    assert [same.make("b").key for _ in range(20)] == keys
    assert other.make("a").key not in keys


def test_keys_are_distinct_across_threads(factory):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: factory.make("a").key, range(400)))
    assert len(set(keys)) == 400


@pytest.mark.parametrize(("logprobs", "max_tokens", "num_tokens"), [(0, 10, 10), (5, None, 59), (5, 1000, 59)])
def test_the_peak_of_host_memory_covers_what_log_probabilities_take(factory, logprobs, max_tokens, num_tokens):
    request = factory.make("hello", SamplingParams(logprobs=logprobs, max_tokens=max_tokens))
    tracemalloc.start()
    try:
        answer = [
            [{100_000 * place + i: Logprob(i / 7, 1000 + i, chr(300 + i)) for i in range(logprobs + 1)}]
            for place in range(1, num_tokens + 1)
        ]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(answer) == num_tokens
    assert taken < request.peak_host_bytes < 3 * taken


def test_no_log_probabilities_take_no_host_memory(factory):
    assert factory.make("hello").peak_host_bytes == 0


def test_a_request_beyond_all_host_memory_is_refused():
    factory = RequestFactory(toy_config(max_model_len=64, max_host_bytes=100_000), AsciiTokenizer())
    factory.make("hello", SamplingParams(logprobs=5, max_tokens=47))
    message = (
        r"logprobs must be within max_host_bytes \(100000\), got '5, which may take 100800 bytes of the host's memory'.*"
        "Lower max_tokens or logprobs, or raise max_host_bytes"
    )
    with pytest.raises(InvalidRequestError, match=message.replace("'", ".?")):
        factory.make("hello", SamplingParams(logprobs=5, max_tokens=48))
