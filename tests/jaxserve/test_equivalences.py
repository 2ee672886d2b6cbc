"""All sampling features at once: the engine, batched, chunked, preempted, from the prefix cache, alone and replayed, against a
naive recomputation in float64."""

import dataclasses
import queue

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.models.weights import flatten
from jaxserve.request import ALL_LOGPROBS
from jaxserve.testing import oracle
from jaxserve.testing.near_ties import FLOAT32_ERROR, NEAR_TIE
from jaxserve.testing.sampling_oracle import adjusted, draw, truncated

VOCAB = 320

FEATURES = {
    "greedy": {"temperature": 0},
    "penalties": {"temperature": 0, "repetition_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": -0.9},
    "bias": {"temperature": 0, "logit_bias": {i: (-1) ** i * 4.0 for i in range(0, VOCAB, 9)}},
    "whitelist": {"temperature": 0, "allowed_token_ids": list(range(1, VOCAB, 5))},
    "constraint": {"temperature": 0},
    "min_tokens": {"temperature": 0, "stop_token_ids": list(range(0, VOCAB, 2)), "min_tokens": 5, "ignore_eos": True},
    "seeded": {"seed": 3, "temperature": 0.9},
    "truncated": {"seed": 4, "temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "everything": {
        "seed": 5,
        "temperature": 1.2,
        "top_p": 0.9,
        "repetition_penalty": 0.8,
        "frequency_penalty": -0.3,
        "presence_penalty": 0.4,
        "logit_bias": {7: 3.0, 8: -3.0},
        "allowed_token_ids": list(range(3, VOCAB)),
    },
}

REPORTS = (
    {"logprobs": 2},
    {"logprobs": 3, "logprobs_mode": "processed"},
    {"logprobs": ALL_LOGPROBS},
    {"logprobs": ALL_LOGPROBS, "logprobs_mode": "processed"},
    {"logprob_token_ids": [5, 9, 300]},
    {"logprobs": 0, "prompt_logprobs": 2},
    {"logprobs": 1, "prompt_logprobs": ALL_LOGPROBS},
)


class Neighbours:
    """A constraint that only a program which knows the token before can obey: the next one lies within 40 of it."""

    def start(self, prompt_token_ids, output_token_ids=()):
        return _Neighbours([*prompt_token_ids, *output_token_ids][-1])


class _Neighbours:
    def __init__(self, last):
        self._last = last

    def allowed(self):
        return [i for i in range(VOCAB) if abs(i - self._last) <= 40]

    def restrict(self, words_W):
        mine = np.zeros_like(words_W)
        for token in self.allowed():
            mine[token // 32] |= np.uint32(1 << token % 32)
        words_W &= mine

    def accept(self, token_id):
        assert token_id in self.allowed()
        self._last = token_id


def make_requests(llm, seed):
    """Two of each feature, each with some report; prompts of up to three chunks, some with a common beginning."""
    random = np.random.default_rng(seed)
    common = random.integers(3, 256, 40).tolist()
    requests = []
    for index, (feature, fields) in enumerate([*FEATURES.items(), *FEATURES.items()]):
        prompt = random.integers(3, 256, int(random.integers(2, 150))).tolist()
        prompt = common + prompt[:60] if index % 3 == 0 else prompt
        params = SamplingParams(
            **{"max_tokens": int(random.integers(10, 40)), "ignore_eos": True} | fields | REPORTS[index % 7]
        )
        request = llm._engine.requests.make(prompt, params, request_id=f"{feature}-{index}")
        constraint = Neighbours() if feature == "constraint" else None
        requests.append(dataclasses.replace(request, constraint=constraint))
    return requests


def run(llm, requests):
    """Returns each request's deltas."""
    inbox = queue.SimpleQueue()
    deltas = {r.request_id: [] for r in requests}
    for request in requests:
        llm._engine.client.submit(request, inbox.put)
    num_open = len(requests)
    while num_open:
        for delta in inbox.get(timeout=60):
            assert delta.error is None, delta.error
            deltas[delta.request_id].append(delta)
            num_open -= delta.finish_reason is not None
    return deltas


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.token_ids]


def entries_of(deltas):
    return [entry for delta in deltas for entry in delta.logprobs or ()]


