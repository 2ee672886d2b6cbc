"""Token sequences of words, by vLLM's rule."""

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.bad_words import word_sequences


class Pieces:
    """A vocabulary with spaces inside of tokens; the longest piece first."""

    PIECES = (" cat", "cat", " dog", "do", "g", " ", "")

    def encode(self, text, *, add_special_tokens, parse_special=False):
        assert not add_special_tokens
        assert not parse_special
        ids = []
        while text:
            piece = next(p for p in self.PIECES if text.startswith(p))
            if not piece:
                return []
            ids.append(self.PIECES.index(piece))
            text = text[len(piece) :]
        return ids


@pytest.mark.parametrize(
    ("words", "sequences"),
    [
        (["cat"], ((1,), (0,))),  # another token of the same number
        ([" cat"], ((1,), (0,))),  # a space of the caller's own makes no difference
        (["dog"], ((3, 4),)),  # a token less after a space: not taken, as in vLLM
        (["g"], ((4,),)),  # after a space a token more: the bare word is at its end
        (["cat", "g", "cat"], ((1,), (0,), (4,))),
        ([], ()),
    ],
)
def test_a_word_is_one_or_two_sequences(words, sequences):
    assert word_sequences(words, Pieces()) == sequences


def test_characters():
    assert word_sequences(["ab", "c"], AsciiTokenizer()) == (tuple(b"ab"), tuple(b"c"))


def test_a_word_that_cannot_be_a_token_is_named():
    with pytest.raises(InvalidRequestError, match="^bad_words must be texts that can be tokenized .*, got 'é'"):
        word_sequences(["a", "é"], AsciiTokenizer())
    with pytest.raises(InvalidRequestError, match="^bad_words must be words of at least one token, got 'x'"):
        word_sequences(["x"], Pieces())
    with pytest.raises(InvalidRequestError, match="^bad_words must be words of at least one token, got ' '"):
        word_sequences([" "], AsciiTokenizer())
