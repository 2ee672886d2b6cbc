"""The Python API on a real (tiny) model: shapes of results, parameters, errors, and that nobody's tokens depend on company."""

import os
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from jaxserve import LLM, ConfigError, InvalidRequestError, SamplingParams
from jaxserve.models import toy

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def generate(llm, prompts, params=GREEDY):
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def random_prompts(count, low, high, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 256, size=generator.integers(low, high)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def toy_llm():
    with LLM("toy", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, num_pages=24, use_tqdm=False) as llm:
        yield llm
        assert llm.stats().num_compilations_since_ready == 0


def test_results_come_in_order_with_all_fields(tiny_llm):
    prompts = ["def", "class Stack:", "x"]
    outputs = tiny_llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    for output in outputs:
        completion = output.outputs[0]
        assert output.finished and len(completion.token_ids) == 5 and completion.index == 0
        assert completion.finish_reason == "length" and completion.stop_reason is None
        assert completion.logprobs is None and completion.cumulative_logprob is None
        assert completion.text == tiny_llm.get_tokenizer().decode(completion.token_ids)
        timings = output.metrics
        assert timings.arrived <= timings.scheduled <= timings.first_token <= timings.finished


def test_every_form_of_prompt(toy_llm):
    ids = [ord(c) for c in "abc"]
    forms = ["abc", {"prompt": "abc"}, {"prompt_token_ids": ids}, ids]
    expected = toy.continuation(ids, 4)
    params = SamplingParams(temperature=0, max_tokens=4)
    assert [c.token_ids for c in generate(toy_llm, forms, params)] == [expected] * 4
    assert generate(toy_llm, "abc", params)[0].token_ids == expected
    assert generate(toy_llm, ids, params)[0].token_ids == expected
    assert generate(toy_llm, [], params) == []


def test_one_set_of_parameters_a_prompt(toy_llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 3, 2)]
    assert [len(c.token_ids) for c in generate(toy_llm, ["a", "b", "c"], params)] == [1, 3, 2]
    with pytest.raises(InvalidRequestError, match="as many as prompts"):
        generate(toy_llm, ["a", "b"], params)


def test_the_toy_is_right_under_pressure(toy_llm):
    """Twice as many tokens as the pool holds, in chunks: a misplaced page would give another number."""
    before = toy_llm.stats().num_preemptions
    prompts = [[32 + (7 * i + j) % 90 for j in range(20 + 9 * i)] for i in range(10)]
    params = SamplingParams(temperature=0, max_tokens=60)
    for prompt, completion in zip(prompts, generate(toy_llm, prompts, params), strict=True):
        assert completion.token_ids == toy.continuation(prompt, 60)
    assert toy_llm.stats().num_preemptions > before


def test_tokens_do_not_depend_on_company(tiny_llm):
    """Alone, or in a batch that is chunked and preempted: the same tokens, and log-probabilities to rounding."""
    prompts = random_prompts(16, 3, 120)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
    alone = [generate(tiny_llm, [prompt], params)[0] for prompt in prompts]
    before = tiny_llm.stats().num_preemptions
    together = generate(tiny_llm, prompts, params)
    assert tiny_llm.stats().num_preemptions > before, "the batch was meant to be short of pages"
    num_near_ties = 0
    for a, b in zip(alone, together, strict=True):
        for position, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            if x != y:
                first, second = sorted((entry.logprob for entry in a.logprobs[position].values()), reverse=True)[:2]
                assert first - second < 1e-4, f"tokens part at position {position} without a tie"
                num_near_ties += 1
                break
            assert a.logprobs[position][x].logprob == pytest.approx(b.logprobs[position][x].logprob, abs=1e-4)
    assert num_near_ties <= 1


