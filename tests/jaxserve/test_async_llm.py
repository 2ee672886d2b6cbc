"""AsyncLLM on the toy model: many streams on one loop, each with the tokens that it would have alone."""

import asyncio
import collections
import contextlib
import dataclasses
import gc
import threading
import weakref

import pytest

from jaxserve import (
    AsyncLLM,
    ConfigError,
    DrainingError,
    EngineConfig,
    InvalidRequestError,
    RequestOutputKind,
    SamplingParams,
)
from jaxserve.async_llm import EngineArguments
from jaxserve.build import build
from jaxserve.models import toy
from jaxserve.models.weights import flatten
from jaxserve.testing.tiny_checkpoint import TinyLlama, caller_params

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TIMEOUT_S = 60
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256, "num_pages": 64, "sequence_buckets": (8,)}


@pytest.fixture(scope="module")
def built():
    """Compiled once; each test's AsyncLLM finds it built already, as the engine outlives an event loop."""
    built = build(EngineConfig("toy", **LIMITS), show_progress=False)
    yield built
    stats = built.client.stats()
    assert stats.num_compilations_since_ready == 0
    assert (stats.num_running, stats.num_free_pages) == (0, stats.num_pages)
    built.close()


class Lent:
    """An engine's client that nobody can close: an AsyncLLM does when it is dropped."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        return getattr(self._client, name)

    def close(self):
        pass


@pytest.fixture
def run(built, monkeypatch):
    """Runs `async def body(llm)`; afterwards nothing may be left in the engine."""

    def run(body):
        lent = dataclasses.replace(built, client=Lent(built.client))
        monkeypatch.setattr(EngineArguments, "build", lambda self, show_progress: lent)

        async def main():
            async with asyncio.timeout(TIMEOUT_S):
                llm = AsyncLLM("toy")
                result = await body(llm)
                await idle(llm)
                assert not llm._holders
                return result

        return asyncio.run(main())

    return run


async def idle(llm):
    while llm.stats().num_running or llm.stats().num_waiting:
        await asyncio.sleep(0.005)


def greedy(max_tokens, kind=CUMULATIVE, **fields):
    return SamplingParams(temperature=0, max_tokens=max_tokens, output_kind=kind, **fields)


def prompt_of(i):
    return [33 + (7 * i + j) % 90 for j in range(3 + i % 40)]


async def outputs_of(llm, *args, **kwargs):
    return [output async for output in llm.generate(*args, **kwargs)]


def test_a_hundred_streams_each_get_their_tokens(run):
    """Of every kind, and with n = 3 among them; only the last output of each is finished."""

    async def one(llm, i):
        kind, n = list(RequestOutputKind)[i % 3], 3 if i % 10 == 0 else 1
        outputs = await outputs_of(llm, prompt_of(i), greedy(4 + i % 20, kind, n=n), f"r{i}")
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert {o.request_id for o in outputs} == {f"r{i}"}
        tokens = collections.defaultdict(list)
        for completion in (c for o in outputs for c in o.outputs):
            if kind is DELTA:
                tokens[completion.index] += completion.token_ids
            else:
                tokens[completion.index] = completion.token_ids
        expected = toy.continuation(prompt_of(i), 4 + i % 20)
        assert dict(tokens) == dict.fromkeys(range(n), expected)
        if kind is FINAL_ONLY:
            assert len(outputs) == 1

    async def body(llm):
        await asyncio.gather(*(one(llm, i) for i in range(100)))

    run(body)


def test_cancelling_some_leaves_the_others_alone_and_frees_their_ids(run):
    """Ten of forty, each when its first tokens are there, half of them with two completions."""

    async def cancelled(llm, i):
        async for output in llm.generate(prompt_of(i), greedy(200, n=1 + i % 2), f"r{i}"):
            assert not output.finished
            asyncio.current_task().cancel()

    async def body(llm):
        others = [outputs_of(llm, prompt_of(i), greedy(20), f"r{i}") for i in range(10, 40)]
        results = await asyncio.gather(*(cancelled(llm, i) for i in range(10)), *others, return_exceptions=True)
        assert {type(r) for r in results[:10]} == {asyncio.CancelledError}
        for i, outputs in enumerate(results[10:], start=10):
            assert outputs[-1].outputs[0].token_ids == toy.continuation(prompt_of(i), 20)
        await idle(llm)
        again = await outputs_of(llm, "again", greedy(3), "r0")
        assert again[-1].outputs[0].token_ids == toy.continuation(list(b"again"), 3)

    run(body)


def test_leaving_a_stream_aborts_all_of_its_completions(run):
    async def body(llm):
        async with contextlib.aclosing(llm.generate("abc", greedy(200, n=4), "x")) as stream:
            first = await anext(stream)
            assert not first.finished
            with pytest.raises(InvalidRequestError, match=r"^request_id must be unused by any running request, got 'x'"):
                await outputs_of(llm, "abc", greedy(1), "x")
        await idle(llm)

    run(body)


@pytest.mark.parametrize("num_turns", [0, 1, 2, 200])
def test_an_abort_ends_a_stream_with_a_last_output(run, num_turns):
    """From the first moment on: while the prompt is tokenized, when it is just submitted, when it runs."""

    async def body(llm):
        async def abort():
            while not llm._holders:
                await asyncio.sleep(0)
            for _ in range(num_turns):
                await asyncio.sleep(0)
            await llm.abort(["one", "unknown"])

        outputs, _ = await asyncio.gather(outputs_of(llm, "abc", greedy(250, FINAL_ONLY, n=2), "one"), abort())
        (output,) = outputs
        assert output.finished
        assert [c.finish_reason for c in output.outputs] == ["abort"] * 2

    run(body)


def test_deltas_add_up_to_the_text(run):
    async def body(llm):
        outputs = await outputs_of(llm, "hello", greedy(30, DELTA, logprobs=1, prompt_logprobs=0))
        (final,) = await outputs_of(llm, "hello", greedy(30, FINAL_ONLY, logprobs=1, prompt_logprobs=0, flat_logprobs=True))
        parts = [o.outputs[0] for o in outputs]
        (whole,) = final.outputs
        assert "".join(p.text for p in parts) == whole.text
        assert [entry for p in parts for entry in p.logprobs] == list(whole.logprobs)
        assert parts[-1].cumulative_logprob == pytest.approx(whole.cumulative_logprob)
        assert [o.prompt_logprobs is not None for o in outputs] == [True] + [False] * (len(outputs) - 1)
        assert outputs[0].prompt_logprobs == list(final.prompt_logprobs)
        assert len(final.prompt_logprobs) == 5

    run(body)


def test_what_else_it_knows(run, built):
    async def body(llm):
        with pytest.raises(ConfigError, match="not built yet"):
            llm.stats()
        assert await llm.get_tokenizer() is built.tokenizer
        assert await llm.get_default_sampling_params() == SamplingParams()
        assert llm.config is built.config
        await llm.reset_prefix_cache()
        output = await llm.encode({"prompt": "abc"}, "mean", tokenization_kwargs={"truncate_prompt_tokens": 2})
        assert (output.prompt_token_ids, output.outputs.data.ndim) == (list(b"bc"), 1)
        assert llm.stats().num_steps > 0
        for bad, field in (
            ({"prompt": 5}, "prompt"),
            ({"prompt": "a", "sampling_params": {}}, "sampling_params"),
            ({"prompt": "a", "priority": "high"}, "priority"),
            ({"prompt": "a", "tokenization_kwargs": {"padding": True}}, "tokenization_kwargs.padding"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await outputs_of(llm, **bad)
            assert caught.value.parameter == field

    run(body)


def test_weights_that_the_caller_lets_go_are_freed():
    """The engine has them in its own layout: on a GPU the others would take as much again."""
    own = caller_params(TinyLlama(num_layers=1, vocab_size=64))
    leaf = weakref.ref(next(iter(flatten(own["params"]).values())))

    async def main():
        llm = AsyncLLM(**own, max_num_seqs=1, max_num_batched_tokens=16, num_pages=8, max_model_len=64, page_size=8)
        own.clear()
        async with llm:
            gc.collect()
            assert leaf() is None
            assert llm.startup_s["total"] > 0

    asyncio.run(main())


def test_it_is_built_off_the_loop_once_and_closed(monkeypatch):
    """While it builds the loop goes on, and one that waits may give up without the others."""
    may_build = threading.Event()
    original, engines = EngineArguments.build, []

    def slow(self, *, show_progress):
        assert may_build.wait(TIMEOUT_S)
        engines.append(original(self, show_progress=show_progress))
        return engines[-1]

    monkeypatch.setattr(EngineArguments, "build", slow)

    async def main():
        llm = AsyncLLM.from_config(
            EngineConfig("toy", max_num_seqs=1, max_num_batched_tokens=16, num_pages=8, max_model_len=64)
        )
        waiting = [asyncio.ensure_future(outputs_of(llm, "a", greedy(2))) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        may_build.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        for outputs in await asyncio.gather(*waiting[1:]):
            assert outputs[-1].outputs[0].token_ids == toy.continuation([97], 2)
        await llm.close()
        assert len(engines) == 1
        assert not engines[0].client.stats().is_alive
        with pytest.raises(DrainingError):
            await outputs_of(llm, "a")
        await AsyncLLM("toy").close()  # never built

    asyncio.run(main())


def test_arguments_are_checked_at_once_and_the_model_when_it_is_built(tmp_path):
    with pytest.raises(ConfigError, match="no argument max_model_length"):
        AsyncLLM("toy", max_model_length=3)

    async def main():
        for _ in range(2):
            with pytest.raises(ConfigError, match="attention_backend must be one of"):
                async with AsyncLLM("toy", attention_backend="foo"):
                    pass

    asyncio.run(main())
