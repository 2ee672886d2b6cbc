"""SamplingParams: what is refused names its field; what is taken is plain afterwards, whatever it was given as."""

import dataclasses
import sys

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.request import SAMPLING_FIELDS, RepetitionDetection, Request, RequestOutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = ["1", b"1", None, [1], (), object(), 1j, True, np.True_, NAN, INF, -INF, np.float32("nan")]
NOT_A_COUNT = [*NOT_A_NUMBER, 1.0, 1.5, np.float64(1), -2, 2**63, 10**30, -(2**63)]

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "logprobs_mode": None,  # the engine's, as in vLLM
    "flat_logprobs": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "extra_args": None,
    "skip_reading_prefix_cache": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
}
WHOLE_OR_NONE = ["seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "thinking_token_budget"]
TOKEN_IDS = "stop_token_ids allowed_token_ids logprob_token_ids"


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS
    assert tuple(VLLM_DEFAULTS) == SAMPLING_FIELDS


def cases(names, values, but=()):
    return [pytest.param(n, v, id=f"{n}={v!r:.20}") for n in names.split() for v in values if (n, repr(v)) not in but]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases("temperature top_p min_p repetition_penalty", [*NOT_A_NUMBER, -1e-9, -1, 10**400]),
        *cases("presence_penalty frequency_penalty", [*NOT_A_NUMBER, -2.0001, 2.0001]),
        *cases("repetition_penalty", [0, 0.0, -0.0, 5e-324, 1e-40]),
        *cases("temperature", [100.0001, sys.float_info.max]),
        *cases("top_p", [0, 0.0, -0.0, 1.0000001, 2]),
        *cases("min_p", [1.0000001, 2]),
        *cases("n top_k min_tokens", NOT_A_COUNT),
        *cases(" ".join(WHOLE_OR_NONE), NOT_A_COUNT, but=[(n, "None") for n in WHOLE_OR_NONE]),
        *cases("n", [0, -1, 2**14 + 1]),
        *cases("top_k min_tokens max_tokens logprobs prompt_logprobs", [2**31]),
        *cases("max_tokens truncate_prompt_tokens", [0]),
        *cases("max_tokens min_tokens", [-1]),
        *cases("ignore_eos detokenize skip_special_tokens flat_logprobs", [None, 0, 1, "", "true", np.True_]),
        *cases("spaces_between_special_tokens include_stop_str_in_output", [None, 0, 1, "", "true", np.True_]),
        *cases("skip_reading_prefix_cache", [0, 1, "", np.True_]),
        *cases("logprobs_mode", ["", "RAW", "raw_logprobs", 0, True]),
        *cases("output_kind", [None, 0, "DELTA"]),
        *cases("structured_outputs", [{}, {"json": {}}, "x", True]),
        *cases("repetition_detection", [{}, True, {"max_pattern_size": 3}]),
        *cases("stop", ["", [""], ["a", ""], ["a", None], [b"a"], b"a", 0, 5, True, [["a"]], 1.5]),
        *cases("bad_words", ["", "a", [""], ["a", ""], ["a", None], [b"a"], b"a", 0, 5, True, [["a"]], 1.5]),
        *cases(TOKEN_IDS, [5, 0, True, "5", ["5"], [1.0], [True], [-1], [2**31], [None], [[1]], 1.5]),
        *cases("allowed_token_ids logprob_token_ids", [[], ()]),
        *cases("logprob_token_ids", [range(129)]),
        *cases("logit_bias", [[], 5, "5", {-1: 1}, {1.0: 1}, {"x": 1}, {"-1": 1}, {"٣": 1}, {True: 1}, {2**31: 1}]),
        *cases("logit_bias", [dict.fromkeys(range(1025), 1.0)]),
        *cases("extra_args", [[], 5, {1: [1.0]}]),
    ],
)
def test_a_bad_value_names_its_field(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name} must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases("temperature", [0, 0.0, 1e-9, 2, 100]),
        *cases("top_p", [1e-9, 5e-324, 1, 1.0]),
        *cases("min_p", [0, 1, 0.5]),
        *cases("top_k", [-1, 0, 1, 2**31 - 1]),
        *cases("seed", [None, 0, 2**63 - 1]),
        *cases("max_tokens", [None, 1, 2**31 - 1]),
        *cases("min_tokens", [0, 16]),
        *cases("logprobs prompt_logprobs", [None, -1, 0, 20]),
        *cases("truncate_prompt_tokens", [None, -1, 1]),
        *cases("n", [1, 2, 2**14]),
        *cases("presence_penalty frequency_penalty", [-2, 0, 2]),
        *cases("repetition_penalty", [1e-6, 1, 2]),
        *cases("logprobs_mode", [None, "raw", "processed"]),
        *cases("skip_reading_prefix_cache", [None, True, False]),
        *cases("output_kind", list(RequestOutputKind)),
        *cases("thinking_token_budget", [None, 0, 7]),
        *cases("allowed_token_ids logprob_token_ids", [(0,), (3, 1)]),
    ],
)
def test_a_boundary_is_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("whole", [np.int8, np.int32, np.int64, np.uint64])
def test_numpy_integers_become_ints(whole):
    params = SamplingParams(
        top_k=whole(5), seed=whole(7), max_tokens=whole(9), min_tokens=whole(1), logprobs=whole(2), stop_token_ids=[whole(3)]
    )
    values = (params.top_k, params.seed, params.max_tokens, params.min_tokens, params.logprobs, *params.stop_token_ids)
    assert values == (5, 7, 9, 1, 2, 3)
    assert {type(v) for v in values} == {int}


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.int64, int])
def test_numpy_numbers_become_floats(number):
    params = SamplingParams(temperature=number(1), top_p=number(1), min_p=number(1))
    assert {type(v) for v in (params.temperature, params.top_p, params.min_p)} == {float}


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2]), range(1, 3)])
def test_stop_token_ids_become_a_tuple_of_ints(ids):
    params = SamplingParams(stop_token_ids=ids)
    assert params.stop_token_ids == (1, 2)
    assert {type(i) for i in params.stop_token_ids} == {int}


