"""SamplingParams: what is refused names its field; what is taken is plain afterwards, whatever it was given as."""

import dataclasses
import sys

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.request import SAMPLING_FIELDS, Request, SamplingParams

NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = ["1", b"1", None, [1], (), object(), 1j, True, np.True_, NAN, INF, -INF, np.float32("nan")]
NOT_A_COUNT = [*NOT_A_NUMBER, 1.0, 1.5, np.float64(1), -2, 2**63, 10**30, -(2**63)]

VLLM_DEFAULTS = {
    "n": 1,
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
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
}


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == VLLM_DEFAULTS
    assert tuple(VLLM_DEFAULTS) == SAMPLING_FIELDS


def cases(names, values, but=()):
    return [pytest.param(n, v, id=f"{n}={v!r:.20}") for n in names.split() for v in values if (n, repr(v)) not in but]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases("temperature top_p min_p", [*NOT_A_NUMBER, -1e-9, -1, 10**400]),
        *cases("temperature", [100.0001, sys.float_info.max]),
        *cases("top_p", [0, 0.0, -0.0, 1.0000001, 2]),
        *cases("min_p", [1.0000001, 2]),
        *cases("n top_k min_tokens", NOT_A_COUNT),
        *cases("seed max_tokens logprobs", NOT_A_COUNT, but=[(n, "None") for n in ("seed", "max_tokens", "logprobs")]),
        *cases("n", [0, -1]),
        *cases("top_k min_tokens max_tokens logprobs", [2**31]),
        *cases("max_tokens", [0, -1]),
        *cases("min_tokens logprobs", [-1]),
        *cases("ignore_eos detokenize skip_special_tokens", [None, 0, 1, "", "true", np.True_]),
        *cases("spaces_between_special_tokens include_stop_str_in_output", [None, 0, 1, "", "true", np.True_]),
        *cases("stop", ["", [""], ["a", ""], ["a", None], [b"a"], b"a", 0, 5, True, [["a"]], 1.5]),
        *cases("stop_token_ids", [5, 0, True, "5", ["5"], [1.0], [True], [-1], [2**31], [None], [[1]], 1.5]),
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
        *cases("logprobs", [None, 0, 20]),
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


def test_several_completions_are_refused_with_a_remedy():
    with pytest.raises(InvalidRequestError, match=r"^n must be 1, got 2\. Submit the prompt several times"):
        SamplingParams(n=2)


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
    "value", [SamplingParams(stop=["a"]), Request(request_id="a", prompt_token_ids=(1,), sampling=SamplingParams())]
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