def test_a_seed_repeats_and_company_does_not_matter(tiny_llm):
    prompt = random_prompts(1, 10, 11)[0]
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=s, max_tokens=20, ignore_eos=True) for s in (1, 2, 1, 3)]
    first, second, again, third = (c.token_ids for c in generate(tiny_llm, [prompt] * 4, params))
    assert first == again != second != third
    assert generate(tiny_llm, [prompt], params[0])[0].token_ids == first
    unseeded = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    a, b = generate(tiny_llm, [prompt] * 2, unseeded)
    assert a.token_ids != b.token_ids


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again(tiny_llm):
    (prefix,) = random_prompts(1, 80, 81, seed=11)
    tiny_llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    before = tiny_llm.stats().num_cached_tokens
    miss, hit, other = (
        tiny_llm.generate(prompt, params, use_tqdm=False)[0] for prompt in (prefix, prefix, [*prefix[:70], 9, 8, 7])
    )
    assert (miss.num_cached_tokens, hit.num_cached_tokens, other.num_cached_tokens) == (0, 72, 64), "pages of 8 tokens"
    assert tiny_llm.stats().num_cached_tokens - before == 72 + 64
    assert hit.outputs[0].token_ids == miss.outputs[0].token_ids
    logprobs = [
        [entry[token].logprob for entry, token in zip(o.logprobs, o.token_ids, strict=True)]
        for o in (miss.outputs[0], hit.outputs[0])
    ]
    np.testing.assert_allclose(*logprobs, atol=1e-4)
    tiny_llm.reset_prefix_cache()
    again = tiny_llm.generate([*prefix[:70], 9, 8, 7], params, use_tqdm=False)[0]
    assert again.num_cached_tokens == 0
    assert again.outputs[0].token_ids == other.outputs[0].token_ids


def test_log_probabilities(tiny_llm):
    (three,) = generate(tiny_llm, [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3))
    (zero,) = generate(tiny_llm, [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0))
    assert [len(entry) for entry in three.logprobs] == [3] * 6
    assert [list(entry) for entry in zero.logprobs] == [[token] for token in zero.token_ids]
    for token, entry in zip(three.token_ids, three.logprobs, strict=True):
        assert [entry[i].rank for i in entry] == [1, 2, 3]
        assert entry[token].decoded_token == tiny_llm.get_tokenizer().token_text(token)
    chosen = [entry[token].logprob for token, entry in zip(three.token_ids, three.logprobs, strict=True)]
    assert three.cumulative_logprob == pytest.approx(sum(chosen))
    (sampled,) = generate(
        tiny_llm, [[5, 6, 7]], SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, logprobs=2)
    )
    assert {len(entry) for entry in sampled.logprobs} == {2, 3}, "the chosen token stands beside the best two"


def test_stops(toy_llm):
    prompt = "stop test"
    ids = toy.continuation([ord(c) for c in prompt], 60)
    text = "".join(map(chr, ids))
    stop = text[20:23]
    cut = text.index(stop)
    (plain,) = generate(toy_llm, [prompt], SamplingParams(temperature=0, max_tokens=60, stop=[stop, "\t"]))
    assert (plain.text, plain.finish_reason, plain.stop_reason) == (text[:cut], "stop", stop)
    included = SamplingParams(temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=True)
    assert generate(toy_llm, [prompt], included)[0].text == text[: cut + len(stop)]
    token = ids[10]
    first = ids.index(token)
    (by_token,) = generate(toy_llm, [prompt], SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[token]))
    assert by_token.token_ids == ids[: first + 1]
    assert (by_token.text, by_token.finish_reason, by_token.stop_reason) == (text[:first], "stop", token)


def test_min_tokens_forbids_stop_tokens(toy_llm):
    ids = toy.continuation([ord("a")], 4)
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=3, stop_token_ids=[ids[0]])
    (completion,) = generate(toy_llm, ["a"], params)
    assert len(completion.token_ids) >= 3
    assert ids[0] not in completion.token_ids[:3]


def test_a_bad_request_is_named_and_nothing_starts(tiny_llm):
    before = tiny_llm.stats().num_prompt_tokens
    with pytest.raises(InvalidRequestError, match="prompt must be shorter than max_model_len") as caught:
        tiny_llm.generate([[5], [5] * 300], GREEDY, use_tqdm=False)
    assert "prompt 1" in caught.value.__notes__[0]
    for bad in ([[]], [[320]], [[-1]], [[True]]):
        with pytest.raises(InvalidRequestError, match="prompt"):
            tiny_llm.generate(bad, GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="max_logprobs"):
        tiny_llm.generate([[5]], SamplingParams(logprobs=21), use_tqdm=False)
    assert tiny_llm.stats().num_prompt_tokens == before


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        (None, GREEDY, "prompts"),
        (5, GREEDY, "prompts"),
        (b"abc", GREEDY, "prompts"),
        ({"text": "a"}, GREEDY, "prompt"),
        ("a", {"temperature": 0}, "sampling_params"),
        (["a"], ["x"], "sampling_params"),
    ],
)
def test_a_wrong_type_is_named(tiny_llm, prompts, params, field):
    with pytest.raises(InvalidRequestError) as caught:
        tiny_llm.generate(prompts, params, use_tqdm=False)
    assert caught.value.parameter == field


