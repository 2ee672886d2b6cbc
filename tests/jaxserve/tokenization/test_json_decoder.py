"""Decoders as tokenizer.json may have them: each is read as the library runs it, or refused by name at load."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from jaxserve.errors import CheckpointError
from jaxserve.tokenization.loading import load_tokenizer

FUSE, BYTE_FALLBACK, BYTE_LEVEL = (
    {"type": "Fuse"},
    {"type": "ByteFallback"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
)
FALLBACK_JOINED = [BYTE_FALLBACK, FUSE]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def strip(content: str, start: int, stop: int) -> dict:
    return {"type": "Strip", "content": content, "start": start, "stop": stop}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "decoders": list(steps)}


def write_with_decoder(source: Path, target: Path, decoder: dict | None) -> None:
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8")) | {"decoder": decoder}
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        FUSE,
        METASPACE,
        METASPACE | {"prepend_scheme": "never"},
        METASPACE | {"prepend_scheme": "first", "split": False},
        sequence(METASPACE, FUSE),
        sequence(BYTE_FALLBACK, METASPACE),
        sequence(replace("▁", " "), *FALLBACK_JOINED),
        sequence(replace("▁", " "), *FALLBACK_JOINED, strip(" ", 1, 0)),
        sequence(sequence(replace("▁", " ")), sequence(FUSE, strip(" ", 1, 0))),
        sequence(FUSE, replace("▁", " ")),
        sequence(replace("▁", " "), strip(" ", 1, 0)),
        sequence(strip("o", 2, 0), FUSE),
        sequence(replace("th", "TH"), replace("▁", "")),
        BYTE_LEVEL,
        sequence(BYTE_LEVEL, strip(" ", 1, 0)),
    ],
    ids=repr,
)
def test_is_read_as_the_library_runs_it(decoder, model_directories, tmp_path):
    write_with_decoder(model_directories["llama_json"], tmp_path, decoder)
    tokenizer = load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    ascii_bytes = range(3 + 0x20, 3 + 0x7F)
    words = [*range(3), *ascii_bytes, *range(3 + 256, tokenizer.vocab_size)]
    for _ in range(100):
        ids = rng.choices(words, k=rng.randint(1, 8))
        for skip in (True, False):
            stream = tokenizer.new_stream((), skip_special_tokens=skip)
            streamed = "".join([stream.push_one(i) for i in ids]) + stream.flush()
            assert streamed == library.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize(
    ("decoder", "step"),
    [
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "BPEDecoder"),
        ({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}, "CTC"),
        ({"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}, "Regex"),
        (sequence(FUSE, replace("th", "TH")), "'th'"),
        (sequence(FUSE, strip(" ", 2, 0)), "'start': 2"),
        (sequence(FUSE, strip(" ", 0, 1)), "'stop': 1"),
        (sequence(strip(" ", 1, 1), FUSE), "'stop': 1"),
        (sequence(FUSE, strip("x", 1, 0)), "'content': 'x'"),
        (sequence(FUSE, strip(" ", 1, 0), strip(" ", 1, 0)), "Strip"),
        (sequence(METASPACE, FUSE, strip(" ", 1, 0)), "Strip"),
        (sequence(BYTE_FALLBACK, strip(" ", 1, 0)), "Strip"),
        (sequence(FUSE, METASPACE), "Metaspace"),
        (sequence(METASPACE, METASPACE), "Metaspace"),
        (sequence(FUSE, BYTE_FALLBACK), "ByteFallback"),
        (sequence(FUSE, BYTE_LEVEL), "ByteLevel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_streamed_is_refused_by_name(decoder, step, model_directories, tmp_path):
    write_with_decoder(model_directories["llama_json"], tmp_path, decoder)
    with pytest.raises(
        CheckpointError, match=rf"tokenizer.json: decoder .*{step}.* cannot be streamed. Decoders known here: Byte"
    ):
        load_tokenizer(tmp_path)


def test_a_library_that_decodes_otherwise_is_found_out_at_load(model_directories, tmp_path, monkeypatch):
    """What is inferred from the file is compared with the library, should a version of it ever mean something else."""
    write_with_decoder(model_directories["llama_json"], tmp_path, sequence(replace("▁", " "), FUSE))
    monkeypatch.setattr("jaxserve.tokenization.json_decoder._replacer", lambda old, new: lambda token: token)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: its decoder does more than to join .* read ' .* gives '▁"):
        load_tokenizer(tmp_path)