@pytest.mark.parametrize(
    ("stop", "kept"), [("ab", ("ab",)), (["a", "b"], ("a", "b")), ([], ()), (None, ()), (("a",), ("a",))]
)
def test_stop_becomes_a_tuple(stop, kept):
    assert SamplingParams(stop=stop).stop == kept


def test_no_seed_has_two_spellings():
    assert SamplingParams(seed=-1) == SamplingParams(seed=None) == SamplingParams()
    assert SamplingParams(seed=0) != SamplingParams()


@pytest.mark.parametrize(("field", "bias"), [("logit_bias[5]", NAN), ("logit_bias[5]", "1"), ("logit_bias[5]", None)])
def test_a_bad_bias_names_its_token(field, bias):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(logit_bias={5: bias})
    assert caught.value.parameter == field


def test_a_bias_is_clamped_as_in_vllm_and_keys_may_be_digits():
    params = SamplingParams(logit_bias={"5": 1, np.int64(6): -INF, 7: 101})
    assert params.logit_bias == {5: 1.0, 6: -100.0, 7: 100.0}
    assert {type(i) for i in params.logit_bias} == {int}
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)).logit_bias) == 1024


@pytest.mark.parametrize("numbers", [5, ["1"], [None], [NAN], "5", None, [True]])
def test_parameters_of_a_processor_are_numbers(numbers):
    if numbers is None:
        assert SamplingParams(extra_args={"name": None}).extra_args == {"name": ()}
        return
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(extra_args={"name": numbers})
    assert caught.value.parameter == "extra_args.name"


def test_parameters_of_processors_are_plain():
    assert SamplingParams(extra_args={"a": [1, np.float32(0.5)], "b": []}).extra_args == {"a": (1.0, 0.5), "b": ()}
    assert SamplingParams(extra_args={}).extra_args is None


