"""The toy model's tokenizer: a token is an ASCII character, so that a test can compute tokens by hand.

Knows no files. Id 0 is the end of the sequence; no text holds it, because NUL is refused.
"""

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenization.piece_tokenizer import GUARD, PieceTokenizer, check_text
from jaxserve.tokenization.pieces import Spelling

_VOCAB_SIZE = 128
_EOS_TEXT = "<eos>"


class AsciiTokenizer(PieceTokenizer):
    """Token id = character code; vocabulary 128; no bos."""

    def __init__(self, chat_template: str | None = None):
        """Starts with the given template."""
        super().__init__(
            Spelling(lambda token_id: bytes([token_id]) if token_id else _EOS_TEXT.encode()),
            _VOCAB_SIZE,
            {_EOS_TEXT: 0},
            eos_token_ids=(0,),
            chat_template=chat_template,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The character codes.

        Args:
            text: ASCII only.
            add_special_tokens: makes no difference, there are none to add.
            parse_special: whether `<eos>` in the text is the special token.

        Raises:
            InvalidRequestError: a character outside of ASCII.
        """
        check_text(text)
        if not parse_special:
            return self._codes(text)
        ids = []
        for part, special in self.split_special(text):
            ids += self._codes(part.replace(GUARD, "")) if special is None else [special]
        return ids

    @staticmethod
    def _codes(text: str) -> list[int]:
        if not text.isascii():
            at = next(n for n, char in enumerate(text) if not char.isascii())
            raise InvalidRequestError("prompt", text[at], f"ASCII text (see index {at})", "Serve a model with a tokenizer.")
        return list(text.encode("ascii"))
