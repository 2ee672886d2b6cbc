"""The runner on the toy model: order of plans, host buffers, in-place state, and bits that only depend on the plans."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxserve import EngineConfig, SamplingParams
from jaxserve.build import build
from jaxserve.models import toy
from jaxserve.plan import Admission, PageUpdate, RowSampling, SequencePlan, StepPlan

CONFIG = EngineConfig(
    model="toy",
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=128,
    num_pages=24,
    sequence_buckets=(4,),
    compilation_cache_dir="",
)


@pytest.fixture(scope="module")
def engine():
    built = build(CONFIG, show_progress=False)
    yield built
    built.close()


def generate(engine, prompts, **params):
    import queue

    inbox = queue.SimpleQueue()
    requests = [engine.requests.make(p, SamplingParams(seed=i, **params)) for i, p in enumerate(prompts)]
    for request in requests:
        engine.client.submit(request, inbox.put)
    tokens = {r.request_id: [] for r in requests}
    num_open = len(requests)
    while num_open:
        for delta in inbox.get():
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
            num_open -= delta.finish_reason is not None
    return requests, list(tokens.values())


def spy_on(runner, monkeypatch, after_dispatch):
    dispatch = type(runner).dispatch

    def spied(plan):
        handle = dispatch(runner, plan)
        after_dispatch(plan)
        return handle

    monkeypatch.setattr(runner, "dispatch", spied)


def test_plans_run_in_order_each_once(engine):
    with pytest.raises(ValueError, match="plans run in order"):
        engine.runner.dispatch(StepPlan(10**6, (), (), ()))


def test_only_waited_buffers_are_written_again(engine, monkeypatch):
    """Poisons, after each dispatch, every buffer that the two latest steps do not use: tokens stay right."""
    runner = engine.runner
    poisoned = 0

    def poison(plan):
        nonlocal poisoned
        for program in [*runner._backbones.values(), *runner._heads.values()]:
            for buffer, _ in list(program._ring)[2:]:
                buffer.fill(1 << 29)
                poisoned += 1

    spy_on(runner, monkeypatch, poison)
    prompts = ["abc", "hello there, how are you?", "x"]
    requests, tokens = generate(engine, prompts, temperature=0, max_tokens=30)
    for request, got in zip(requests, tokens, strict=True):
        assert got == toy.continuation(request.prompt_token_ids, 30)
    assert poisoned > 60, "three programs, 30 steps"


def test_the_state_stays_where_it_is(engine):
    """Donated pages are updated in place: the pool has the same address after many steps."""
    pages = engine.runner.resident()[1].k_pages[0]
    before = pages.unsafe_buffer_pointer()
    generate(engine, ["some text"], temperature=0, max_tokens=20)
    assert engine.runner.resident()[1].k_pages[0].unsafe_buffer_pointer() == before
    assert pages.is_deleted()


def test_recorded_plans_give_the_same_bits_in_another_process(engine, monkeypatch):
    """Mixed lengths, chunks, seeds, temperatures and log-probabilities; pages and rows as they were left by others."""
    plans, results = [], []
    runner = engine.runner
    spy_on(runner, monkeypatch, plans.append)
    wait = type(runner).wait

    def spied_wait(handle):
        result = wait(runner, handle)
        results.append(result)
        return result

    monkeypatch.setattr(runner, "wait", spied_wait)
    generate(
        engine, ["abc", "a longer prompt than a chunk", "z" * 30], temperature=6.0, top_p=0.95, max_tokens=12, logprobs=2
    )
    offset = plans[0].step
    script = {"plans": [dataclasses.asdict(dataclasses.replace(p, step=p.step - offset)) for p in plans]}
    replay = subprocess.run(
        [sys.executable, __file__], input=json.dumps(script), capture_output=True, text=True, timeout=100, check=True
    )
    assert json.loads(replay.stdout.splitlines()[-1]) == [as_bits(r) for r in results]
    assert len({token for r in results for token, *_ in as_bits(r)}) > 10


def as_bits(result):
    return [
        [token_id, float(s.logprob).hex(), s.rank, list(s.top_ids), [float(x).hex() for x in s.top_logprobs]]
        for token_id, s in result.tokens.values()
    ]


def test_pages_start_as_zeros(engine):
    fresh = build(CONFIG, show_progress=False)
    for leaf in jax.tree.leaves(fresh.runner.resident()[1].v_pages):
        assert np.isfinite(np.asarray(leaf)).all()
    fresh.close()


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def read_plan(fields):
    sequences = tuple(SequencePlan(*map(as_tuples, s)) for s in fields["sequences"])
    admissions = tuple(
        Admission(row, request_id, RowSampling(*map(as_tuples, sampling)), *map(as_tuples, counted))
        for row, request_id, sampling, *counted in fields["admissions"]
    )
    return StepPlan(fields["step"], admissions, tuple(PageUpdate(*u) for u in fields["page_updates"]), sequences)


def replay_from_stdin():
    runner = build(CONFIG, show_progress=False).runner
    results = [as_bits(runner.wait(runner.dispatch(read_plan(fields)))) for fields in json.load(sys.stdin)["plans"]]
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    replay_from_stdin()
