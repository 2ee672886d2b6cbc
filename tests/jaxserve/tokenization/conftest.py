"""Small real tokenizers, trained here in a second: no file of a model is needed.

Each is written as a model directory and loaded by `load_tokenizer`, so that what the tests see is what a user gets.
"""

import io
import json
from pathlib import Path

import pytest

from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.loading import load_tokenizer
from jaxserve.tokenization.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Hello world, hello there: how are you today?",
    "lorem ipsum dolor sit amet, consectetur adipiscing elit",
    "def main(args):\n    return [x for x in args if x > 10]",
    "Zürich café naïve façade 中文 字符 日本語 🌶️ 🎉",
] * 40
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]
FLAVOURS = ("llama_sp", "bare_sp", "squeezing_sp", "byte_level", "llama_json", "metaspace_json", "ascii")


def train_sentencepiece(path: Path, **options) -> None:
    """A byte-fallback BPE model of about 400 pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path.write_bytes(model.getvalue())


def write_json(path: Path, content: object) -> None:
    """A side file of a model directory."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write_byte_level(directory: Path) -> None:
    """GPT-2's and Llama 3's kind: bytes as characters, bos by post-processor, two ends."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    library.enable_truncation(4)  # as some published files have it: must be switched off
    library.enable_padding(length=64)
    library.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    write_json(directory / "generation_config.json", {"eos_token_id": [1, 2]})
    write_json(directory / "config.json", {"eos_token_id": 2, "bos_token_id": 0})


def write_spaced_json(directory: Path, *, metaspace: bool) -> None:
    """Llama 2's kind of tokenizer.json (Replace, ByteFallback, Fuse, Strip), or T5's (Metaspace)."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special = ["<unk>", "<s>", "</s>"]
    if metaspace:
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Metaspace()
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        library.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
        special += BYTE_TOKENS  # the trainer has no other way to take them in; made plain again below
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=8)
    library.train_from_iterator(CORPUS, trainer)
    content = json.loads(library.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in BYTE_TOKENS]
    library = LibraryTokenizer.from_str(json.dumps(content))
    library.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True},
    )


@pytest.fixture(scope="session")
def model_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory a flavour (the toy has no files)."""
    found = {}
    for flavour in FLAVOURS:
        directory = tmp_path_factory.mktemp(flavour)
        found[flavour] = directory
        if flavour == "llama_sp":
            train_sentencepiece(directory / "tokenizer.model", add_dummy_prefix=True, remove_extra_whitespaces=False)
            write_json(directory / "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False})
        elif flavour == "bare_sp":
            train_sentencepiece(directory / "tokenizer.model", add_dummy_prefix=False, remove_extra_whitespaces=False)
            write_json(directory / "tokenizer_config.json", {"add_bos_token": False})
        elif flavour == "squeezing_sp":
            train_sentencepiece(directory / "tokenizer.model", user_defined_symbols=["<sep>"])
        elif flavour == "byte_level":
            write_byte_level(directory)
        elif flavour in ("llama_json", "metaspace_json"):
            write_spaced_json(directory, metaspace=flavour == "metaspace_json")
        else:
            write_json(directory / "config.json", {"model_type": "toy"})
    return found


@pytest.fixture(scope="session")
def tokenizers_by_flavour(model_directories: dict[str, Path]) -> dict[str, Tokenizer]:
    """Each flavour, loaded."""
    loaded = {flavour: load_tokenizer(directory) for flavour, directory in model_directories.items()}
    assert isinstance(loaded["ascii"], AsciiTokenizer)
    return loaded


@pytest.fixture(params=FLAVOURS)
def tokenizer(request: pytest.FixtureRequest, tokenizers_by_flavour: dict[str, Tokenizer]) -> Tokenizer:
    """Each flavour in turn."""
    return tokenizers_by_flavour[request.param]