@pytest.fixture(scope="module")
def leaves(tiny_params):
    return flatten(tiny_params["params"])


@pytest.fixture(scope="module")
def requests(tiny_llm):
    return make_requests(tiny_llm, 0)


@pytest.fixture(scope="module")
def batched(tiny_llm, requests):
    """All at once, from an empty cache."""
    tiny_llm.reset_prefix_cache()
    before = tiny_llm.stats()
    deltas = run(tiny_llm, requests)
    after = tiny_llm.stats()
    assert after.num_preemptions > before.num_preemptions, "the pool must be too small for all"
    assert after.num_cached_tokens > before.num_cached_tokens, "prompts must share pages"
    return deltas


def check_sampled(request, tokens, entries, logits_SV):
    """Each token is the one that its own context, random number and parameters pick, and its scores are the reference's."""
    params, prompt = request.sampling, request.prompt_token_ids
    constraint = None if request.constraint is None else request.constraint.start(prompt)
    for place, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        forbidden = set(request.stop_token_ids) if place < params.min_tokens else set()
        if constraint is not None:
            forbidden |= set(range(VOCAB)) - set(constraint.allowed())
            constraint.accept(token)
        x = truncated(adjusted(logits_SV[place], params, prompt, tokens[:place], forbidden), params)
        if params.is_greedy:
            assert x.max() - x[token] < NEAR_TIE
        else:
            drawn, is_close = draw(x, request.key, len(prompt) + place)
            assert is_close or token == drawn, (request.request_id, place)
        reported = oracle.log_softmax(x if params.logprobs_mode == "processed" else logits_SV[place])
        check_entry(entry, reported, params)


def check_entry(entry, reported, params):
    """Log-probabilities are the reference's; those asked for are there."""
    error = 4 * FLOAT32_ERROR / max(params.temperature, 0.5)
    for token_id, logprob in list(entry.items())[:8]:
        expected = reported[token_id]
        assert logprob.logprob == expected or abs(logprob.logprob - expected) < error
    if params.logprob_token_ids:
        assert set(params.logprob_token_ids) <= set(entry)
    elif params.logprobs == ALL_LOGPROBS:
        assert len(entry) == VOCAB
        np.testing.assert_allclose(entry.logprobs_V, reported, atol=error)


def test_equals_a_naive_recomputation(requests, batched, leaves, tiny_params):
    for request in requests:
        tokens, deltas = tokens_of(batched[request.request_id]), batched[request.request_id]
        prompt = request.prompt_token_ids
        logits = oracle.logits(leaves, tiny_params["config"], [*prompt, *tokens], len(prompt))
        check_sampled(request, tokens, entries_of(deltas), logits[len(prompt) - 1 : -1])
        if request.sampling.min_tokens:
            assert len(tokens) >= request.sampling.min_tokens
            assert not set(tokens[: request.sampling.min_tokens]) & request.stop_token_ids


def test_prompts_are_scored(requests, batched, leaves, tiny_params):
    """Once, in the first delta: nothing for the first token, then each token's log-probability after those before it."""
    num_scored = 0
    for request in requests:
        first, *rest = batched[request.request_id]
        assert all(delta.prompt_logprobs is None for delta in rest)
        k = request.sampling.prompt_logprobs
        if k is None:
            assert first.prompt_logprobs is None
            continue
        prompt = request.prompt_token_ids
        logprobs = oracle.log_softmax(oracle.logits(leaves, tiny_params["config"], prompt))
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == len(prompt)
        for token, entry, expected in zip(prompt[1:], first.prompt_logprobs[1:], logprobs, strict=False):
            assert abs(entry[token].logprob - expected[token]) < FLOAT32_ERROR * 4
            assert len(entry) == VOCAB if k == ALL_LOGPROBS else k <= len(entry) <= k + 1
            if k == ALL_LOGPROBS:
                np.testing.assert_allclose(entry.logprobs_V, expected, atol=FLOAT32_ERROR * 4)
            num_scored += 1
    assert num_scored > 100


