"""The corpus: the standard library of the running interpreter, as text, as tokens, as windows.

Knows where the text comes from, which files are held out, how it is tokenized and how training windows are cut.
Knows nothing of jax or of the model.
"""

import dataclasses
import hashlib
import io
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

BOS, EOS = 1, 2
HELD_OUT_PERCENT = 2
MAX_TABLE_SHARE = 0.25
INDENTS = (2, 4, 8, 12, 16)
# SentencePiece writes a space as U+2581. The one character that does not survive a round trip is therefore a literal U+2581.
SPACE = "\u2581"
_SKIPPED_PARTS = frozenset({"site-packages", "__pycache__", "lib2to3"})
_TABLE_CELL = re.compile(r"""0[xX][0-9a-fA-F]+|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\b\d[\d.eE]*\b""")


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file: its path relative to the root [posix], and its text."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def standard_library() -> pathlib.Path:
    """The folder that holds the running interpreter's own library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def collect(root: pathlib.Path) -> list[Document]:
    """Every distinct, decodable Python file under `root` that is not mostly a table of numbers, sorted by path."""
    documents, seen = [], set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.as_posix()):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if not text.strip() or digest in seen or is_table(text):
            continue
        seen.add(digest)
        documents.append(Document(relative.as_posix(), text.replace("\r\n", "\n")))
    return documents


def is_table(text: str) -> bool:
    """Whether numbers and escapes make up so much of `text` that it is data rather than code (the charmap codecs)."""
    return sum(len(cell) for cell in _TABLE_CELL.findall(text)) > MAX_TABLE_SHARE * len("".join(text.split()))


def is_held_out(path: str) -> bool:
    """Whether a file belongs to the held-out set: decided by its path alone, so the split survives edits of the files."""
    return int.from_bytes(hashlib.sha256(path.encode("utf-8")).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """`(train, held_out)`, each in the order of `documents`."""
    train, held_out = [], []
    for document in documents:
        (held_out if is_held_out(document.path) else train).append(document)
    return train, held_out


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> bytes:
    """A byte-fallback BPE whose newlines and indents are single tokens, as a serialized SentencePiece model.

    No normalization, no dummy prefix and no whitespace clean-up: decode(encode(text)) is the text.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for document in documents for line in document.text.split("\n") if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", *(SPACE * width for width in INDENTS)],
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Documents laid end to end, each as bos · text · eos.

    `line_starts` are the positions at which a training window may open: the token after a newline or after a bos.
    """

    tokens: np.ndarray
    line_starts: np.ndarray
    num_documents: int
    num_bytes: int

    @classmethod
    def pack(cls, documents: list[Document], tokenizer: sentencepiece.SentencePieceProcessor) -> "TokenStream":
        encoded = tokenizer.encode([document.text for document in documents], num_threads=2)
        tokens = np.fromiter((token for ids in encoded for token in (BOS, *ids, EOS)), np.int32)
        opens = np.isin(tokens[:-1], (BOS, tokenizer.piece_to_id("\n"))) & (tokens[1:] != BOS)
        return cls(tokens, np.flatnonzero(opens) + 1, len(documents), sum(document.num_bytes for document in documents))


def training_windows(stream: TokenStream, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless `(inputs, targets)` windows of `length` tokens: each epoch one shifted grid over the stream, shuffled.

    A window opens at the start of a line and begins with bos, because a prompt does too: stream `… \\n d e f …` cut at
    `d` gives inputs `bos d e` and targets `d e f`.
    """
    for epoch in range(1 << 30):
        rng = np.random.default_rng((seed, length, epoch))
        grid = np.arange(rng.integers(length), len(stream.tokens) - 2 * length, length)
        starts = stream.line_starts[np.searchsorted(stream.line_starts, grid).clip(max=len(stream.line_starts) - 1)]
        starts = starts[starts + length <= len(stream.tokens)]
        for start in rng.permutation(starts):
            targets = stream.tokens[start : start + length]
            yield np.concatenate(([BOS], targets[:-1])).astype(np.int32), targets


def evaluation_windows(stream: TokenStream, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`(inputs, targets)`, both [windows, length], in which every token of the stream is a target exactly once.

    The last window is filled up with bos, which is never scored.
    """
    num_windows = -(-len(stream.tokens) // length)
    targets = np.full((num_windows, length), BOS, np.int32)
    targets.reshape(-1)[: len(stream.tokens)] = stream.tokens
    return np.concatenate([np.full((num_windows, 1), BOS, np.int32), targets[:, :-1]], axis=1), targets
