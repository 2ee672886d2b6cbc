"""What decides, token by token, which tokens a completion may go on with: the interface, and several of them as one.

Knows no grammar and no text; `jaxserve.structured` does. The engine asks `restrict` before each token and tells `accept` after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class ConstraintState(Protocol):
    """Of one completion."""

    def restrict(self, words: np.ndarray) -> None:
        """Clears the bits of the tokens that are not allowed next: bit i % 32 of uint32 words[i // 32] is token i."""
        ...

    def accept(self, token_id: int) -> None:
        """Goes on past a token that was allowed."""
        ...


class Constraint(Protocol):
    """Shared by completions; never changes."""

    def start(self, prompt_token_ids: Sequence[int]) -> ConstraintState:
        """Returns the state before the first token."""
        ...


@dataclass(frozen=True, slots=True)
class AllOf:
    """Allows what each of the constraints allows."""

    constraints: tuple[Constraint, ...]

    def start(self, prompt_token_ids: Sequence[int]) -> ConstraintState:
        return _AllOfState(tuple(constraint.start(prompt_token_ids) for constraint in self.constraints))


@dataclass(frozen=True, slots=True)
class _AllOfState:
    states: tuple[ConstraintState, ...]

    def restrict(self, words: np.ndarray) -> None:
        for state in self.states:
            state.restrict(words)

    def accept(self, token_id: int) -> None:
        for state in self.states:
            state.accept(token_id)
