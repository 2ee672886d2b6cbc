"""A thousand random streams a tokenizer: deltas put together = the text in one piece = the library's own full decode.

What is expected comes from no tokenizer of jaxserve: ids come from a library, and so does the text. `expected` is the library's
full decode, literally, but for one case in which Hugging Face's ByteFallback has no streamable answer: of a run of byte tokens
that holds whole characters *and* broken bytes it makes U+FFFD throughout, so that characters already sent would have to be taken
back. There the definition is that of SentencePiece, whose decoder it stands in for: the whole characters stay. The library is
made to say so by a token between the two, which is taken out of its text again.
"""

import random
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from jaxserve.tokenization.detokenizer import TextStream
from jaxserve.tokenization.tokenizer import Tokenizer

NUM_STREAMS = 1000
FLAVOURS = (
    *("llama_sp", "bare_sp", "squeezing_sp", "unigram_sp"),
    *("byte_level", "qwen_json", "llama_json", "gemma_json", "t5_json", "metaspace_json", "phrase_json"),
)
SNIPPETS = [
    "👩‍👩‍👧 👍🏽 🇫🇷🇯🇵 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🎉",
    "中文字符 日本語 𠮷野家 한국어",
    "العَرَبِيَّة हिन्दी ক্ষ မြန်မာ",
    "é ệ Zürich naïve façade",
    "the quick brown fox",
    " Hello world,  two   spaces",
    "def f(x):\n\treturn x\r\n",
    "END of it",
]
REPLACEMENT = "\ufffd"
SENTINEL = "<sentinel>"
WELL_FORMED = re.compile(
    rb"([\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})+"
)
"""Unicode 15, table 3-7."""
# Continuation bytes that may complete a character; what may follow its first byte is a part of 80..BF with one of these in it.
SECOND_BYTES = (0x80, 0x90, 0xA0)


class JsonLibrary:
    """`tokenizers` and a directory's tokenizer.json."""

    def __init__(self, directory: Path):
        import tokenizers

        self._library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self.num_ids = self._library.get_vocab_size()
        self.added = sorted(added)
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.broken = [i for i in range(self.num_ids) if REPLACEMENT in self._library.decode([i])]
        tokens = map(self._library.id_to_token, range(self.num_ids))
        matches = [re.fullmatch("<0x([0-9A-F]{2})>", token) for token in tokens]
        has_byte_tokens = "ByteFallback" in repr(self._library.decoder)
        self._bytes = {i: int(match[1], 16) for i, match in enumerate(matches) if match and has_byte_tokens}
        self._library.add_tokens([tokenizers.AddedToken(SENTINEL, normalized=False)])
        self._sentinel = self._library.token_to_id(SENTINEL)
        self.second_bytes = [self._byte_id(byte) for byte in SECOND_BYTES] if self.broken else []

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def expected(self, ids: Sequence[int], skip: bool) -> tuple[str, bool]:
        """The text, and whether it is the library's own, word for word."""
        cut = self._with_sentinels([i for i in ids if i < self.num_ids and not (skip and i in self.special)])
        is_literal = self._sentinel not in cut
        text = self._library.decode(list(ids) if is_literal else cut, skip_special_tokens=skip)
        return text.replace(SENTINEL, ""), is_literal

    def _with_sentinels(self, ids: list[int]) -> list[int]:
        """Sets broken bytes and whole characters of one run apart."""
        result = []
        for is_run, group in groupby(ids, self._bytes.__contains__):
            run = list(group)
            if is_run:
                spans = [match.span() for match in WELL_FORMED.finditer(bytes([self._bytes[i] for i in run]))]
                bounds = sorted({0, len(run)}.union(*spans))
                for start, end in pairwise(bounds):
                    result += [self._sentinel] * (start > 0) + run[start:end]
            else:
                result += run
        return result

    def _byte_id(self, byte: int) -> int:
        if self._bytes:
            return next(i for i, value in self._bytes.items() if value == byte)
        from tokenizers import pre_tokenizers

        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(bytes([0xC3, byte]).decode())
        return self._library.token_to_id(spelled[0][0][1])


