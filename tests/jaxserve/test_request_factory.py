"""RequestFactory: a request that it makes is one that the engine is sure to serve."""

import concurrent.futures

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.request import SamplingParams
from jaxserve.request_factory import RequestFactory
from jaxserve.structured.all_of import AllOf
from jaxserve.structured.bad_words import BadWords
from jaxserve.structured.thinking import Reasoning, ThinkingBudget
from jaxserve.structured_outputs import StructuredOutputsParams
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
        InvalidRequestError,
        match=r"^prompt_logprobs must be at most max_logprobs \(5\), or -1 .*, got 6\. Raise max_logprobs",
    ):
        factory.make("a", SamplingParams(prompt_logprobs=6))
    with pytest.raises(InvalidRequestError, match=r"^logprobs must be at most max_logprobs \(5\)"):
        factory.make("a", SamplingParams(logprobs=6))
    assert factory.make("a", SamplingParams(logprobs=-1, prompt_logprobs=-1)).sampling.logprobs == -1


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"])
def test_token_ids_are_in_the_vocabulary(factory, name):
    of = (lambda ids: dict.fromkeys(ids, 1.0)) if name == "logit_bias" else list
    assert getattr(factory.make("a", SamplingParams(**{name: of([127])})).sampling, name)
    with pytest.raises(InvalidRequestError, match=rf"^{name} must be in the vocabulary, \[0, 128\), got 128"):
        factory.make("a", SamplingParams(**{name: of([5, 128])}))


def test_some_allowed_token_lets_the_completion_go_on(factory):
    """With none, min_tokens would leave nothing to sample."""
    assert factory.make("a", SamplingParams(allowed_token_ids=[EOS]))
    assert factory.make("a", SamplingParams(allowed_token_ids=[EOS], min_tokens=1, ignore_eos=True))
    assert factory.make("a", SamplingParams(allowed_token_ids=[EOS, 7], min_tokens=1))
    for own in ({"allowed_token_ids": [EOS]}, {"allowed_token_ids": [EOS, 7], "stop_token_ids": [7]}):
        with pytest.raises(InvalidRequestError, match="^allowed_token_ids must be with a token that does not end"):
            factory.make("a", SamplingParams(min_tokens=1, **own))


@pytest.mark.parametrize("name", ["stop", "bad_words", "structured_outputs"])
def test_texts_need_a_tokenizer(name):
    with pytest.raises(InvalidRequestError, match=f"^{name} must be empty, as this engine has no tokenizer"):
        value = StructuredOutputsParams(regex="x") if name == "structured_outputs" else ["x"]
        RequestFactory(toy_config(), None).make([5], SamplingParams(**{name: value}))


def test_a_budget_of_thinking_needs_an_engine_that_knows_thinking(factory):
    with pytest.raises(InvalidRequestError, match="^thinking_token_budget must be None or -1"):
        factory.make("a", SamplingParams(thinking_token_budget=5))
    able = RequestFactory(toy_config(), AsciiTokenizer(), reasoning=Reasoning((60,), (62,)))
    constraint = able.make("a", SamplingParams(thinking_token_budget=5)).constraint
    assert constraint == ThinkingBudget(Reasoning((60,), (62,)), 5)
    both = SamplingParams(thinking_token_budget=5, structured_outputs=StructuredOutputsParams(choice=["a"]))
    with pytest.raises(InvalidRequestError, match="^thinking_token_budget must be None or -1 beside structured_outputs"):
        able.make("a", both)
    with pytest.raises(InvalidRequestError, match="^stop_token_ids must be fewer than the vocabulary has"):
        able.make("a", SamplingParams(min_tokens=1, stop_token_ids=range(128)))


