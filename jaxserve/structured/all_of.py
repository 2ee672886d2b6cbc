"""Several constraints at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ConstraintError
from jaxserve.structured.constraint import CompiledConstraint, TokenConstraint


@dataclass(frozen=True, slots=True)
class AllOf:
    """A `CompiledConstraint`: only what each of the parts allows."""

    parts: tuple[CompiledConstraint, ...]

    def start(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> TokenConstraint:
        """See `CompiledConstraint`."""
        return _AllOfState([part.start(prompt_token_ids, output_token_ids) for part in self.parts])


class _AllOfState:
    """A `TokenConstraint`."""

    __slots__ = ("_parts",)

    def __init__(self, parts: list[TokenConstraint]):
        self._parts = parts

    def restrict(self, words_W: np.ndarray) -> None:
        for part in self._parts:
            part.restrict(words_W)
        if not words_W.any():
            raise ConstraintError("no token is left: what the grammar demands next, another field of the request forbids.")

    def accept(self, token_id: int) -> None:
        for part in self._parts:
            part.accept(token_id)
