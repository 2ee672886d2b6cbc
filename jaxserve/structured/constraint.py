"""What the engine knows of a constraint: two interfaces, nothing of grammars."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TokenConstraint(Protocol):
    """The state of one running request; used by the engine thread alone."""

    def restrict(self, words_W: np.ndarray) -> None:
        """Clears the bits of the tokens that may not come next.

        Args:
            words_W: uint32; bit `t % 32` of word `t // 32` is token t. At least one of the tokens that this constraint
                allows is left if all were allowed before.

        Raises:
            ConstraintError: nothing can follow, or to find out what would take too long. The request cannot go on.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Takes the token that was sampled.

        Raises:
            ConstraintError: it was not allowed. The request cannot go on.
        """
        ...


class CompiledConstraint(Protocol):
    """What a request carries: immutable, shared between requests and threads."""

    def start(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> TokenConstraint:
        """The state after a prompt and what was generated since, as for a request that was preempted.

        Raises:
            ConstraintError: the output is not allowed.
        """
        ...
