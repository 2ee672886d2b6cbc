"""Which tokenizer a model directory asks for.

Knows file names, not formats: tokenizer.json is read by `tokenizer_json`, tokenizer.model by `sentencepiece_model`,
both imported when they are needed, so that importing this module costs milliseconds.
"""

from pathlib import Path

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.tokenizer import Tokenizer
from jaxserve.tokenization.tokenizer_files import TokenizerFiles


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
