"""Beam search against transformers' own, over the same log-probabilities, and over the engine's."""

import warnings

import numpy as np
import pytest

from jaxserve import InvalidRequestError
from jaxserve.beam_search import BeamSearchParams, beam_search
from jaxserve.outputs import AllLogprobs

VOCAB_SIZE = 24
SUM_TOLERANCE = 1e-4
"""Of a sum of up to 8 float32 log-probabilities of the same float32 model, computed in batches of different sizes."""


@pytest.fixture(scope="module")
def model():
    """A random Llama, so small that a search takes milliseconds, and sharp enough for beams to differ."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def next_tokens(model):
    import torch

    def next_tokens(contexts):
        assert len({len(c) for c in contexts}) == 1
        with torch.inference_mode():
            logits = model(torch.tensor(contexts)).logits[:, -1]
        return [AllLogprobs(row.numpy(), str) for row in torch.log_softmax(logits, -1)]

    return next_tokens


def by_transformers(model, prompt, params, eos_token_ids):
    """Sequences without the padding behind their ends, and their scores; best first."""
    import torch

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping="never",
            do_sample=False,
            eos_token_id=sorted(eos_token_ids) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequences = []
    for row in found.sequences.tolist():
        ends = [i for i, token in enumerate(row) if i >= len(prompt) and token in eos_token_ids]
        sequences.append(row[: ends[0] + 1] if ends else row)
    return sequences, found.sequences_scores.tolist()


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("eos_token_ids", [(), (3,), (3, 7, 11, 15)])
@pytest.mark.parametrize("beam_width", [2, 4])
def test_the_beams_are_those_of_transformers(model, beam_width, eos_token_ids, length_penalty):
    """With one end, with several, with none; one beam is greedy and no beam search in transformers."""
    params = BeamSearchParams(beam_width=beam_width, max_tokens=8, length_penalty=length_penalty)
    generator = np.random.default_rng(beam_width)
    prompts = [tuple(generator.integers(1, VOCAB_SIZE, size=4).tolist()) for _ in range(6)]
    reasons = set()
    found = beam_search(prompts, params, next_tokens(model), eos_token_ids=frozenset(eos_token_ids), max_model_len=100)
    for prompt, output in zip(prompts, found, strict=True):
        sequences, scores = by_transformers(model, prompt, params, eos_token_ids)
        assert [s.tokens for s in output.sequences] == sequences
        ours = [s.cum_logprob / len(s.logprobs) ** length_penalty for s in output.sequences]
        np.testing.assert_allclose(ours, scores, atol=SUM_TOLERANCE)
        reasons |= {s.finish_reason for s in output.sequences}
    assert reasons >= ({"stop"} if eos_token_ids else {"length"})


def test_one_beam_is_greedy_and_ends_are_ignored_when_asked(model):
    likely = next_tokens(model)
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    (output,) = beam_search([(1, 2)], params, likely, eos_token_ids=frozenset(range(VOCAB_SIZE)), max_model_len=100)
    context = (1, 2)
    for _ in range(6):
        context += (next(iter(likely([context])[0])),)
    assert output.sequences[0].tokens == list(context)
    assert output.sequences[0].finish_reason == "length"
    (cut,) = beam_search([(1, 2)], params, likely, eos_token_ids=frozenset(), max_model_len=5)
    assert cut.sequences[0].tokens == list(context[:5]), "no longer than the model"


def test_a_search_ends_when_no_beam_can_win_any_more():
    """Token 1 ends; all but impossible after the first step are the others."""
    calls = []

    def likely(contexts):
        calls.append(contexts)
        sure = [-9.0, -0.5, -0.6, -9.0] if len(contexts[0]) == 1 else [-90.0, -0.1, -80.0, -70.0]
        return [AllLogprobs(np.array(sure, np.float32), str) for _ in contexts]

    params = BeamSearchParams(beam_width=2, max_tokens=50)
    (output,) = beam_search([(0,)], params, likely, eos_token_ids=frozenset({1}), max_model_len=100)
    assert [s.tokens for s in output.sequences] == [[0, 2, 1], [0, 1]]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("beam_width", {"beam_width": 0}),
        ("beam_width", {"beam_width": 1.0}),
        ("max_tokens", {"max_tokens": 0}),
        ("ignore_eos", {"ignore_eos": 1}),
        ("length_penalty", {"length_penalty": float("nan")}),
        ("length_penalty", {"length_penalty": "1"}),
    ],
)
def test_a_bad_value_names_its_field(field, values):
    with pytest.raises(InvalidRequestError) as caught:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 3} | values))
    assert caught.value.parameter == field


def test_the_width_is_limited_by_max_logprobs():
    params = BeamSearchParams(beam_width=10, max_tokens=3)
    assert params.step_sampling(1, 20).logprobs == 20
    with pytest.raises(InvalidRequestError, match="^beam_width must be at most 9, as max_logprobs is 19"):
        params.step_sampling(1, 19)
    assert BeamSearchParams(beam_width=10, max_tokens=3, ignore_eos=True).step_sampling(1, 10).logprobs == 10
