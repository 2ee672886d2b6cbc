"""What all tokenizers share: decoding by pieces, special tokens, the check of incoming text.

A subclass knows one file format; it reads it, says what bytes a token has, and encodes text that is checked already.

**Special tokens in text.** A user's text never becomes a special token unless `parse_special` asks for it. A rendered
chat template needs that, and yet holds the user's text: `chat_template.render_chat(protect=…)` puts `GUARD` inside each
look-alike of a special token that a *message* holds, which `encode(parse_special=True)` reads as "plain text here" and
removes.
"""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.tokenization.detokenizer import DetokenizerStream
from jaxserve.tokenization.pieces import Spelling, TokenPieces

GUARD = "\ufdd0"  # a noncharacter: Unicode reserves it for a program's own use and no text may carry it
_NUM_CHECKED = 1000
_NUM_CHECKED_ALONE = 20


class PieceTokenizer:
    """Implements `tokenizer.Tokenizer` but for `_encode_plain` and the reading of files.

    Attributes:
        vocab_size: one more than the largest token id that has text.
        bos_token_id: begins a sequence; None where the model has none.
        eos_token_ids: each of them ends a completion.
        special_token_ids: what skip_special_tokens skips.
        special_tokens: text → id of the special tokens.
        chat_template: the model's own template; None where it has none.
    """

    def __init__(
        self,
        spelling: Spelling,
        vocab_size: int,
        special_tokens: Mapping[str, int],
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ):
        """Keeps what a subclass read; see the class for the fields."""
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.special_tokens = dict(special_tokens)
        self.special_token_ids = frozenset(self.special_tokens.values())
        self.chat_template = chat_template
        self._pieces = TokenPieces(spelling, vocab_size, self.special_token_ids)
        self._special_pattern = alternation(self.special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; a token id outside of the vocabulary adds nothing."""
        return self._pieces.decode(token_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, special or not; empty outside of the vocabulary."""
        return self._pieces.shown[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's own text, leading space included; U+FFFD for what is only a part of a character."""
        return self._pieces.shown[token_id].decode("utf-8", "replace")

    def new_stream(self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> DetokenizerStream:
        """A stream whose text continues the prompt."""
        return DetokenizerStream(self._pieces, prompt_token_ids, skip_special_tokens=skip_special_tokens)

    @property
    def pieces(self) -> TokenPieces:
        """What each token adds to a text."""
        return self._pieces

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """Cuts a text at its special tokens: (text, id) for each of them, (text, None) for what stands between."""
        if self._special_pattern is None:
            return [(text, None)]
        parts = self._special_pattern.split(text)
        return [(part, self.special_tokens[part] if n % 2 else None) for n, part in enumerate(parts) if part]

    def _check_decoding(self, path: Path, decode: Callable[[list[int]], str], num_tokens: int) -> None:
        """Compares with the library on a sample, at load: what is inferred from a file is not taken on trust.

        Special tokens are left out, which SentencePiece never shows, and parts of a character, which HF's ByteFallback joins.

        Args:
            path: the file, for the message.
            decode: the library's own.
            num_tokens: ids that the library knows.

        Raises:
            CheckpointError: the texts differ.
        """
        spread = range(0, num_tokens, max(1, num_tokens // _NUM_CHECKED))
        sample = [i for i in spread if i not in self.special_token_ids and "\ufffd" not in self.token_text(i)]
        for ids in (sample, *([i] for i in sample[:: max(1, len(sample) // _NUM_CHECKED_ALONE)])):
            expected, text = decode(ids), self.decode(ids)
            if text != expected:
                differing = (n for n, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b)
                at = next(differing, min(len(text), len(expected)))
                raise CheckpointError(
                    f"{path}: its decoder does more than to join its tokens' texts, so that it cannot be streamed: token ids"
                    f" {reprlib.repr(ids)} read {expected[at : at + 20]!r} where joining gives {text[at : at + 20]!r}. Remove"
                    " its denormalizer, or convert it to a tokenizer.json whose decoder is a known one."
                )


def alternation(literals: Mapping[str, int]) -> re.Pattern | None:
    """A pattern that captures any of the literals, longest first; None where there are none."""
    if not literals:
        return None
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def check_text(text: str) -> None:
    """Refuses what no tokenizer can take.

    Raises:
        InvalidRequestError: not a str, a lone surrogate, or NUL (which tokenizers written in C cut texts at).
    """
    if not isinstance(text, str):
        raise InvalidRequestError("prompt", text, "a str", "Decode bytes to text, or pass token ids.")
    if "\x00" in text:
        at = text.index("\x00")
        raise InvalidRequestError(
            "prompt", text[max(0, at - 8) : at + 8], "text without NUL characters", f"Remove the one at index {at}."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 8) : error.start + 8]
        raise InvalidRequestError(
            "prompt",
            shown,
            "text that can be written as UTF-8",
            f"Remove the lone surrogate at index {error.start}, or decode the text with errors='replace'.",
        ) from None
