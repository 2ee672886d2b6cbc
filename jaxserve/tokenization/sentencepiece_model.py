"""tokenizer.model, read by `sentencepiece`, with Llama's conventions around it.

Knows the library, `added_tokens_decoder` of tokenizer_config.json, and where bos and eos go. The library's own special
(control) tokens have no spelling in its input, so a user's `</s>` is plain text to it; its user-defined symbols are
always parsed.

Each part between special tokens is encoded as a text of its own, with its own leading space where the model adds one:
the way of Meta's reference and of the converted tokenizer.json (`"legacy": false` of later slow tokenizers is not
followed).
"""

from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.piece_tokenizer import GUARD, PieceTokenizer, alternation, check_text
from jaxserve.tokenization.pieces import LEADING_SPACE_MARK, ONE_EACH_BYTE, Opening, Spelling
from jaxserve.tokenization.tokenizer_files import TokenizerFiles


class SentencePieceTokenizer(PieceTokenizer):
    """A tokenizer over tokenizer.model."""

    def __init__(self, path: Path, files: TokenizerFiles):
        """Loads the file.

        Raises:
            CheckpointError: the file is empty or damaged.
        """
        self._processor = _load(path)
        self._num_pieces = self._processor.vocab_size()
        self._added = {i: token for i, token in files.added_tokens.items() if i >= self._num_pieces}
        special = {
            self._processor.id_to_piece(i): i
            for i in range(self._num_pieces)
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        marked_special = (i for i, token in files.added_tokens.items() if token.special)
        special |= {files.added_tokens[i].text: i for i in marked_special}
        super().__init__(
            Spelling(self._read_piece, self._opening(), ONE_EACH_BYTE),
            max([self._num_pieces, *(i + 1 for i in self._added)]),
            special,
            bos_token_id=_valid(files.resolve_bos(self._token_id), self._processor.bos_id()),
            eos_token_ids=files.resolve_eos(self._token_id) or _some(self._processor.eos_id()),
            chat_template=files.chat_template,
        )
        plain_added = {token.text: i for i, token in self._added.items() if not token.special}
        self._literal_ids = plain_added | self.special_tokens
        self._plain_pattern = alternation(plain_added)
        self._parsing_pattern = alternation(self._literal_ids)
        bos = self.bos_token_id
        self._prefix = [] if files.add_bos_token is False or bos is None else [bos]
        self._suffix = list(self.eos_token_ids[:1]) if files.add_eos_token else []
        self._check_decoding(path, self._processor.decode, self._num_pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """See `tokenizer.Tokenizer`; added tokens that are not special are always parsed."""
        check_text(text)
        pattern = self._parsing_pattern if parse_special else self._plain_pattern
        ids = []
        for n, part in enumerate(pattern.split(text) if pattern else [text]):
            if n % 2:
                ids.append(self._literal_ids[part])
            elif part:
                ids += self._processor.encode(part.replace(GUARD, "") if parse_special else part)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _token_id(self, text: str) -> int | None:
        for token_id, token in self._added.items():
            if token.text == text:
                return token_id
        token_id = self._processor.piece_to_id(text)
        return token_id if self._processor.id_to_piece(token_id) == text else None

    def _read_piece(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].text.encode("utf-8")
        if token_id >= self._num_pieces:
            return b""  # a hole between the pieces and an added token
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return piece.encode("utf-8")
        return piece.replace(LEADING_SPACE_MARK, " ").encode("utf-8")

    def _opening(self) -> Opening | None:
        """What the model's decoder drops at a text's start, asked of the library: the file does not show it.

        Nothing without a dummy prefix. With it (Llama) the space of the first piece; where the model also removes extra white
        space, a piece that is nothing but a space leaves the start to the next one.
        """
        marked = next((i for i in range(self._num_pieces) if self._is_marked(i)), None)
        if marked is None or self._processor.decode([marked]).encode("utf-8") == self._read_piece(marked):
            return None
        space = self._processor.piece_to_id(LEADING_SPACE_MARK)
        lasts = not self._processor.is_unknown(space) and not self._processor.decode([space, space])
        return Opening(lambda i: self._read_piece(i)[self._is_marked(i) :], lasts)

    def _is_marked(self, token_id: int) -> bool:
        """Whether it is a piece with a space in front; bytes and added tokens that spell one are not."""
        return token_id < self._num_pieces and self._processor.id_to_piece(token_id).startswith(LEADING_SPACE_MARK)


def _load(path: Path) -> Any:
    import sentencepiece

    if path.stat().st_size == 0:  # the library takes an empty file for a model without pieces
        raise CheckpointError(f"{path} is empty. Download the file again.")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}. Download the file again.") from None
    if processor.vocab_size() == 0:
        raise CheckpointError(f"{path} has no pieces. Download the file again.")
    return processor


def _some(token_id: int) -> tuple[int, ...]:
    return (token_id,) if token_id >= 0 else ()


def _valid(configured: int | None, library: int) -> int | None:
    if configured is not None:
        return configured
    return library if library >= 0 else None
