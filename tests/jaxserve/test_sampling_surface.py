"""What a caller of `LLM` sees of each sampling field, on a real (tiny) model.

That the numbers are right is tested where they are made; here, that a field gets there and comes back in its form.
"""

import math

import numpy as np
import pytest

from jaxserve import BeamSearchParams, FlatLogprobs, InvalidRequestError, RepetitionDetection, SamplingParams

PROMPT = list(range(40, 60))
VOCAB_SIZE = 320
SUM_TOLERANCE = 1e-4
"""Of sums of float32 probabilities and log-probabilities."""


def sampling(max_tokens=8, **fields):
    return SamplingParams(**({"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens} | fields))


@pytest.fixture
def generate(tiny_llm):
    """Returns the one output of a prompt."""

    def generate(prompt=PROMPT, params=None, **fields):
        (output,) = tiny_llm.generate([prompt], params or sampling(**fields), use_tqdm=False)
        return output

    return generate


def tokens(output):
    return [completion.token_ids for completion in output.outputs]


# --- several completions --------------------------------------------------------------------------------------------------


def test_completion_i_is_that_of_the_seed_plus_i(generate):
    fields = {"temperature": 1.0, "max_tokens": 6}
    together = tokens(generate(n=3, seed=11, **fields))
    assert together == [tokens(generate(seed=11 + i, **fields))[0] for i in range(3)]
    assert len({tuple(t) for t in together}) == 3
    assert len({tuple(t) for t in tokens(generate(n=4, **fields))}) == 4, "without a seed they differ, too"
    assert tokens(generate(n=2)) == tokens(generate()) * 2, "greedy ones are equal"


def test_several_prompts_with_several_completions_come_in_order(tiny_llm):
    outputs = tiny_llm.generate([[5], [6], [7]], [sampling(n=n) for n in (2, 1, 3)], use_tqdm=False)
    assert [[c.index for c in o.outputs] for o in outputs] == [[0, 1], [0], [0, 1, 2]]
    assert [o.prompt_token_ids for o in outputs] == [[5], [6], [7]]
    assert all(c.finished() for o in outputs for c in o.outputs)


# --- log-probabilities ----------------------------------------------------------------------------------------------------


def test_log_probabilities_of_the_prompt(generate):
    three, zero, everything = (generate(prompt_logprobs=k, n=2, max_tokens=1).prompt_logprobs for k in (3, 0, -1))
    assert [places[0] for places in (three, zero, everything)] == [None] * 3
    for token_id, top, chosen, row in zip(PROMPT[1:], three[1:], zero[1:], everything[1:], strict=True):
        assert list(chosen) == [token_id]
        assert chosen[token_id].logprob == pytest.approx(row[token_id].logprob, abs=SUM_TOLERANCE)
        assert set(range(1, 4)) <= {entry.rank for entry in top.values()}
        assert len(top) in (3, 4)
        assert len(row) == VOCAB_SIZE
        assert sum(math.exp(entry.logprob) for entry in row.values()) == pytest.approx(1, abs=SUM_TOLERANCE)
        assert top[token_id].rank == row[token_id].rank


def test_columns_hold_what_dicts_hold(generate):
    fields = {"logprobs": 2, "prompt_logprobs": 1}
    plain, flat = (generate(flat_logprobs=is_flat, **fields) for is_flat in (False, True))
    for one, other in ((plain.prompt_logprobs, flat.prompt_logprobs), (plain.outputs[0].logprobs, flat.outputs[0].logprobs)):
        assert isinstance(other, FlatLogprobs)
        assert [list(entries or ()) for entries in other] == [list(entries or ()) for entries in one]
    assert flat.outputs[0].cumulative_logprob == pytest.approx(plain.outputs[0].cumulative_logprob, abs=SUM_TOLERANCE)


def test_picked_tokens_take_the_place_of_the_most_likely_ones(generate):
    (completion,) = generate(logprob_token_ids=[9, 300], max_tokens=3).outputs
    (everything,) = generate(logprobs=-1, max_tokens=3).outputs
    for token_id, entries, row in zip(completion.token_ids, completion.logprobs, everything.logprobs, strict=True):
        assert set(entries) == {token_id, 9, 300}
        for i, entry in entries.items():
            assert (entry.logprob, entry.rank) == (pytest.approx(row[i].logprob, abs=SUM_TOLERANCE), row[i].rank)


def test_processed_ones_are_those_that_were_sampled_from(generate):
    fields = {"allowed_token_ids": [5, 6], "logprobs": -1, "temperature": 1.0, "seed": 3}
    (raw,) = generate(**fields).outputs
    (processed,) = generate(**fields, logprobs_mode="processed").outputs
    assert set(raw.token_ids) <= {5, 6}
    assert processed.token_ids == raw.token_ids
    for before, after in zip(raw.logprobs, processed.logprobs, strict=True):
        assert np.isfinite(before.logprobs_V).all()
        assert np.flatnonzero(np.isfinite(after.logprobs_V)).tolist() == [5, 6]
        assert np.exp(after.logprobs_V[5:7]).sum() == pytest.approx(1, abs=SUM_TOLERANCE)


# --- what is sampled ------------------------------------------------------------------------------------------------------


def test_a_bias_decides(generate):
    plain = tokens(generate())[0]
    assert tokens(generate(logit_bias={7: 100}))[0] == [7] * 8
    without_first = tokens(generate(logit_bias={str(plain[0]): -100}))[0]
    assert plain[0] not in without_first


def test_penalties_count(generate):
    plain, present, frequent, repeated = (
        tokens(generate(max_tokens=24, **fields))[0]
        for fields in ({}, {"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1e6})
    )
    assert len(set(frequent)) > len(set(plain))
    assert len(set(repeated)) == 24, "what was said once is all but impossible"
    assert not set(repeated) & set(PROMPT), "the prompt's tokens are"
    assert len(set(present)) >= len(set(plain))
    assert tokens(generate(logit_bias={7: 100}, repetition_penalty=1e6))[0].count(7) == 1, "after the bias, as in vLLM"


def test_bad_words_never_stand_in_the_text(generate, tiny_llm):
    text = generate(max_tokens=16).outputs[0].text
    word = text[4:6].strip() or text[6:8].strip()
    assert word
    assert word not in generate(max_tokens=16, bad_words=[word]).outputs[0].text


def test_a_repetition_ends_a_completion(generate):
    detection = RepetitionDetection(max_pattern_size=2, min_count=4)
    (completion,) = generate(max_tokens=50, logit_bias={7: 100}, repetition_detection=detection).outputs
    assert (completion.token_ids, completion.finish_reason) == ([7] * 4, "repetition")


def test_a_prompt_is_truncated(generate, tiny_llm):
    output = generate(truncate_prompt_tokens=3)
    assert output.prompt_token_ids == PROMPT[-3:]
    kwargs = {"truncate_prompt_tokens": 2, "add_special_tokens": False}
    (other,) = tiny_llm.generate("hello", sampling(), use_tqdm=False, tokenization_kwargs=kwargs)
    assert other.prompt_token_ids == tiny_llm.get_tokenizer().encode("hello", add_special_tokens=False)[-2:]


# --- other methods --------------------------------------------------------------------------------------------------------


def test_what_is_enqueued_is_waited_for_in_order(tiny_llm):
    first = tiny_llm.enqueue([[5], [6]], sampling(3), priority=[1, 0])
    second = tiny_llm.enqueue([[7]], sampling(2, n=2))
    outputs = tiny_llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == first + second
    assert [[len(t) for t in tokens(o)] for o in outputs] == [[3], [3], [2, 2]]
    assert tiny_llm.wait_for_completion(use_tqdm=False) == []
    with pytest.raises(InvalidRequestError, match=r"^priority must be one, or as many as prompts \(2\)"):
        tiny_llm.enqueue([[5], [6]], sampling(3), priority=[1])


def test_beams_of_the_engine(tiny_llm, generate):
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    one, three = tiny_llm.beam_search([PROMPT[:5], PROMPT], params)
    scores = [sequence.cum_logprob / 5 for sequence in three.sequences]
    assert scores == sorted(scores, reverse=True)
    greedy = generate(max_tokens=5, logprobs=0).outputs[0]
    assert three.sequences[0].cum_logprob >= greedy.cumulative_logprob - SUM_TOLERANCE
    for sequence in three.sequences:
        scored = generate(sequence.tokens, max_tokens=1, prompt_logprobs=0).prompt_logprobs[len(PROMPT) :]
        chosen = [entries[i].logprob for i, entries in zip(sequence.tokens[len(PROMPT) :], scored, strict=True)]
        assert sequence.cum_logprob == pytest.approx(sum(chosen), abs=SUM_TOLERANCE)
        assert sequence.text == tiny_llm.get_tokenizer().decode(sequence.tokens)
    assert len(one.sequences) == 3
    (width_one,) = tiny_llm.beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True))
    assert width_one.sequences[0].tokens == PROMPT + greedy.token_ids


def test_embeddings_and_scores(tiny_llm):
    last, mean = (tiny_llm.encode([PROMPT, PROMPT[:3]], pooling, use_tqdm=False) for pooling in ("last", "mean"))
    assert {output.outputs.data.shape for output in last + mean} == {last[0].outputs.data.shape}
    assert not np.allclose(last[0].outputs.data, mean[0].outputs.data)
    (embedding,) = tiny_llm.embed([PROMPT], use_tqdm=False)
    assert np.linalg.norm(embedding.outputs.embedding) == pytest.approx(1)
    scale = np.linalg.norm(last[0].outputs.data)
    np.testing.assert_allclose(
        np.array(embedding.outputs.embedding) * scale, last[0].outputs.data, atol=SUM_TOLERANCE * scale
    )

    def scores(one, other):
        return [output.outputs.score for output in tiny_llm.score(one, other, use_tqdm=False)]

    to_many = scores([PROMPT], [PROMPT, [5, 6]])
    assert to_many[0] == pytest.approx(1, abs=SUM_TOLERANCE)
    assert to_many[1] < 0.999
    assert scores([PROMPT, [5, 6]], [PROMPT, [5, 6]]) == pytest.approx([1, 1], abs=SUM_TOLERANCE)
    assert len(scores("a", "b")) == 1
    for one, other in ((["a", "b"], "c"), ([], ["a"]), (["a"], [])):
        with pytest.raises(InvalidRequestError, match="^text_1 must be one text, or as many as text_2"):
            scores(one, other)


def test_without_parameters_the_models_defaults_are_used(tiny_llm):
    assert tiny_llm.get_default_sampling_params() == SamplingParams()
    (output,) = tiny_llm.generate(["a"], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16
