"""The tokenizer interface, and which implementation a model directory asks for.

Knows file names, not formats: tokenizer.json is read by `tokenizer_json`, tokenizer.model by `sentencepiece_model`,
both imported when they are needed, so that importing this module costs milliseconds. Tokenizers hold no request's state
and may be used from any thread; encoding releases the GIL.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.detokenizer import DetokenizerStream
from jaxserve.tokenization.tokenizer_files import TokenizerFiles

__all__ = ["AsciiTokenizer", "Tokenizer", "load_tokenizer"]


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


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Loads a model directory's tokenizer.

    tokenizer.json is preferred to tokenizer.model. The toy model has neither: its tokenizer_config.json says
    `"tokenizer_class": "AsciiTokenizer"`, or its config.json `"model_type": "toy"`.

    Raises:
        CheckpointError: there is no tokenizer, or its file is damaged or of a kind that cannot be decoded.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"tokenizer: {directory} is not a directory. Pass the directory of a model.")
    files = TokenizerFiles.read(directory)
    if (path := directory / "tokenizer.json").is_file():
        from jaxserve.tokenization.tokenizer_json import JsonTokenizer

        return JsonTokenizer(path, files)
    if (path := directory / "tokenizer.model").is_file():
        from jaxserve.tokenization.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(path, files)
    if files.tokenizer_class == AsciiTokenizer.__name__ or files.model_type == "toy":
        return AsciiTokenizer(files.chat_template)
    raise CheckpointError(
        f"{directory} holds neither tokenizer.json nor tokenizer.model. Copy one of them from the model's repository,"
        " or run with token ids and without a tokenizer."
    )
