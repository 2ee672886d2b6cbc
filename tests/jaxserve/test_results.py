"""Results put together from deltas, for each kind of stream, by hand."""

import numpy as np
import pytest

from jaxserve.errors import JaxserveError
from jaxserve.outputs import AllLogprobs, FlatLogprobs, Logprob, RequestTimings, TokenDelta
from jaxserve.request import Request, RequestOutputKind, SamplingParams
from jaxserve.results import PoolingResult, PromptResult, embedding, similarity

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


def entry(token_id):
    return {token_id: Logprob(-token_id / 8, 2, f"<{token_id}>"), 99: Logprob(-0.125, 1, "<99>")}


def started(n=1, **sampling):
    params = SamplingParams(**sampling)
    request = Request(request_id="r", prompt_token_ids=(5, 6), sampling=params, prompt="ab")
    ids = ["r"] if n == 1 else [f"r-{i}" for i in range(n)]
    return PromptResult(request, [Request(request_id=i, prompt_token_ids=(5, 6), sampling=params) for i in ids])


def delta(request_id, *token_ids, **fields):
    return TokenDelta(request_id, "".join(chr(96 + i) for i in token_ids), list(token_ids), **fields)


def test_the_final_output_has_everything_and_nothing_comes_before():
    result = started()
    timings = RequestTimings(1.0, 2.0, 3.0, 4.0)
    assert result.add([delta("r", 1)]) is None
    output = result.add(
        [delta("r", 2), delta("r", 3, finish_reason="stop", stop_reason=3, timings=timings, num_cached_tokens=1)]
    )
    (completion,) = output.outputs
    assert (output.request_id, output.prompt, output.prompt_token_ids, output.finished) == ("r", "ab", [5, 6], True)
    assert (output.metrics, output.num_cached_tokens, output.prompt_logprobs) == (timings, 1, None)
    assert (completion.index, completion.text, completion.token_ids) == (0, "abc", [1, 2, 3])
    assert (completion.finish_reason, completion.stop_reason, completion.finished()) == ("stop", 3, True)
    assert completion.logprobs is None
    assert completion.cumulative_logprob is None
    assert result.num_generated_tokens == 3


@pytest.mark.parametrize("is_flat", [False, True])
def test_log_probabilities_add_up_in_either_form(is_flat):
    result = started(logprobs=1, prompt_logprobs=1, flat_logprobs=is_flat)
    prompt = [None, entry(6)]
    result.add([delta("r", 1, logprobs=[entry(1)], prompt_logprobs=prompt)])
    output = result.add([delta("r", 2, 3, logprobs=[entry(2), entry(3)], finish_reason="length")])
    (completion,) = output.outputs
    kind = FlatLogprobs if is_flat else list
    assert type(completion.logprobs) is type(output.prompt_logprobs) is kind
    assert list(completion.logprobs) == [entry(1), entry(2), entry(3)]
    assert list(output.prompt_logprobs) == prompt
    assert completion.cumulative_logprob == -6 / 8


def test_the_whole_vocabulary_stays_an_array():
    result = started(logprobs=-1, flat_logprobs=True)
    row = AllLogprobs(np.array([-1.0, -0.5, -2.0], np.float32), str)
    output = result.add([delta("r", 1, logprobs=[row], finish_reason="length")])
    assert output.outputs[0].logprobs == [row]
    assert output.outputs[0].logprobs[0] is row
    assert output.outputs[0].cumulative_logprob == -0.5


def test_a_cumulative_stream_shows_copies_of_all_so_far():
    result = started(logprobs=1)
    first = result.add([delta("r", 1, logprobs=[entry(1)])], CUMULATIVE)
    second = result.add([delta("r", 2, logprobs=[entry(2)], finish_reason="length")], CUMULATIVE)
    assert [(o.outputs[0].text, o.outputs[0].token_ids, o.finished) for o in (first, second)] == [
        ("a", [1], False),
        ("ab", [1, 2], True),
    ]
    assert [len(o.outputs[0].logprobs) for o in (first, second)] == [1, 2]
    assert [o.outputs[0].cumulative_logprob for o in (first, second)] == [-1 / 8, -3 / 8]


