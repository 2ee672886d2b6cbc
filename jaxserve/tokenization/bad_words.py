"""The token sequences of words that must not be generated. Knows no state: which token is forbidden when is a constraint's."""

from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenization.tokenizer import Tokenizer


def word_sequences(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns one or two token sequences a word: as a text begins with it, and as it stands after a space.

    The second one counts only where the space is part of its first token and it is as long as the first one, as in vLLM:
    otherwise it holds the first one, or only a part of the word.

    Raises:
        InvalidRequestError: names bad_words.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        try:
            bare, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
        except InvalidRequestError as error:
            raise InvalidRequestError("bad_words", word, f"texts that can be tokenized ({error})") from None
        if not bare:
            raise InvalidRequestError("bad_words", word, "words of at least one token")
        sequences[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            sequences[spaced] = None
    return tuple(sequences)