class SentencePieceLibrary:
    """`sentencepiece` and a directory's tokenizer.model.

    The library shows no control token and takes no id outside of its vocabulary. Without these, its decode is the definition;
    where special tokens are shown, they stand between what it makes of the rest.
    """

    def __init__(self, directory: Path):
        import sentencepiece

        self._library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        self.num_ids = self._library.vocab_size()
        self.special = frozenset(
            i for i in range(self.num_ids) if self._library.is_control(i) or self._library.is_unknown(i)
        )
        self.added = sorted(self.special)
        byte_ids = [i for i in range(self.num_ids) if self._library.is_byte(i)]
        self.broken = byte_ids[0x80:]
        self.second_bytes = [byte_ids[byte] for byte in SECOND_BYTES] if byte_ids else []
        self._letter = self._library.piece_to_id("x")

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text)

    def expected(self, ids: Sequence[int], skip: bool) -> tuple[str, bool]:
        """The text, and whether it is the library's own, word for word."""
        ids = [i for i in ids if i < self.num_ids and not (skip and i in self.special)]
        text = ""
        for is_special, group in groupby(ids, self.special.__contains__):
            part = list(group)
            if is_special:
                text += "".join(map(self._library.id_to_piece, part))
            else:
                text += self._library.decode([self._letter, *part])[1:] if text else self._library.decode(part)
        return text, True


def library_of(directory: Path) -> JsonLibrary | SentencePieceLibrary:
    """The library that reads what the directory has."""
    return (JsonLibrary if (directory / "tokenizer.json").is_file() else SentencePieceLibrary)(directory)


def settled(library: JsonLibrary | SentencePieceLibrary, ids: Sequence[int], skip: bool) -> str:
    """The text of a prefix, less what a continuation could still make a character of: what a stream must have sent, exactly."""
    text, _ = library.expected(ids, skip)
    num_broken = text.count(REPLACEMENT)
    if not text.endswith(REPLACEMENT) or not library.second_bytes:
        return text
    for second in library.second_bytes:
        for num_more in range(3):
            longer, _ = library.expected([*ids, second, *[library.second_bytes[0]] * num_more], skip)
            if longer.count(REPLACEMENT) < num_broken:
                return text[: len(longer) - 1]
    return text


def random_stream(seed: int, library: JsonLibrary | SentencePieceLibrary) -> list[int]:
    """Ids of many scripts, cut anywhere, among special and added tokens, broken bytes, and ids outside of the vocabulary."""
    rng = random.Random(seed)
    ids: list[int] = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.random()
        if kind < 0.55:
            snippet = library.encode(rng.choice(SNIPPETS))
            start = rng.randrange(len(snippet))
            ids += snippet[start : start + rng.randint(1, 8)]
        elif kind < 0.7 and library.broken:
            ids += rng.choices(library.broken, k=rng.randint(1, 4))
        elif kind < 0.8:
            ids.append(rng.choice(library.added))
        elif kind < 0.95:
            ids.append(rng.randrange(library.num_ids))
        else:
            ids.append(rng.choice([library.num_ids + 1000, 0, library.num_ids - 1, 2**31 - 1]))
    return ids


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_streamed_is_unstreamed_is_the_library(flavour, tokenizers_by_flavour, model_directories):
    tokenizer: Tokenizer = tokenizers_by_flavour[flavour]
    library = library_of(model_directories[flavour])
    num_literal = num_broken = 0
    for seed in range(NUM_STREAMS):
        ids, skip = random_stream(seed, library), bool(seed % 2)
        text, is_literal = library.expected(ids, skip)
        stream = TextStream(tokenizer, (), skip_special_tokens=skip)
        deltas = [stream.push(i) for i in ids]
        assert "".join(deltas) + stream.finish() == text, (seed, ids)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text, (seed, ids)
        num_literal += is_literal
        num_broken += REPLACEMENT in text
    assert num_literal > NUM_STREAMS / 2, "the library's own decode is what most streams are compared with"
    assert num_broken > 0.2 * NUM_STREAMS or not library.broken, "and many have invalid bytes"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_sent_early_nor_kept_too_long(flavour, tokenizers_by_flavour, model_directories):
    """At each token: all that no continuation can change, and nothing else; so no U+FFFD for a character on its way.

    A broken byte may wait for the next token (CPython's decoder keeps the start of a surrogate); a character may not.
    """
    tokenizer: Tokenizer = tokenizers_by_flavour[flavour]
    library = library_of(model_directories[flavour])
    for seed in range(NUM_STREAMS, NUM_STREAMS + 300):
        ids, skip = random_stream(seed, library), bool(seed % 2)
        stream = TextStream(tokenizer, (), skip_special_tokens=skip)
        sent = ""
        for n, token_id in enumerate(ids, 1):
            sent += stream.push(token_id)
            certain = settled(library, ids[:n], skip)
            assert certain.startswith(sent), (seed, ids[:n])
            assert certain[len(sent) :] in ("", REPLACEMENT, 2 * REPLACEMENT), (seed, ids[:n])