def test_a_delta_stream_shows_what_is_new_and_the_prompt_once():
    result = started(logprobs=1, prompt_logprobs=0)
    first = result.add([delta("r", 1, logprobs=[entry(1)], prompt_logprobs=[None, entry(6)])], DELTA)
    second = result.add([delta("r", 2, logprobs=[entry(2)], finish_reason="length")], DELTA)
    assert [(o.outputs[0].text, o.outputs[0].token_ids, o.outputs[0].logprobs) for o in (first, second)] == [
        ("a", [1], [entry(1)]),
        ("b", [2], [entry(2)]),
    ]
    assert [o.prompt_logprobs for o in (first, second)] == [[None, entry(6)], None]
    assert [o.outputs[0].cumulative_logprob for o in (first, second)] == [-1 / 8, -3 / 8]


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_several_completions_are_one_result(kind):
    result = started(n=3)
    turns = [("r-1", 1, None), ("r-0", 2, None), ("r-1", 3, "stop"), ("r-2", 4, "length"), ("r-0", 5, "length")]
    outputs = []
    for i, (request_id, token_id, reason) in enumerate(turns):
        timings = reason and RequestTimings(5.0 - i, 6.0, None if i == 2 else 9.0, 10.0 - i)
        cached = 0 if request_id == "r-0" else 2
        deltas = [delta(request_id, token_id, finish_reason=reason, timings=timings, num_cached_tokens=cached)]
        outputs.append(result.add(deltas, kind))
    assert [o is not None and o.finished for o in outputs] == [False] * 4 + [True], "only the last one"
    last = outputs[-1]
    assert last.num_cached_tokens == 0, "the others found what the first one had computed"
    assert last.metrics == RequestTimings(1.0, 6.0, 9.0, 8.0), "the earliest beginning, the latest end"
    shown = [o and [(c.index, c.token_ids, c.finish_reason) for c in o.outputs] for o in outputs]
    if kind is FINAL_ONLY:
        assert shown == [None] * 4 + [[(0, [2, 5], "length"), (1, [1, 3], "stop"), (2, [4], "length")]]
    elif kind is DELTA:
        assert shown == [[(int(r[-1]), [t], reason)] for r, t, reason in turns]
    else:
        assert shown[2:] == [[(1, [1, 3], "stop")], [(2, [4], "length")], [(0, [2, 5], "length")]]


# --- embeddings -----------------------------------------------------------------------------------------------------------


def pooled(request_id, *vector, **fields):
    request = Request(request_id=request_id, prompt_token_ids=(5, 6), sampling=SamplingParams(), pooling="last")
    data = np.array(vector, np.float32) if vector else None
    return PoolingResult(request).add([TokenDelta(request_id, "", [], finish_reason="stop", pooled=data, **fields)])


def test_an_embedding_has_length_one():
    output = pooled("a", 3, 4, num_cached_tokens=1)
    assert (output.request_id, output.prompt_token_ids, output.finished, output.num_cached_tokens) == ("a", [5, 6], True, 1)
    assert output.outputs.data.tolist() == [3, 4]
    scaled = embedding(output)
    assert scaled.outputs.embedding == pytest.approx([0.6, 0.8])
    assert scaled.outputs.hidden_size == 2
    assert embedding(pooled("zero", 0, 0)).outputs.embedding == [0, 0]


@pytest.mark.parametrize(("other", "score"), [((3, 4), 1.0), ((-6, -8), -1.0), ((4, -3), 0.0), ((1, 0), 0.6)])
def test_a_score_is_the_cosine(other, score):
    scored = similarity(embedding(pooled("a", 3, 4)), embedding(pooled("b", *other)))
    assert scored.outputs.score == pytest.approx(score)
    assert -1 <= scored.outputs.score <= 1
    assert (scored.request_id, scored.prompt_token_ids) == ("a_b", [5, 6, 5, 6])


def test_an_embedding_that_was_aborted_is_an_error():
    with pytest.raises(JaxserveError, match="before its embedding was made"):
        pooled("a")
