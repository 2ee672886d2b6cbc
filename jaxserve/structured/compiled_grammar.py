"""A grammar that compiled, and its state in one running request. All parsing is `llguidance`'s."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.errors import ConstraintError
from jaxserve.structured.grammar import reason_of
from jaxserve.structured.vocabulary import Vocabulary, has_bit


class CompiledGrammar:
    """A `CompiledConstraint`.

    Its requests share the lexer's states, which are made as texts need them: later requests find them made, and the memory
    is that of one. Where a request has driven them to their limit, `is_spent` tells the cache to compile anew.

    Attributes:
        is_spent: whether its matcher has failed in some request.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: Any):
        self.vocabulary = vocabulary
        self.is_spent = False
        self._matcher = matcher

    def start(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> "GrammarState":
        """See `CompiledConstraint`."""
        state = GrammarState(self, self._matcher.deep_copy(), self.vocabulary.begins_text(prompt_token_ids))
        for token_id in output_token_ids:
            state.accept(token_id)
        return state


class GrammarState:
    """A `TokenConstraint`."""

    __slots__ = ("_address", "_compiled", "_is_opening", "_matcher", "_vocabulary", "_words")

    def __init__(self, compiled: CompiledGrammar, matcher: Any, is_opening: bool):
        self._compiled = compiled
        self._vocabulary = compiled.vocabulary
        self._matcher = matcher
        self._is_opening = is_opening
        self._words = np.empty_like(self._vocabulary.text_words)
        self._address = self._words.ctypes.data

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is one of the language."""
        return self._matcher.is_accepting()

    def restrict(self, words_W: np.ndarray) -> None:
        """See `TokenConstraint`. Other threads run meanwhile."""
        words, vocabulary = self._words, self._vocabulary
        self._matcher.unsafe_compute_mask_ptr(self._address, words.nbytes)
        if self._matcher.is_error():
            raise self._failure("the text so far cannot be continued")
        words &= vocabulary.text_words
        if self._is_opening and vocabulary.opening_words is not None:
            words &= vocabulary.opening_words
        if self._matcher.is_accepting():
            words |= vocabulary.end_words
        if not words.any():
            raise self._failure("the text so far cannot be continued with this model's tokens")
        words_W &= words

    def accept(self, token_id: int) -> None:
        """See `TokenConstraint`."""
        vocabulary = self._vocabulary
        if token_id in vocabulary.end_token_ids:
            is_allowed = self._matcher.is_accepting()
        else:
            is_allowed = has_bit(vocabulary.text_words, token_id)
            if self._is_opening and vocabulary.opening_words is not None:
                is_allowed = is_allowed and has_bit(vocabulary.opening_words, token_id)
        if not is_allowed or not self._matcher.consume_token(token_id):
            raise self._failure(f"token {token_id} cannot follow")
        self._is_opening = False

    def _failure(self, what: str) -> ConstraintError:
        detail = self._matcher.get_error()
        self._compiled.is_spent |= bool(detail)
        reason = reason_of(detail) if detail else ""
        if not reason or reason.startswith("NoExtension"):
            return ConstraintError(f"{what}.")
        return ConstraintError(f"{what} ({reason}).")
