"""What a request gives back: fields, order and defaults as in vLLM, and no two results share a list."""

import dataclasses

import pytest

from jaxserve.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestOutput, RequestTimings, TokenDelta


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (CompletionOutput, "index text token_ids cumulative_logprob logprobs finish_reason stop_reason"),
        (RequestOutput, "request_id prompt prompt_token_ids prompt_logprobs outputs finished metrics num_cached_tokens"),
        (FlatLogprobs, "start_indices end_indices token_ids logprobs ranks decoded_tokens"),
        (RequestTimings, "arrived scheduled first_token finished"),
    ],
)
def test_fields(kind, names):
    assert [f.name for f in dataclasses.fields(kind)] == names.split()


def test_a_logprob_reads_as_vllms():
    assert Logprob._fields == ("logprob", "rank", "decoded_token")


def test_what_was_not_asked_for_is_none():
    completion = CompletionOutput(0, "", [])
    assert (completion.cumulative_logprob, completion.logprobs, completion.finish_reason, completion.stop_reason) == (
        None,
    ) * 4
    delta = TokenDelta("a", "", [])
    assert (delta.logprobs, delta.finish_reason, delta.stop_reason, delta.timings, delta.error) == (None,) * 5


def test_results_share_nothing():
    first, second = (RequestOutput("a", None, [1]) for _ in range(2))
    first.outputs.append(CompletionOutput(0, "", []))
    assert second.outputs == []
    assert (second.finished, second.num_cached_tokens, second.metrics) == (False, 0, None)


@pytest.mark.parametrize("kind", [TokenDelta, CompletionOutput, RequestOutput, RequestTimings])
def test_a_misspelt_field_is_an_error(kind):
    """There are very many of these: slots keep them small."""
    value = object.__new__(kind)
    with pytest.raises(AttributeError):
        value.finish_raeson = "stop"


# --- log-probabilities in columns -------------------------------------------------------------------------------------------

PLACES = [
    None,
    {5: Logprob(-0.5, 1, "a")},
    {7: Logprob(-2.0, 9, None), 5: Logprob(-0.25, 1, "a")},
    {1: Logprob(-1.0, 3, "b")},
]


def test_columns_read_like_a_list_of_dicts():
    flat = FlatLogprobs()
    flat.append(PLACES[0])
    flat.extend(PLACES[1:])
    assert len(flat) == 4
    assert list(flat) == PLACES
    assert [flat[-1], flat[1]] == [PLACES[-1], PLACES[1]]
    assert list(flat[1:3]) == PLACES[1:3]
    assert list(flat[::-1]) == PLACES[::-1]
    assert isinstance(flat[1:], FlatLogprobs)
    assert PLACES[2] in flat
    for outside in (4, -5):
        with pytest.raises(IndexError):
            flat[outside]


def test_columns_are_vllms():
    flat = FlatLogprobs()
    flat.extend(PLACES)
    assert flat.start_indices == [0, 0, 1, 3]
    assert flat.end_indices == [0, 1, 3, 4]
    assert flat.token_ids == [5, 7, 5, 1]
    assert flat.logprobs == [-0.5, -2.0, -0.25, -1.0]
    assert flat.ranks == [1, 9, 1, 3]
    assert flat.decoded_tokens == ["a", None, "a", "b"]