def test_an_end_of_sequence_outside_the_vocabulary_is_no_danger():
    """Some checkpoints name one; with min_tokens it would be a bit of the mask that is not there."""
    config = {"architectures": ["JaxserveToy"], "eos_token_id": [99999, 0]}
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 64, "num_pages": 8}
    with LLM(params={"scale": np.ones(1, np.float32)}, config=config, use_tqdm=False, **limits) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=3)
        assert generate(llm, [[65]], params)[0].token_ids == toy.continuation([65], 4)
        with pytest.raises(InvalidRequestError, match="stop must be empty, as this engine has no tokenizer"):
            generate(llm, [[65]], SamplingParams(stop=["a"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": {"scale": [1.0]}, "config": {"architectures": ["JaxserveToy"]}}, "scale must be an array, got list"),
        (
            {"params": {"scale": np.ones(1)}, "config": {"architectures": ["JaxserveToy"]}, "tokenizer": 5},
            "tokenizer must be",
        ),
        ({"model": "toy", "attention_backend": "foo"}, "attention_backend must be one of auto, .*got 'foo'"),
        ({"model": "toy", "token_buckets": 16}, "token_buckets must be ascending whole numbers"),
        ({"model": "toy", "num_pages": 10**9}, "The KV pool would take .* GiB and the machine has"),
    ],
)
def test_an_engine_that_cannot_be_built_says_why(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LLM(**arguments, use_tqdm=False)


def test_chat_needs_a_template_and_uses_it(tiny_llm):
    pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with pytest.raises(InvalidRequestError, match="chat_template"):
        LLM.chat(_without_template(tiny_llm), messages, params, use_tqdm=False)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (one,) = tiny_llm.chat(messages, params, use_tqdm=False, chat_template=template)
    expected = tiny_llm.get_tokenizer().encode("[user]hi", add_special_tokens=False)
    assert one.prompt_token_ids == expected
    assert len(tiny_llm.chat([messages, messages], params, use_tqdm=False, chat_template=template)) == 2


def _without_template(llm):
    """The same LLM, whose tokenizer has lost its chat template."""

    class Bare:
        def __getattr__(self, name):
            return None if name == "chat_template" else getattr(llm.get_tokenizer(), name)

    class View(LLM):
        def __init__(self):
            self._engine = llm._engine

        def get_tokenizer(self):
            return Bare()

    return View()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_returns_at_once_and_leaves_the_llm_usable(toy_llm):
    def interrupt():
        while toy_llm.stats().num_running == 0:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # until the signal lands inside a call
            generate(toy_llm, ["x" * 100] * 50, SamplingParams(temperature=0, max_tokens=100))
    thread.join()
    expected = toy.continuation([ord("a")], 3)
    assert generate(toy_llm, ["a"], SamplingParams(temperature=0, max_tokens=3))[0].token_ids == expected
    stats = toy_llm.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_arguments_of_other_engines_get_one_warning():
    with pytest.warns(UserWarning, match="enforce_eager.*trust_remote_code") as caught:
        LLM(
            "toy", enforce_eager=True, trust_remote_code=True, max_num_seqs=1, max_num_batched_tokens=16, use_tqdm=False
        ).close()
    assert len(caught) == 1
    with pytest.raises(ConfigError, match="no argument max_model_length.*max_model_len"):
        LLM("toy", max_model_length=3)
    with pytest.raises(ConfigError, match="exclude each other"):
        LLM("toy", params={}, config={})
    with pytest.raises(ConfigError, match="config must be given"):
        LLM(params={})


@pytest.mark.parametrize("form", ["nested dict", "FrozenDict", "nnx.State"])
def test_own_parameters(form, tiny_params, tiny_llm):
    """The researcher's arrays, whichever way Flax holds them, give the tokens of the checkpoint they came from."""
    tree = tiny_params["params"]
    if form == "FrozenDict":
        tree = FrozenDict({"params": tree})
    elif form == "nnx.State":
        tree = nnx.State(jax.tree.map(nnx.Param, tree))
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "page_size": 8, "num_pages": 48}
    with LLM(params=tree, config=tiny_params["config"], use_tqdm=False, **limits) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (own,) = generate(llm, [[9, 8, 7]], params)
        assert own.token_ids == generate(tiny_llm, [[9, 8, 7]], params)[0].token_ids
        assert own.text == ""
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            llm.generate("text", use_tqdm=False)
