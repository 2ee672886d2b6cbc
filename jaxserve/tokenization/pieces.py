"""What each token adds to the text, as bytes: the one table that decoding, streaming and `token_text` read.

Every decoder that jaxserve accepts is a concatenation: the text of a sequence is the UTF-8 decoding of its tokens'
bytes, one after the other, where the first tokens of a text may have a spelling of their own (`Opening`: the leading space
that some tokenizers put before every text). Bytes that are no UTF-8 become U+FFFD, as many as the library makes of them:

- byte-level vocabularies: one for each maximal broken subpart (Unicode 15, section 3.9; what Python and Rust do);
- vocabularies with byte tokens (SentencePiece): one for each broken byte.

That is what the libraries do too, except where no faithful streaming is possible: HF's ByteFallback turns a whole run of byte
tokens into U+FFFD when its last byte is broken, so that a character already sent would have to be taken back. Such a run
reads here as in SentencePiece, whose decoder ByteFallback stands in for.

Knows nothing of where a piece comes from (the tokenizers do) nor of streams (`detokenizer`).
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

LEADING_SPACE_MARK = "▁"

ONE_EACH_SUBPART = "replace"
ONE_EACH_BYTE = "jaxserve.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(ONE_EACH_BYTE, _replace_each_byte)


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
        """The bytes of tokens in the middle of a text."""
        return b"".join([self[i] for i in token_ids])


@dataclass(frozen=True, slots=True)
class Opening:
    """How a text's first token is spelled, where that differs from the rest.

    Attributes:
        read: the bytes of a token at the very start of a text.
        lasts: whether a token that adds nothing there leaves the start to the next one. Otherwise the first token that has
            any bytes is the only one concerned.
    """

    read: Callable[[int], bytes]
    lasts: bool = False

    def take(self, token_id: int, piece: bytes) -> tuple[bytes, bool]:
        """What a token adds at the start, and whether the next one stands at the start, too.

        Args:
            token_id: the token.
            piece: its bytes elsewhere; empty where it is skipped.
        """
        if not piece:
            return b"", True
        first = self.read(token_id)
        return first, self.lasts and not first


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tokenizer turns tokens into bytes and broken bytes into text.

    Attributes:
        read: the bytes of a token of the vocabulary, wherever it stands in a text.
        opening: None where a text starts like any other place.
        errors: how many U+FFFD stand for broken bytes: ONE_EACH_SUBPART or ONE_EACH_BYTE, names of codec error handlers.
    """

    read: Callable[[int], bytes]
    opening: Opening | None = None
    errors: str = ONE_EACH_SUBPART


class TokenPieces:
    """The two tables of a tokenizer, with and without special tokens.

    Attributes:
        opening: see `Spelling`.
        errors: see `Spelling`.
        shown: all tokens.
        skipping: special tokens are empty.
    """

    def __init__(self, spelling: Spelling, num_tokens: int, special: frozenset[int]):
        self.opening = spelling.opening
        self.errors = spelling.errors
        self.shown = PieceTable(spelling.read, num_tokens)
        self.skipping = PieceTable(spelling.read, num_tokens, special)

    def table(self, skip_special_tokens: bool) -> PieceTable:
        """The table to read from."""
        return self.skipping if skip_special_tokens else self.shown

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence."""
        table = self.table(skip_special_tokens)
        rest = iter(token_ids)
        data = b""
        is_open = self.opening is not None
        while self.opening is not None and is_open and (token_id := next(rest, None)) is not None:
            piece, is_open = self.opening.take(token_id, table[token_id])
            data += piece
        return (data + table.join(rest)).decode("utf-8", self.errors)


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
