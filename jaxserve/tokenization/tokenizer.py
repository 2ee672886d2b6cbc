"""The tokenizer interface. Which implementation a model directory asks for is `loading`'s.

Tokenizers hold no request's state and may be used from any thread; encoding releases the GIL.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxserve.tokenization.detokenizer import DetokenizerStream
from jaxserve.tokenization.pieces import TokenPieces


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that has text; the model's own vocabulary may be padded beyond."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Begins a sequence; None where the model has none."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Each ends a completion: the tokenizer's, then those of generation_config.json and config.json."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """What skip_special_tokens skips."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text → id of the special tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja); None where it has none."""
        ...

    @property
    def pieces(self) -> TokenPieces:
        """What each token adds to a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: Unicode text without NUL and lone surrogates.
            add_special_tokens: whether the model's own (such as bos) are put around it. False for a rendered chat
                template, which writes its own.
            parse_special: whether a special token's text in `text` is that token (rendered templates) or plain text
                (everything from a user).

        Raises:
            InvalidRequestError: text that cannot be tokenized.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids outside of the vocabulary add nothing."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; special tokens give their text's."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's own text, leading space included; U+FFFD for parts of a character."""
        ...

    def new_stream(self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> DetokenizerStream:
        """An incremental decoder whose text continues the prompt."""
        ...
