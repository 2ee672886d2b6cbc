"""What each token adds to the text, as bytes: the one table that decoding, streaming and `token_text` read.

Every decoder that jaxserve accepts is a concatenation: the text of a sequence is the UTF-8 decoding of its tokens'
bytes, one after the other, less the leading space that some tokenizers put before every text. Bytes that are no UTF-8
become U+FFFD, one for each maximal broken subpart (Unicode 15, section 3.9; what Python and Rust do). That is what the
libraries do too, except where no faithful streaming is possible: HF's ByteFallback turns a whole run of byte tokens
into U+FFFD when its last byte is broken, so that a character already sent would have to be taken back.

Knows nothing of where a piece comes from (the tokenizers do) nor of streams (`detokenizer`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

LEADING_SPACE_MARK = "▁"


class PieceTable(dict[int, bytes]):
    """Token id → bytes, filled as tokens are met. A token outside of the vocabulary has no bytes and is not stored.

    A dict with `__missing__`, because a look-up is on the path of every generated token and this one stays in C.
    """

    def __init__(self, read: Callable[[int], bytes], num_tokens: int, hidden: frozenset[int] = frozenset()):
        """Starts empty.

        Args:
            read: gives the bytes of one token of [0, num_tokens).
            num_tokens: ids from here on are outside of the vocabulary.
            hidden: ids that add nothing (special tokens, where they are skipped).
        """
        super().__init__()
        self._read = read
        self._num_tokens = num_tokens
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        """Reads a token that is met for the first time."""
        token_id = int(token_id)
        if not 0 <= token_id < self._num_tokens:
            return b""
        piece = b"" if token_id in self._hidden else self._read(token_id)
        self[token_id] = piece
        return piece

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of a sequence, leading space included."""
        return b"".join([self[i] for i in token_ids])


class TokenPieces:
    """The two tables of a tokenizer, with and without special tokens, and its leading-space rule.

    Attributes:
        leading_spaces: how many spaces at most the decoder drops at the very start of a text (0: none).
        shown: all tokens.
        skipping: special tokens are empty.
    """

    def __init__(self, read: Callable[[int], bytes], num_tokens: int, special: frozenset[int], leading_spaces: int):
        self.leading_spaces = leading_spaces
        self.shown = PieceTable(read, num_tokens)
        self.skipping = PieceTable(read, num_tokens, special)

    def table(self, skip_special_tokens: bool) -> PieceTable:
        """The table to read from."""
        return self.skipping if skip_special_tokens else self.shown

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence."""
        data = self.table(skip_special_tokens).join(token_ids)
        return self.without_leading_spaces(data).decode("utf-8", "replace")

    def without_leading_spaces(self, data: bytes) -> bytes:
        """The bytes of a text's start, less the spaces that the decoder drops there."""
        dropped = 0
        while dropped < self.leading_spaces and data[dropped : dropped + 1] == b" ":
            dropped += 1
        return data[dropped:]


class ByteAlphabet(dict[int, int]):
    """GPT-2's reversible map from printable characters to bytes, for `str.translate`-like look-ups."""

    @classmethod
    def gpt2(cls) -> Self:
        """Printable Latin-1 stands for itself; the other 68 bytes are 256, 257, … in order.

        Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
        """
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in set(printable)]
        return cls({b: b for b in printable} | {256 + n: b for n, b in enumerate(others)})

    def to_bytes(self, token: str) -> bytes:
        """The token's bytes; its UTF-8 where a character is outside of the alphabet, as in HF's decoder."""
        try:
            return bytes([self[ord(c)] for c in token])
        except KeyError:
            return token.encode("utf-8")
