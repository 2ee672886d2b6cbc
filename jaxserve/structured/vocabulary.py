"""The model's vocabulary as `llguidance` sees it, and which of its tokens are text.

A grammar speaks of text, so tokens without any are never allowed: special tokens, holes, padding beyond the tokenizer. They
have no bytes here, and that nothing allows them after all (`llguidance` has syntax for token ids) is what `text_words` is
for. The end-of-sequence tokens are allowed where the grammar is complete, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxserve.tokenization.tokenizer import Tokenizer

_NEVER_IN_TEXT = 0xFF
"""No UTF-8 has this byte; `llguidance` marks special tokens with it."""


class Vocabulary:
    """Immutable; made once an engine, in a second at 128k tokens.

    Attributes:
        size: the model's, padding included.
        library: `llguidance`'s own object.
        executor: its threads, for the masks of several requests at once.
        text_words: bits of the tokens that have text.
        end_words: bits of the end-of-sequence tokens.
        opening_words: bits of the tokens that are spelled at the start of a text as elsewhere; None where all are.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Iterable[int]):
        """Reads every token.

        Args:
            tokenizer: whose tokens they are.
            size: the model's vocabulary; at least as large as the tokenizer's, as a rule.
            eos_token_ids: at least one below `size`.
        """
        import llguidance

        self.size = size
        self._pieces = tokenizer.pieces
        ends = sorted(i for i in set(eos_token_ids) if 0 <= i < size)
        silent = tokenizer.special_token_ids | set(ends)
        spelled = self._pieces.shown
        tokens = [b"" if i in silent else spelled[i] for i in range(min(size, tokenizer.vocab_size))]
        tokens = [b"" if token[:1] == bytes([_NEVER_IN_TEXT]) else token for token in tokens]
        tokens += [b""] * (size - len(tokens))
        self.text_words = words_of(size, (i for i, token in enumerate(tokens) if token))
        self.end_words = words_of(size, ends)
        self.end_token_ids = frozenset(ends)
        self.opening_words = self._same_at_opening(tokens)
        self.executor = llguidance.LLExecutor(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))
        self.library = llguidance.LLTokenizer(_Wrapper(tokens, ends[0]), eos_token=ends)  # pyright: ignore[reportArgumentType]

    def begins_text(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether what follows this prompt is the start of a text, which some tokenizers spell without its first space."""
        opening = self._pieces.opening
        if opening is None:
            return False
        return all(opening.take(i, self._pieces.skipping[i])[1] for i in prompt_token_ids)

    def _same_at_opening(self, tokens: list[bytes]) -> np.ndarray | None:
        """A token whose spelling differs there is not allowed there: its text would not be what the grammar read."""
        opening = self._pieces.opening
        if opening is None:
            return None
        return words_of(self.size, (i for i, token in enumerate(tokens) if token and opening.read(i) == token))


class _Wrapper:
    """What `llguidance` reads a vocabulary from. It would call it to tokenize a text that the grammar forces.

    No grammar of ours forces (`grammar.OPTIONS`): a mask is what the language allows, not one way to cut it into tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int):
        self.tokens = tokens
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no grammar of ours forces tokens")


def words_of(size: int, token_ids: Iterable[int]) -> np.ndarray:
    """The uint32 words in which the bits of these tokens are set."""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def has_bit(words: np.ndarray, token_id: int) -> bool:
    """Whether a token's bit is set; no token outside of the vocabulary has one."""
    return 0 <= token_id < 32 * len(words) and bool(words[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))


def is_installed() -> bool:
    """Whether `llguidance` can be imported: a bare machine has none."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


def limits_of(**fields: Any) -> Any:
    """`llguidance`'s limits; without verbose errors, which would put the state of the request into messages."""
    import llguidance

    return llguidance.LLParserLimits(verbose_errors=False, **fields)