def test_a_repeated_stop_or_word_stands_once():
    params = SamplingParams(stop_token_ids=[3, 1, 3], bad_words=["a", "b", "a"])
    assert (params.stop_token_ids, params.bad_words) == ((3, 1), ("a", "b"))


def test_tokens_that_are_picked_take_the_place_of_the_most_likely_ones():
    assert [SamplingParams(logprob_token_ids=[5], logprobs=k).logprobs for k in (None, 0, 3, -1)] == [0] * 4
    assert SamplingParams(logprob_token_ids=list(range(128))).logprob_token_ids == tuple(range(128))


def test_no_thinking_budget_has_two_spellings():
    assert SamplingParams(thinking_token_budget=-1) == SamplingParams()


@pytest.mark.parametrize(
    ("skip", "prompt_logprobs", "reads"),
    [(None, None, True), (None, 0, False), (False, 0, False), (True, None, False), (False, None, True)],
)
def test_who_may_read_the_prefix_cache(skip, prompt_logprobs, reads):
    """Cached pages have no logits: prompt log-probabilities never come from them."""
    params = SamplingParams(skip_reading_prefix_cache=skip, prompt_logprobs=prompt_logprobs)
    assert params.reads_prefix_cache is reads


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_pattern_size", {"max_pattern_size": -1}),
        ("max_pattern_size", {"max_pattern_size": 1.5}),
        ("max_pattern_size", {"max_pattern_size": 4097}),
        ("max_pattern_size", {"max_pattern_size": 10, "min_count": 820}),
        ("min_pattern_size", {"max_pattern_size": 3, "min_pattern_size": 4}),
        ("min_pattern_size", {"max_pattern_size": 3, "min_pattern_size": -1}),
        ("min_count", {"max_pattern_size": 3, "min_count": 1}),
        ("min_count", {"max_pattern_size": 3, "min_count": True}),
    ],
)
def test_a_bad_repetition_detection_names_its_field(field, values):
    with pytest.raises(InvalidRequestError) as caught:
        RepetitionDetection(**values)
    assert caught.value.parameter == f"repetition_detection.{field}"


def test_a_repetition_detection_is_plain():
    detection = RepetitionDetection(max_pattern_size=np.int64(4096), min_count=np.int8(2))
    assert detection == RepetitionDetection(max_pattern_size=4096)
    assert type(detection.max_pattern_size) is int
    assert SamplingParams(repetition_detection=detection).repetition_detection == detection


def test_min_tokens_is_at_most_max_tokens():
    assert SamplingParams(min_tokens=16, max_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000
    with pytest.raises(InvalidRequestError, match=r"^min_tokens must be at most max_tokens \(16\), got 17"):
        SamplingParams(min_tokens=17)


def test_stop_needs_a_text():
    with pytest.raises(
        InvalidRequestError, match=r"^stop must be empty when detokenize is False, got 'a'\. Use stop_token_ids"
    ):
        SamplingParams(stop="a", detokenize=False)
    assert SamplingParams(stop=[], detokenize=False).stop == ()


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (9.9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy_is_below_vllms_epsilon(temperature, is_greedy):
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


@pytest.mark.parametrize(
    "value",
    [
        SamplingParams(stop=["a"]),
        SamplingParams(logit_bias={1: 2}, extra_args={"a": [1]}, structured_outputs=StructuredOutputsParams(json={})),
        Request(request_id="a", prompt_token_ids=(1,), sampling=SamplingParams()),
    ],
)
def test_frozen_hashable_and_by_keyword_only(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))
    assert hash(value) == hash(dataclasses.replace(value))
    assert dataclasses.replace(value) == value
    with pytest.raises(TypeError):
        type(value)(1)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop=["a" * 10_000, ""])
    assert len(str(caught.value)) < 200
    assert caught.value.value == ["a" * 10_000, ""]
