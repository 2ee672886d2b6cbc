"""tokenizer.json, read by HF's `tokenizers`: encoding is the library's, decoding is by pieces.

Knows the library; its decoders are `json_decoder`'s. `encode_batch_fast` releases the GIL (`encode` holds it for 0.6 s
a megabyte).
"""

import json
import re
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.json_decoder import read_decoder
from jaxserve.tokenization.piece_tokenizer import GUARD, PieceTokenizer, alternation, check_text
from jaxserve.tokenization.pieces import Spelling
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
        super().__init__(
            _spelling(path, self._plain),
            max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1,  # ids may have holes
            {token.content: token_id for token_id, token in added.items() if token.special},
            bos_token_id=files.resolve_bos(self._plain.token_to_id),
            eos_token_ids=files.resolve_eos(self._plain.token_to_id),
            chat_template=files.chat_template,
        )
        self._lookalike = self._lookalike_pattern()
        self._prefix, self._suffix = self._surrounding_tokens(files)
        self._check_decoding(path, lambda ids: self._plain.decode(ids, skip_special_tokens=False), self.vocab_size)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `tokenizer.Tokenizer`; tokens that the file adds without calling them special are always parsed."""
        check_text(text)
        if not parse_special:
            ids = self._encode_plain(text)
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
            ids += self._encode_plain(part.replace(GUARD, ""))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Encodes text in which nothing is special; a look-alike that the model would take for a token is cut in two."""
        cuts = [match.start() + 1 for match in self._lookalike.finditer(text)] if self._lookalike else []
        if not cuts:
            return self._run(self._plain, text)
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        encoded = self._plain.encode_batch_fast(parts, add_special_tokens=False)
        return [token_id for part in encoded for token_id in part.ids]

    def _lookalike_pattern(self) -> re.Pattern | None:
        """Where a special token begins that the model itself has a piece for, as unigram models do; None if it has none.

        Finds overlapping ones, too.
        """
        texts = [text for text in self.special_tokens if len(text) > 1]
        encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        found = {text: 0 for text, part in zip(texts, encoded, strict=True) if self.special_tokens[text] in part.ids}
        pattern = alternation(found)
        return None if pattern is None else re.compile(f"(?={pattern.pattern})")

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


def _spelling(path: Path, loaded: Any) -> Spelling:
    spec = json.loads(loaded.decoder.__getstate__()) if loaded.decoder is not None else None
    try:
        return read_decoder(spec, lambda token_id: loaded.id_to_token(token_id) or "")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
