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
SP_FLAVOURS = ("llama_sp", "bare_sp", "squeezing_sp", "unigram_sp")
JSON_FLAVOURS = ("byte_level", "qwen_json", "llama_json", "gemma_json", "t5_json", "metaspace_json", "phrase_json")
FLAVOURS = (*SP_FLAVOURS, *JSON_FLAVOURS, "ascii")


def train_sentencepiece(path: Path, **options) -> None:
    """A byte-fallback BPE model of about 400 pieces, unless the options say otherwise."""
    import sentencepiece

    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    path.write_bytes(model.getvalue())


def write_json(path: Path, content: object) -> None:
    """A side file of a model directory."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write_byte_level(directory: Path) -> None:
    """GPT-2's and Llama 3's kind: bytes as characters, bos by post-processor, two ends."""
    from tokenizers import AddedToken, processors

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    library = train_byte_level(special)
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


def write_qwen(directory: Path) -> None:
    """Qwen's kind: bytes as characters, NFC, no bos, and many added tokens, special and not, at the end of the vocabulary.

    Two of them are spelled outside of the byte alphabet (DeepSeek's bars, spaces), and one inside of it, but not in ASCII.
    """
    from tokenizers import AddedToken, normalizers

    library = train_byte_level([])
    library.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|vision pad|>", "<|é|>"]
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim ¦ prefix|>"]
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    library.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False})


def train_byte_level(special: list[str]):
    """A byte-level BPE with all 256 bytes."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library


def write_spaced_json(directory: Path, kind: str) -> None:
    """A tokenizer.json with `▁` for a space.

    Args:
        directory: where to.
        kind: "llama" (Prepend and Strip, byte fallback; Llama 2, Mistral), "gemma" (no prefix, byte fallback), "t5" (unigram,
            Metaspace), "metaspace" (BPE, Metaspace that splits nothing) or "phrase" (Metaspace before the first word alone).
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    special = ["<unk>", "<s>", "</s>"]
    has_bytes = kind in ("llama", "gemma")
    if kind == "t5":
        library = LibraryTokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:
        library = LibraryTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        # The trainer has no other way to take bytes in; made plain again below.
        taken = special + BYTE_TOKENS * has_bytes
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=taken, show_progress=False, max_token_length=8)
    if has_bytes:
        prepend = [normalizers.Prepend("▁")] * (kind == "llama")
        library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        library.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (kind == "llama"))
    else:
        scheme = {"split": kind != "metaspace", "prepend_scheme": "first" if kind == "phrase" else "always"}
        library.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
        library.decoder = decoders.Metaspace(**scheme)
    library.train_from_iterator(CORPUS, trainer)
    content = json.loads(library.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in BYTE_TOKENS]
    library = LibraryTokenizer.from_str(json.dumps(content))
    library.add_special_tokens([AddedToken(text, normalized=False) for text in special])
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
            train_sentencepiece(directory / "tokenizer.model", user_defined_symbols=["<sep>", "▁▁"])
        elif flavour == "unigram_sp":
            unigram = {"model_type": "unigram", "byte_fallback": False, "vocab_size": 150}
            train_sentencepiece(directory / "tokenizer.model", **unigram)
        elif flavour == "byte_level":
            write_byte_level(directory)
        elif flavour == "qwen_json":
            write_qwen(directory)
        elif flavour.endswith("_json"):
            write_spaced_json(directory, flavour.removesuffix("_json"))
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
