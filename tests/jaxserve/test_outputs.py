"""What a request gives back: fields, order and defaults as in vLLM, and no two results share a list."""

import dataclasses

import pytest

from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimings, TokenDelta


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (CompletionOutput, "index text token_ids cumulative_logprob logprobs finish_reason stop_reason"),
        (RequestOutput, "request_id prompt prompt_token_ids outputs finished num_cached_tokens metrics"),
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