def test_processors_are_named_and_have_their_number_of_parameters():
    factory = RequestFactory(toy_config(logits_processors=(("shift", 2), ("flag", 0))), AsciiTokenizer())
    assert factory.make("a", SamplingParams(extra_args={"shift": [1, 2], "flag": []})).sampling.extra_args
    for args, message in (
        ({"shfit": [1, 2]}, r"^extra_args.shfit must be of a logits processor .*\(flag, shift\)"),
        ({"shift": [1]}, r"^extra_args.shift must be 2 numbers, got \[1.0\]"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            factory.make("a", SamplingParams(extra_args=args))


def test_a_prompt_is_truncated_from_the_left(factory):
    def kept(prompt, k, **sampling):
        params = SamplingParams(truncate_prompt_tokens=k, **sampling)
        return factory.make(prompt, params).prompt_token_ids

    assert kept("abcdef", 2) == tuple(b"ef")
    assert kept([1, 2, 3], 5) == (1, 2, 3)
    assert len(kept([5] * 500, -1)) == 64 - 16, "room for max_tokens"
    assert len(kept([5] * 500, -1, max_tokens=None)) == 63
    assert len(kept([5] * 500, -1, max_tokens=1000)) == 1
    assert len(kept([5] * 500, 63)) == 63
    with pytest.raises(InvalidRequestError, match=r"^truncate_prompt_tokens must be less than max_model_len \(64\), got 64"):
        kept("abc", 64)


class Compiler:
    """Knows one grammar."""

    def compile(self, params):
        if params.regex != "a+":
            raise InvalidRequestError("structured_outputs.regex", params.regex, "a+")
        return "compiled"


def test_a_grammar_is_compiled_with_the_request(factory):
    own = RequestFactory(toy_config(), AsciiTokenizer(), compiler=Compiler())
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    request = own.make("a", params)
    assert request.constraint == "compiled"
    assert own.make("a").constraint is None
    with pytest.raises(InvalidRequestError, match="^structured_outputs.regex must be a"):
        own.make("a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="b")))
    with pytest.raises(InvalidRequestError, match="^structured_outputs must be None, as this engine serves none"):
        factory.make("a", params)


def test_bad_words_are_a_constraint_beside_the_grammar():
    own = RequestFactory(toy_config(), AsciiTokenizer(), compiler=Compiler())
    alone = own.make("a", SamplingParams(bad_words=["xy", "z"])).constraint
    assert alone == BadWords((tuple(b"xy"), tuple(b"z")))
    structured = StructuredOutputsParams(regex="a+")
    both = own.make("a", SamplingParams(bad_words=["xy", "z"], structured_outputs=structured)).constraint
    assert both == AllOf(("compiled", alone))
    small = RequestFactory(toy_config(vocab_size=100), AsciiTokenizer())
    with pytest.raises(InvalidRequestError, match=r"^bad_words must be of tokens in \[0, 100\)"):
        small.make("a", SamplingParams(bad_words=["z"]))


# --- the model's defaults -------------------------------------------------------------------------------------------------


def test_the_models_defaults_are_for_whoever_passes_nothing():
    factory = RequestFactory(toy_config(), AsciiTokenizer(), defaults={"temperature": 0.5, "max_tokens": 9})
    assert factory.make("a").sampling == factory.default_sampling == SamplingParams(temperature=0.5, max_tokens=9)
    assert factory.make("a", SamplingParams()).sampling == SamplingParams()
    assert factory.defaults == {"temperature": 0.5, "max_tokens": 9}


# --- several completions --------------------------------------------------------------------------------------------------


def test_several_completions_are_requests_of_their_own(factory):
    params = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1, temperature=0)
    parent = factory.make("abc", params, request_id="x", priority=4)
    children = factory.fan_out(parent)
    assert [c.request_id for c in children] == ["x-0", "x-1", "x-2"]
    assert [c.sampling.seed for c in children] == [2**63 - 2, 2**63 - 1, 0]
    assert [c.sampling.prompt_logprobs for c in children] == [1, None, None], "computed once"
    assert {(c.sampling.n, c.prompt_token_ids, c.priority, c.prompt) for c in children} == {(1, tuple(b"abc"), 4, "abc")}
    alone = factory.make("abc", SamplingParams(seed=2**63 - 1))
    assert [c.key == alone.key for c in children] == [False, True, False]
    assert sum(c.peak_host_bytes for c in children) == parent.peak_host_bytes


def test_completions_without_a_seed_differ(factory):
    children = factory.fan_out(factory.make("abc", SamplingParams(n=20)))
    assert len({c.key for c in children}) == 20


def test_one_completion_is_the_request_itself(factory):
    request = factory.make("abc")
    assert factory.fan_out(request) == (request,)
    assert factory.fan_out(request)[0] is request


# --- host memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "num_bytes"),
    [
        ({"max_tokens": None}, 0),
        ({"max_tokens": 8, "logprobs": 0}, 8 * (320 + 1024)),
        ({"max_tokens": 1000, "logprobs": 0}, 61 * (320 + 1024)),
        ({"max_tokens": None, "logprobs": 0}, 61 * (320 + 1024)),
        ({"max_tokens": 8, "logprobs": 5, "n": 3}, 3 * 8 * (6 * 320 + 1024)),
        ({"max_tokens": 8, "logprob_token_ids": [1, 2]}, 8 * (3 * 320 + 1024)),
        ({"max_tokens": 8, "prompt_logprobs": 1, "n": 2}, 3 * (2 * 320 + 1024)),
        ({"max_tokens": 8, "prompt_logprobs": -1, "logprobs": -1}, (8 + 3) * (4 * 128 + 1024)),
    ],
)
def test_the_peak_of_a_request(factory, sampling, num_bytes):
    assert factory.make("abc", SamplingParams(**sampling)).peak_host_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("logprobs", {"max_tokens": 20, "logprobs": -1, "prompt_logprobs": 0}),
        ("logprobs", {"max_tokens": 1, "n": 20, "logprobs": 0}),
        ("prompt_logprobs", {"max_tokens": 1, "prompt_logprobs": -1}),
    ],
)
def test_more_than_the_engine_may_ever_use_is_refused(name, sampling):
    factory = RequestFactory(toy_config(max_host_bytes=10_000), AsciiTokenizer())
    assert factory.make([5] * 20, SamplingParams(max_tokens=1, logprobs=-1)).peak_host_bytes < 10_000
    with pytest.raises(InvalidRequestError, match=rf"^{name} must be such that .*max_host_bytes \(10000 bytes\)"):
        factory.make([5] * 20, SamplingParams(**sampling))


# --- embeddings -----------------------------------------------------------------------------------------------------------


def test_an_embedding_needs_one_step_and_nothing_of_sampling(factory):
    given = SamplingParams(n=3, max_tokens=50, logprobs=3, truncate_prompt_tokens=2, stop="a", temperature=0)
    request = factory.make("abcd", given, pooling="mean")
    assert (request.pooling, request.prompt_token_ids) == ("mean", tuple(b"cd"))
    assert request.sampling == SamplingParams(max_tokens=1, detokenize=False, truncate_prompt_tokens=2)
    with pytest.raises(InvalidRequestError, match="^pooling must be None or one of last, mean, got 'max'"):
        factory.make("a", pooling="max")


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
