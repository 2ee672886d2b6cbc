"""The constraints of all rows of a step."""

from collections.abc import Iterator, Mapping

import numpy as np

from jaxserve.errors import ConstraintError
from jaxserve.structured.all_of import AllOfState
from jaxserve.structured.compiled_grammar import GrammarState, compute_masks
from jaxserve.structured.constraint import TokenConstraint


def restrict_rows(constraints: Mapping[int, TokenConstraint], words_RW: np.ndarray) -> dict[int, ConstraintError]:
    """`restrict` for each row that has a constraint, grammars in parallel.

    Args:
        constraints: by row.
        words_RW: uint32; see `TokenConstraint.restrict`.

    Returns:
        The rows whose requests cannot go on, and why; what their words are then means nothing.
    """
    compute_masks([state for constraint in constraints.values() for state in _grammars(constraint)])
    failed = {}
    for row, constraint in constraints.items():
        try:
            constraint.restrict(words_RW[row])
        except ConstraintError as error:
            failed[row] = error
    return failed


def _grammars(constraint: TokenConstraint) -> Iterator[GrammarState]:
    if isinstance(constraint, GrammarState):
        yield constraint
    elif isinstance(constraint, AllOfState):
        for part in constraint.parts:
            yield from _grammars(part)
