"""The decoder of a tokenizer.json, read as a spelling: what bytes each token adds to a text.

Hugging Face's decoders rewrite the whole list of tokens, one after the other. Those that do so token by token can be streamed;
a step that looks further is refused, unless it is one of two known ends: Fuse, which joins the tokens, and the removal of
the first space.

Knows the file's `decoder` field and nothing of the library.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.pieces import (
    ONE_EACH_BYTE,
    ONE_EACH_SUBPART,
    ByteAlphabet,
    Opening,
    Spelling,
)

Transform = Callable[[str], str | bytes]

KNOWN_DECODERS = (
    "ByteLevel; Metaspace; ByteFallback; Replace (of a string, before Fuse); Strip (of a token's front, before"
    " Fuse; or of one leading space, behind it); Fuse; a Sequence of them"
)


def read_decoder(spec: Mapping[str, Any] | None, token_of: Callable[[int], str]) -> Spelling:
    """The spelling that the decoder describes.

    Args:
        spec: the `decoder` field; None where the file has none.
        token_of: a token's text in the vocabulary.

    Raises:
        CheckpointError: a step whose text is no concatenation of the tokens' own.
    """
    if spec is None:  # the library joins with spaces
        return Spelling(lambda i: f" {token_of(i)}".encode(), Opening(lambda i: token_of(i).encode("utf-8")))
    chain = _Chain()
    for step in _flat(spec):
        chain.add(step)
    return chain.spelling(token_of)


def _flat(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        yield spec
        return
    for step in spec["decoders"]:
        yield from _flat(step)


class _Chain:
    """The steps so far: what they make of a token, at the start of a text and elsewhere."""

    def __init__(self) -> None:
        self._everywhere: list[Transform] = []
        self._at_start: list[Transform] = []
        self._has_opening = False
        self._has_byte_tokens = False
        self._is_joined = False  # from here on, the library sees one text instead of tokens
        self._drops_space = False

    def add(self, step: Mapping[str, Any]) -> None:
        kind = step["type"]
        if kind == "Fuse":
            self._is_joined = True
        elif kind == "Strip" and self._is_joined:
            self._strip_text(step)
        elif (
            kind == "Replace"
            and "String" in step["pattern"]
            and not (self._is_joined and len(step["pattern"]["String"]) > 1)
        ):
            self._append(_replacer(step["pattern"]["String"], step["content"]))
        elif self._is_joined:
            raise _unstreamable(step)
        elif kind == "ByteLevel":
            self._append(ByteAlphabet.gpt2().to_bytes)
            self._is_joined = True
        elif kind == "ByteFallback":
            self._append(_byte_token)
            self._has_byte_tokens = True
        elif kind == "Metaspace" and not self._has_opening:
            mark = step["replacement"]
            has_prefix = step.get("prepend_scheme") != "never"
            self._append(_replacer(mark, " "), _replacer(mark, "") if has_prefix else None)
        elif kind == "Strip" and not self._has_byte_tokens and not step["stop"]:
            self._append(_stripper(step["content"], step["start"]))
        else:
            raise _unstreamable(step)

    def spelling(self, token_of: Callable[[int], str]) -> Spelling:
        everywhere, at_start = _composed(self._everywhere), _composed(self._at_start)
        opening = None
        if self._drops_space:
            opening = Opening(lambda i: everywhere(token_of(i)).removeprefix(b" "))
        elif self._has_opening:
            opening = Opening(lambda i: at_start(token_of(i)))
        return Spelling(
            lambda i: everywhere(token_of(i)), opening, ONE_EACH_BYTE if self._has_byte_tokens else ONE_EACH_SUBPART
        )

    def _append(self, transform: Transform, at_start: Transform | None = None) -> None:
        self._everywhere.append(transform)
        self._at_start.append(at_start or transform)
        self._has_opening |= at_start is not None

    def _strip_text(self, step: Mapping[str, Any]) -> None:
        if (step["content"], step["start"], step["stop"]) != (" ", 1, 0) or self._has_opening or self._drops_space:
            raise _unstreamable(step)
        self._drops_space = True


def _unstreamable(step: Mapping[str, Any]) -> CheckpointError:
    return CheckpointError(f"decoder {dict(step)} cannot be streamed. Decoders known here: {KNOWN_DECODERS}.")


def _replacer(old: str, new: str) -> Transform:
    return lambda token: token.replace(old, new)


def _stripper(char: str, start: int) -> Transform:
    """Removes up to so many of a character from the front of a token."""
    return lambda token: token[min(start, len(token) - len(token.lstrip(char))) :]


def _byte_token(token: str) -> str | bytes:
    """`<0xE4>` is the byte E4; anything else is itself."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token
    return token


def _composed(transforms: list[Transform]) -> Callable[[str], bytes]:
    """All of them in turn, until one gives bytes."""

    def to_bytes(token: str) -> bytes:
        for transform in transforms:
            result = transform(token)
            if isinstance(result, bytes):
                return result
            token = result
        return token.encode("utf-8")

    return to_bytes
