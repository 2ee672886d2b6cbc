"""Thinking ends when its budget is spent, by the model's own mark, and nothing else of a completion is touched."""

import numpy as np
import pytest

from jaxserve.structured.thinking import Reasoning, ThinkingBudget

VOCAB = 64
START, END = (10,), (20, 21, 22)


def allowed(state):
    words = np.full(VOCAB // 32, 0xFFFFFFFF, np.uint32)
    state.restrict(words)
    return [i for i in range(VOCAB) if words[i // 32] >> (i % 32) & 1]


def run(state, wanted):
    """Returns what comes of a model that wants these tokens: each where it is allowed, else the only one that is."""
    output = []
    for token in wanted:
        choices = allowed(state)
        output.append(token if token in choices else choices[0])
        state.accept(output[-1])
    return output


def test_the_end_is_forced_when_the_budget_is_spent():
    state = ThinkingBudget(Reasoning(START, END), 3).start([1, 2])
    assert run(state, [5, 10, 6, 6, 6, 6, 6, 6, 6, 6]) == [5, 10, 6, 6, 6, 20, 21, 22, 6, 6]


def test_an_end_that_was_begun_is_completed():
    state = ThinkingBudget(Reasoning(START, END), 2).start([1, 10])
    assert run(state, [6, 20, 7, 7, 7]) == [6, 20, 21, 22, 7]


def test_thinking_that_ends_in_time_is_left_alone():
    state = ThinkingBudget(Reasoning(START, END), 5).start([10])
    assert run(state, [6, 20, 21, 22, *[7] * 9]) == [6, 20, 21, 22, *[7] * 9]


def test_it_may_begin_again():
    state = ThinkingBudget(Reasoning(START, END), 1).start([10, 20, 21, 22])
    assert run(state, [6, 6, 6, 10, 6, 6, 6, 6, 6]) == [6, 6, 6, 10, 6, 20, 21, 22, 6]


@pytest.mark.parametrize("num_before", range(9))
def test_a_request_resumes_where_it_was(num_before):
    wanted = [10, 6, 6, 20, 6, 6, 6, 6, 6]
    budget = ThinkingBudget(Reasoning(START, END), 3)
    whole = run(budget.start([1]), wanted)
    resumed = budget.start([1], whole[:num_before])
    assert whole[:num_before] + run(resumed, wanted[num_before:]) == whole


def test_a_budget_of_nothing():
    assert run(ThinkingBudget(Reasoning(START, END), 0).start([10]), [6, 6, 6, 6]) == [20, 21, 22, 6]
