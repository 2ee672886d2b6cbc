"""A budget for the part of a completion in which a model thinks: once it is spent, the tokens that end that part are forced."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.structured.constraint import TokenConstraint


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How a model marks its thinking, as tokens; neither is empty."""

    start: tuple[int, ...]
    end: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """A `CompiledConstraint`: at most `budget` tokens between the marks, each time that thinking begins.

    The prompt may have begun it, as templates of reasoning models do.
    """

    reasoning: Reasoning
    budget: int

    def start(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> TokenConstraint:
        """See `CompiledConstraint`."""
        state = _ThinkingState(self, list(prompt_token_ids))
        for token_id in output_token_ids:
            state.accept(token_id)
        return state


class _ThinkingState:
    """A `TokenConstraint`.

    Attributes:
        num_thought: tokens since thinking began; None outside of it. What the prompt holds of it is not counted.
    """

    __slots__ = ("_budget", "_recent", "num_thought")

    def __init__(self, budget: ThinkingBudget, prompt: list[int]):
        self._budget = budget
        reasoning = budget.reasoning
        begun, ended = _last(prompt, reasoning.start), _last(prompt, reasoning.end)
        self.num_thought = 0 if begun > ended else None
        self._recent = prompt[-max(len(reasoning.start), len(reasoning.end)) :]

    def restrict(self, words_W: np.ndarray) -> None:
        if self.num_thought is None or self.num_thought < self._budget.budget:
            return
        end = self._budget.reasoning.end
        done = max(n for n in range(len(end)) if tuple(self._recent[len(self._recent) - n :]) == end[:n])
        forced = np.zeros_like(words_W)
        forced[end[done] // 32] = np.uint32(1 << end[done] % 32)
        words_W &= forced

    def accept(self, token_id: int) -> None:
        reasoning = self._budget.reasoning
        self._recent = [*self._recent, token_id][-max(len(reasoning.start), len(reasoning.end)) :]
        if self.num_thought is not None:
            self.num_thought += 1
        if tuple(self._recent[-len(reasoning.end) :]) == reasoning.end:
            self.num_thought = None
        elif tuple(self._recent[-len(reasoning.start) :]) == reasoning.start:
            self.num_thought = 0


def _last(tokens: list[int], part: tuple[int, ...]) -> int:
    """Returns where a part begins for the last time; -1 where it does not."""
    starts = range(len(tokens) - len(part), -1, -1)
    return next((i for i in starts if tuple(tokens[i : i + len(part)]) == part), -1)