def test_only_those_who_ask_keep_the_whole_vocabulary(tiny_llm, requests, monkeypatch):
    """A call's are as large as its logits: of a long prompt with a few log-probabilities none may stay on the device."""
    runner = tiny_llm._engine.runner
    wait, kept = runner.wait, []

    def spied(handle):
        wants_all = [ALL_LOGPROBS in {s.num_prompt_logprobs for s in handle.scored_owners}] * len(handle.scored)
        kept.extend(zip(wants_all, [scores.all_SV is not None for scores in handle.scored], strict=True))
        return wait(handle)

    monkeypatch.setattr(runner, "wait", spied)
    for request in requests:  # one at a time, so that a call has one owner
        run(tiny_llm, [request])
    assert set(kept) == {(True, True), (False, False)}


def same(got, expected):
    assert {name: tokens_of(deltas) for name, deltas in got.items()} == {
        name: tokens_of(deltas) for name, deltas in expected.items()
    }
    for name, deltas in got.items():
        for entry, other in zip(entries_of(deltas), entries_of(expected[name]), strict=True):
            chosen, also = next(iter(entry)), next(iter(other))
            assert chosen == also
            assert abs(entry[chosen].logprob - other[chosen].logprob) < FLOAT32_ERROR


def test_alone_equals_batched(tiny_llm, requests, batched):
    tiny_llm.reset_prefix_cache()
    same({name: deltas for request in requests for name, deltas in run(tiny_llm, [request]).items()}, batched)


def test_any_order_of_arrival_and_a_full_cache_equal_batched(tiny_llm, requests, batched):
    order = np.random.default_rng(1).permutation(len(requests))
    same(run(tiny_llm, [requests[i] for i in order]), batched)


def test_replayed_plans_give_the_same_bits(tiny_llm, requests, monkeypatch):
    """What the scheduler decided and which tokens the constraints allowed is all that a step needs."""
    runner = tiny_llm._engine.runner
    steps, results = [], []
    dispatch, sample, wait = runner.dispatch, runner.sample, runner.wait

    def record_dispatch(plan):
        steps.append((plan, {}))
        return dispatch(plan)

    def record_sample(handle, allowed):
        steps[-1][1].update(allowed)
        sample(handle, allowed)

    def record_wait(handle):
        results.append(wait(handle))
        return results[-1]

    tiny_llm.reset_prefix_cache()
    with monkeypatch.context() as patched:
        patched.setattr(runner, "dispatch", record_dispatch)
        patched.setattr(runner, "sample", record_sample)
        patched.setattr(runner, "wait", record_wait)
        run(tiny_llm, requests)
    assert any(allowed for _, allowed in steps)
    monkeypatch.setattr(runner, "_next_step", steps[0][0].step)
    for (plan, allowed), expected in zip(steps, results, strict=True):
        handle = runner.dispatch(plan)
        if not handle.is_sampled:
            runner.sample(handle, allowed)
        assert bits(runner.wait(handle)) == bits(expected)


def bits(result):
    def of(scores):
        if scores is None:
            return None
        every = None if scores.all_logprobs is None else scores.all_logprobs.tobytes()
        return (*map(float.hex, [scores.logprob, *scores.top_logprobs]), scores.top_ids, scores.rank, every)

    tokens = {name: (token.token_id, of(token.scores)) for name, token in result.tokens.items()}
    return tokens, {name: list(map(of, scores.tokens)) for name, scores in result.prompt_scores.items()}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_normed_hidden_states(tiny_llm, leaves, tiny_params, pooling):
    """Of prompts of up to four chunks, some twice, so that the cache has them."""
    random = np.random.default_rng(2)
    prompts = [random.integers(3, 256, length).tolist() for length in (1, 7, 64, 65, 200)]
    prompts += prompts[3:]
    params = SamplingParams(max_tokens=1)
    requests = [dataclasses.replace(tiny_llm._engine.requests.make(prompt, params), pooling=pooling) for prompt in prompts]
    deltas = run(tiny_llm, requests)
    for request in requests:
        (delta,) = deltas[request.request_id]
        states = oracle.hidden(leaves, tiny_params["config"], request.prompt_token_ids)
        expected = states[-1] if pooling == "last" else states.mean(axis=0)
        assert delta.finish_reason == "stop"
        assert delta.token_ids == []
        np.testing.assert_allclose(delta.pooled, expected, atol=10 * FLOAT32_ERROR)
