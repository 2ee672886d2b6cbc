"""Plans are plain data: they can be recorded, compared, and replayed elsewhere."""

import dataclasses
import json

import pytest

from jaxserve.plan import KVSpec, StepPlan, kv_groups
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_runner import FakeRunner, toy_config, toy_request

FULL, OTHER = KVSpec("full", 8, 64), KVSpec("full", 8, 128)
WINDOW = KVSpec("window", 8, 64, window=128)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [((), ()), ((FULL,) * 3, (FULL,)), ((WINDOW, FULL, WINDOW, FULL), (WINDOW, FULL)), ((FULL, OTHER), (FULL, OTHER))],
)
def test_layers_with_equal_specs_are_a_group(layers, groups):
    assert kv_groups(layers) == groups
    assert [groups.index(spec) for spec in layers] == [kv_groups(layers).index(spec) for spec in layers]


def record():
    """Returns the plans and results of some traffic."""
    config = toy_config(num_pages=8, max_model_len=32)
    scheduler, runner = Scheduler(config), FakeRunner(config)
    for name in "abc":
        scheduler.add(toy_request(name, range(40, 48), max_tokens=15, logprobs=1, min_tokens=3, stop_token_ids=[50]))
    in_flight, results = None, []
    while (plan := scheduler.plan()) is not None or in_flight is not None:
        previous, in_flight = in_flight, None if plan is None else runner.dispatch(plan)
        if previous is not None:
            results.append(runner.wait(previous))
            scheduler.commit(results[-1])
    assert scheduler.num_preemptions > 0
    return runner.plans, results


def test_replayed_plans_give_the_same_tokens():
    plans, results = record()
    runner = FakeRunner(toy_config(num_pages=8, max_model_len=32))
    assert [runner.wait(runner.dispatch(plan)) for plan in plans] == results


def test_a_plan_holds_nothing_but_numbers_and_strings():
    """Json keeps all of it; an object that came along would fail or come back as something else."""
    for plan in record()[0]:
        assert plan.num_tokens == sum(s.num_tokens for s in plan.sequences)
        assert json.loads(json.dumps(dataclasses.asdict(plan))) == json.loads(json.dumps(_lists(plan)))
        assert {type(leaf) for leaf in _leaves(dataclasses.astuple(plan))} <= {int, float, str, bool, type(None)}


def test_planning_is_deterministic():
    assert record() == record()


def test_an_empty_plan():
    assert StepPlan(0, (), (), ()).num_tokens == 0


def _lists(plan):
    return {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}


def _leaves(value):
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
