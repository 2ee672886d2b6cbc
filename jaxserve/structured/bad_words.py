"""Token sequences that a completion must not contain.

As in vLLM, the last token of a sequence is banned where the *generated* tokens end with the others; the prompt does not
count. How words become sequences: `tokenization.bad_words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.structured.constraint import TokenConstraint


@dataclass(frozen=True, slots=True)
class BadWords:
    """A `CompiledConstraint`.

    Attributes:
        sequences: none of them empty.
    """

    sequences: tuple[tuple[int, ...], ...]
    _always: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _after: dict[int, tuple[tuple[int, ...], ...]] = field(init=False, repr=False, compare=False)
    """The last token but one → the sequences that it may continue."""

    def __post_init__(self) -> None:
        if any(not sequence for sequence in self.sequences):
            raise ValueError("a bad word has no tokens")
        after: dict[int, tuple[tuple[int, ...], ...]] = {}
        for sequence in self.sequences:
            if len(sequence) > 1:
                after[sequence[-2]] = (*after.get(sequence[-2], ()), sequence)
        object.__setattr__(self, "_always", tuple(sequence[0] for sequence in self.sequences if len(sequence) == 1))
        object.__setattr__(self, "_after", after)

    def start(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> TokenConstraint:
        """See `CompiledConstraint`."""
        del prompt_token_ids
        return _BadWordsState(self, list(output_token_ids))

    def banned(self, output_token_ids: list[int]) -> list[int]:
        """The tokens that must not come next."""
        banned = list(self._always)
        last = output_token_ids[-1] if output_token_ids else None
        for sequence in self._after.get(last, ()) if last is not None else ():
            num_before = len(sequence) - 1
            if tuple(output_token_ids[-num_before:]) == sequence[:-1]:
                banned.append(sequence[-1])
        return banned


class _BadWordsState:
    """A `TokenConstraint`. A token that completes a bad word is taken: where nothing else was left, one had to be."""

    __slots__ = ("_bad_words", "_output")

    def __init__(self, bad_words: BadWords, output_token_ids: list[int]):
        self._bad_words = bad_words
        self._output = output_token_ids

    def restrict(self, words_W: np.ndarray) -> None:
        for token_id in self._bad_words.banned(self._output):
            words_W[token_id // 32] &= ~np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        self._output.append(token_id)
