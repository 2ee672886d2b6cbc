"""Text of a growing sequence: what the engine sends after each token.

**Definition.** Let D(x) be `tokenizer.decode(x)`, P the prompt's tokens and G the generated ones. The text of G is
D(P + G) less D(P): a SentencePiece word that opens the answer keeps its space when a prompt stands before it, and loses
it when nothing does. Where P ends inside a character, that character belongs to the answer if G completes it; if not,
the U+FFFD that stands for it belongs to the prompt and is not sent again. The prompt is never repeated.

**Invariant.** Whatever the tokens are and however they are cut into pushes, all that `push` returned plus `flush()` is
that text. Nothing is sent that a later token could change: the start of an unfinished character (3 bytes at most) waits.

Knows bytes and UTF-8; the pieces come from `pieces`, stop strings from `stop_strings`. No window of earlier tokens is
decoded again: a token costs a look-up and the decoding of its own bytes. One stream a request, used by one thread.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxserve.tokenization.pieces import TokenPieces
from jaxserve.tokenization.stop_strings import StopChecker

if TYPE_CHECKING:
    from jaxserve.tokenization.tokenizer import Tokenizer

_MAX_UNFINISHED_BYTES = 3  # a UTF-8 character has 4 at most


class DetokenizerStream:
    """Tokens in, text out, without ever sending half a character."""

    __slots__ = ("_errors", "_opening", "_prompt_ending", "_push_plain", "_table", "_unfinished")

    def __init__(self, pieces: TokenPieces, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True):
        """Reads of the prompt only whether it has any text, and its last bytes.

        Args:
            pieces: the tokenizer's table.
            prompt_token_ids: what the text continues.
            skip_special_tokens: whether special tokens add nothing.
        """
        self._table = pieces.table(skip_special_tokens)
        self._errors = pieces.errors
        self._opening = pieces.opening  # None once the text has begun
        for token_id in prompt_token_ids:
            if self._opening is None:
                break
            self._bytes_of(token_id)
        self._unfinished = self._unfinished_tail(prompt_token_ids)
        # How the prompt's own text ends, should the answer not complete its last character.
        self._prompt_ending = self._unfinished.decode("utf-8", self._errors)
        self._push_plain = self._opening is None and not self._prompt_ending

    def push(self, token_ids: Iterable[int]) -> str:
        """Appends tokens and returns the text that they settle; may be empty."""
        return self._settle(b"".join([self._bytes_of(i) for i in token_ids]), final=False)

    def push_one(self, token_id: int) -> str:
        """`push([token_id])`, without the list: the engine's path."""
        if not self._push_plain:
            return self._settle(self._bytes_of(token_id), final=False)
        data = self._table[token_id]
        if self._unfinished:
            data = self._unfinished + data
        text, used = utf_8_decode(data, self._errors, False)
        self._unfinished = data[used:] if used < len(data) else b""
        return text

    def flush(self) -> str:
        """Ends the text: an unfinished character can no longer be completed and comes out as U+FFFD."""
        return self._settle(b"", final=True)

    def _settle(self, data: bytes, final: bool) -> str:
        data = self._unfinished + data
        text, used = utf_8_decode(data, self._errors, final)
        self._unfinished = data[used:]
        if self._prompt_ending and text:
            text = text.removeprefix(self._prompt_ending)
            self._prompt_ending = ""
        self._push_plain = self._opening is None and not self._prompt_ending
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        """What the next token adds; ends the opening where it is the last of it."""
        piece = self._table[token_id]
        if self._opening is not None:
            piece, is_open = self._opening.take(token_id, piece)
            if not is_open:
                self._opening = None
        return piece

    def _unfinished_tail(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes, where they are the start of a character; a lead byte always starts one anew, so 3 suffice."""
        tail = b""
        for token_id in reversed(token_ids):
            tail = self._table[token_id][-_MAX_UNFINISHED_BYTES:] + tail
            if len(tail) >= _MAX_UNFINISHED_BYTES:
                break
        tail = tail[-_MAX_UNFINISHED_BYTES:]
        _, used = utf_8_decode(tail, self._errors, False)
        return tail[used:]


class TextStream:
    """A request's visible text: detokenised, cut at the first stop string.

    The engine pushes each committed token that belongs to the text (a stop *token* it does not push), looks at
    `stopped_by`, and calls `finish` once, when the request ends for any reason.

    Attributes:
        stopped_by: the stop string that ended the text; None while there was none.
    """

    __slots__ = ("_checker", "_stream", "stopped_by")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        detokenize: bool = True,
    ):
        """Starts after the prompt.

        Args:
            tokenizer: what turns tokens into text.
            prompt_token_ids: what the text continues; stop strings are not looked for in it.
            stop: strings that end the text.
            include_stop_str_in_output: whether the stop string itself is kept.
            skip_special_tokens: whether special tokens add nothing.
            spaces_between_special_tokens: accepted for compatibility; no decoder that jaxserve accepts puts any there,
                so that both values give the same text.
            detokenize: False makes every text empty.
        """
        del spaces_between_special_tokens
        self.stopped_by: str | None = None
        self._stream = None
        self._checker = None
        if detokenize:
            self._stream = tokenizer.new_stream(prompt_token_ids, skip_special_tokens=skip_special_tokens)
            if stop:
                self._checker = StopChecker(stop, include_stop_str_in_output=include_stop_str_in_output)

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Appends one token.

        Args:
            token_id: the token.
            check_stop: False before min_tokens: no stop string may end in the text that this token settles. One that
                starts there and ends in a later, checked token's text still counts (vLLM's rule).

        Returns:
            The new visible text; empty after a stop string.
        """
        if self._stream is None:
            return ""
        if self._checker is None:
            return self._stream.push_one(token_id)
        if self.stopped_by is not None:
            return ""
        text = self._checker.push(self._stream.push_one(token_id), check=check_stop)
        self.stopped_by = self._checker.matched
        return text

    def finish(self) -> str:
        """Ends the text and releases what was held back; empty after a stop string."""
        if self._stream is None or self.stopped_by is not None:
            return ""
        text = self._stream.flush()
        if self._checker is None:
            return text
        return self._checker.push(text, check=False) + self._checker.flush()
