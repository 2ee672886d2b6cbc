"""tokenizer.json, read by HF's `tokenizers`: encoding is the library's, decoding is by pieces.

Knows the library and the decoders it can describe. `encode_batch_fast` releases the GIL (`encode` holds it for 0.6 s
a megabyte).
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.piece_tokenizer import GUARD, PieceTokenizer, check_text
from jaxserve.tokenization.pieces import ByteAlphabet
from jaxserve.tokenization.tokenizer_files import TokenizerFiles


class JsonTokenizer(PieceTokenizer):
    """A tokenizer over tokenizer.json.

    Two copies of the library's tokenizer, because whether it parses special tokens is a switch of the whole object and
    not of a call; the second is loaded when a chat is encoded for the first time.
    """

    def __init__(self, path: Path, files: TokenizerFiles):
        """Loads the file.

        Raises:
            CheckpointError: the file is damaged, or its decoder is not a concatenation of pieces.
        """
        self._path = path
        self._plain = _load(path)
        self._plain.encode_special_tokens = True  # the library's name for "as plain text"
        self._parsing = None
        self._parsing_lock = threading.Lock()
        added = self._plain.get_added_tokens_decoder()
        self._special_added = {token.content: token for token in added.values() if token.special}
        piece_bytes, leading_spaces = _read_decoder(path, self._plain)
        super().__init__(
            lambda token_id: piece_bytes(self._plain.id_to_token(token_id) or ""),
            max(self._plain.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1),
            {token.content: token_id for token_id, token in added.items() if token.special},
            leading_spaces=leading_spaces,
            bos_token_id=files.resolve_bos(self._plain.token_to_id),
            eos_token_ids=files.resolve_eos(self._plain.token_to_id),
            chat_template=files.chat_template,
        )
        self._prefix, self._suffix = self._surrounding_tokens(files)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `tokenizer.Tokenizer`; tokens that the file adds without calling them special are always parsed."""
        check_text(text)
        if not parse_special:
            ids = self._run(self._plain, text)
        elif GUARD not in text:
            ids = self._run(self._parser(), text)
        else:
            ids = self._encode_guarded(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    @staticmethod
    def _run(library_tokenizer: Any, text: str) -> list[int]:
        return library_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _parser(self) -> Any:
        with self._parsing_lock:
            if self._parsing is None:
                self._parsing = _load(self._path)
            return self._parsing

    def _encode_guarded(self, text: str) -> list[int]:
        """Encodes what stands between special tokens as plain text, guards removed.

        The same ids as from the library, save that a tokenizer which puts a space before the first word alone puts it
        before each part.
        """
        parts = self.split_special(text)
        ids = []
        for n, (part, special) in enumerate(parts):
            if special is not None:
                ids.append(special)
                continue
            before = self._special_added[parts[n - 1][0]] if n else None
            after = self._special_added[parts[n + 1][0]] if n + 1 < len(parts) else None
            part = part.lstrip() if before is not None and before.rstrip else part
            part = part.rstrip() if after is not None and after.lstrip else part
            ids += self._run(self._plain, part.replace(GUARD, ""))
        return ids

    def _surrounding_tokens(self, files: TokenizerFiles) -> tuple[list[int], list[int]]:
        """What is put around a text: the post-processor's tokens, corrected by add_bos_token and add_eos_token."""
        bare = self._run(self._plain, "a")
        whole = self._plain.encode_batch_fast(["a"], add_special_tokens=True)[0].ids
        starts = [n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare]
        start = starts[-1] if starts else 0
        prefix, suffix = whole[:start], whole[start + len(bare) :]
        bos, eos = self.bos_token_id, self._plain.token_to_id(files.eos_token or "")
        if files.add_bos_token is not None and bos is not None:
            prefix = [i for i in prefix if i != bos]
            prefix = [bos, *prefix] if files.add_bos_token else prefix
        if files.add_eos_token is not None and eos is not None:
            suffix = [i for i in suffix if i != eos]
            suffix = [*suffix, eos] if files.add_eos_token else suffix
        return prefix, suffix


def _load(path: Path) -> Any:
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}. Download the file again.") from None
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _read_decoder(path: Path, loaded: Any) -> tuple[Callable[[str], bytes], int]:
    """How a token's spelling becomes bytes, and how many leading spaces a text loses.

    Raises:
        CheckpointError: a decoder whose text is no concatenation of the tokens' own.
    """
    spec = json.loads(loaded.decoder.__getstate__()) if loaded.decoder is not None else None
    if spec is None:
        return (lambda token: b" " + token.encode("utf-8")), 1  # the library joins with spaces
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    leading_spaces = 0
    transforms: list[Callable[[str], str | bytes]] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            transforms.append(ByteAlphabet.gpt2().to_bytes)
        elif kind == "ByteFallback":
            transforms.append(_byte_token)
        elif kind == "Metaspace":
            transforms.append(_replacer(step["replacement"], " "))
            leading_spaces = 0 if step.get("prepend_scheme") == "never" else 1
        elif kind == "Replace" and "String" in step["pattern"]:
            transforms.append(_replacer(step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            leading_spaces = step["start"]
        elif kind != "Fuse":
            raise CheckpointError(
                f"{path}: decoder {step} cannot be streamed. Decoders known here: ByteLevel, ByteFallback, Metaspace,"
                " Replace (of a string), Strip (of leading spaces), Fuse, Sequence."
            )
    return _chain(transforms), leading_spaces


def _replacer(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


def _byte_token(token: str) -> str | bytes:
    """`<0xE4>` is the byte E4; anything else is itself."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token
    return token


def _chain(transforms: list[Callable[[str], str | bytes]]) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for transform in transforms:
            result = transform(token)
            if isinstance(result, bytes):
                return result
            token = result
        return token.encode("utf-8")

    return to_bytes
