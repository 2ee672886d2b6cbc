"""Loading, encoding and decoding, each flavour against the library that defines it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.loading import load_tokenizer
from jaxserve.tokenization.piece_tokenizer import GUARD
from jaxserve.tokenization.tokenizer import Tokenizer

# The tokenizer fixtures live for the whole session and hold no state, so sharing them between examples is safe.
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=16)
JSON_FLAVOURS = ("byte_level", "llama_json", "metaspace_json")
SP_FLAVOURS = ("llama_sp", "squeezing_sp")


def library_json(directory: Path):
    """HF's own tokenizer of a directory."""
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def library_sp(directory: Path):
    """SentencePiece's own processor of a directory."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.mark.parametrize("flavour", JSON_FLAVOURS)
@PROPERTY
@given(text=TEXT)
def test_json_encodes_and_decodes_as_the_library(flavour, text, tokenizers_by_flavour, model_directories):
    tokenizer, library = tokenizers_by_flavour[flavour], library_json(model_directories[flavour])
    library.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    if flavour != "metaspace_json":  # HF drops *all* spaces of a first token, so that its own round trip loses some
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("flavour", JSON_FLAVOURS)
@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_json_decodes_any_whole_tokens_as_the_library(flavour, data, skip, tokenizers_by_flavour, model_directories):
    """Any ids at all for ByteLevel; without byte tokens elsewhere, where HF takes whole runs of them for broken."""
    tokenizer, library = tokenizers_by_flavour[flavour], library_json(model_directories[flavour])
    allowed = [
        i
        for i in range(tokenizer.vocab_size)
        if flavour == "byte_level" or not (tokenizer.token_text(i) == "\ufffd" or "  " in tokenizer.token_text(i))
    ]
    ids = data.draw(st.lists(st.sampled_from(allowed), max_size=10))
    assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("flavour", SP_FLAVOURS)
@PROPERTY
@given(text=TEXT, data=st.data())
def test_sentencepiece_encodes_and_decodes_as_the_library(flavour, text, data, tokenizers_by_flavour, model_directories):
    tokenizer, library = tokenizers_by_flavour[flavour], library_sp(model_directories[flavour])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == library.encode(text)
    assert tokenizer.decode(ids) == library.decode(ids)
    first_piece = next(i for i in range(tokenizer.vocab_size) if not library.is_byte(i) and i > 2)
    pieces = [i for i in range(first_piece, tokenizer.vocab_size) if not library.is_byte(i)]
    anything = data.draw(st.lists(st.sampled_from(pieces), max_size=10))
    assert tokenizer.decode(anything) == library.decode(anything)


def test_ascii_ids_are_character_codes(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["ascii"]
    assert tokenizer.encode("Ab\n~") == [65, 98, 10, 126]
    assert tokenizer.decode([65, 98, 0, 200, 10]) == "Ab\n"
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (128, None, (0,))
    with pytest.raises(InvalidRequestError, match=r"ASCII text \(see index 1\)"):
        tokenizer.encode("aé")


@pytest.mark.parametrize("bad", ["a\ud800b", "\udfff", "a\x00b", b"bytes", None, 7])
def test_text_that_no_tokenizer_takes_names_the_prompt(tokenizer: Tokenizer, bad: object):
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.encode(bad)
    assert caught.value.parameter == "prompt"


def test_special_tokens_of_a_model(tokenizers_by_flavour: dict[str, Tokenizer]):
    byte_level = tokenizers_by_flavour["byte_level"]
    assert byte_level.bos_token_id == 0
    assert byte_level.eos_token_ids == (1, 2)  # its own, then generation_config.json's list, then config.json's
    assert byte_level.special_token_ids == {0, 1, 2, 3, 4}
    llama = tokenizers_by_flavour["llama_sp"]
    assert (llama.bos_token_id, llama.eos_token_ids, llama.special_token_ids) == (1, (2,), {0, 1, 2})


def test_bos_is_added_as_the_files_say(tokenizers_by_flavour: dict[str, Tokenizer]):
    expected = {"llama_sp": [1], "bare_sp": [], "squeezing_sp": [1], "byte_level": [0], "llama_json": [1]}
    for flavour, prefix in expected.items():
        tokenizer = tokenizers_by_flavour[flavour]
        bare = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.encode("hello") == [*prefix, *bare]


def test_explicit_settings_override_the_post_processor(model_directories: dict[str, Path], tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((model_directories["byte_level"] / "tokenizer.json").read_bytes())
    settings_file = tmp_path / "tokenizer_config.json"
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    for add_bos, add_eos in ((False, True), (True, False)):
        settings_file.write_text(json.dumps(tokens | {"add_bos_token": add_bos, "add_eos_token": add_eos}))
        tokenizer = load_tokenizer(tmp_path)
        bare = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.encode("hello") == [*([0] if add_bos else []), *bare, *([2] if add_eos else [])]


def test_every_special_token_in_user_text_stays_text(tokenizer: Tokenizer):
    for text, token_id in tokenizer.special_tokens.items():
        plain = tokenizer.encode(f"a{text}b", add_special_tokens=False)
        assert token_id not in plain or text == "<unk>"
        parsed = tokenizer.encode(f"a{text}b", add_special_tokens=False, parse_special=True)
        assert parsed.count(token_id) == 1


def test_a_special_token_that_the_model_has_a_piece_for_stays_text(tokenizers_by_flavour: dict[str, Tokenizer]):
    """A unigram model finds `</s>` in plain text by itself; the library's switch does not reach it."""
    tokenizer = tokenizers_by_flavour["t5_json"]
    for text in ("</s>", "a</s>b", "<s></s><s>", "<<s>s>", "</s" * 3 + ">"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not {1, 2} & set(ids)
    assert tokenizer.encode("a</s>", add_special_tokens=False, parse_special=True)[-1] == 2


def test_a_guard_keeps_a_special_token_text_and_vanishes(tokenizer: Tokenizer):
    text, token_id = next((t, i) for t, i in tokenizer.special_tokens.items() if t != "<unk>")
    guarded = tokenizer.encode(f"{text}ab{text[0]}{GUARD}{text[1:]}", add_special_tokens=False, parse_special=True)
    assert guarded[0] == token_id
    assert guarded[1:] == tokenizer.encode(f"ab{text}", add_special_tokens=False)


def test_tokens_added_without_being_special_are_parsed_and_shown(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["byte_level"]
    ids = tokenizer.encode("<think>a", add_special_tokens=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "<think>a"


def test_token_texts_tell_leading_spaces_apart(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["llama_sp"]
    texts = {tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    assert {" the", "the"} <= texts or {" h", "h"} <= texts
    assert "<s>" in texts
    assert tokenizer.token_text(3 + 0xE4) == "\ufffd"
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    for outside in (tokenizer.vocab_size, 10**9, -1):
        assert tokenizer.token_text(outside) == ""
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == ""


def test_sentencepiece_takes_added_tokens_from_the_configuration(model_directories: dict[str, Path], tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes((model_directories["llama_sp"] / "tokenizer.model").read_bytes())
    size = library_sp(tmp_path).vocab_size()
    added = {
        "2": {"content": "</s>", "special": True},
        str(size): {"content": "<|pad|>", "special": True},
        str(size + 2): {"content": "<tool>", "special": False},
    }
    settings_ = {"added_tokens_decoder": added, "eos_token": "<|pad|>", "bos_token": "<s>", "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (size + 3, (size,))
    assert tokenizer.encode("<tool>") == [1, size + 2, size]
    assert tokenizer.token_text(size + 1) == ""
    assert tokenizer.decode([size, size + 2, 2]) == "<tool>"
    assert tokenizer.encode("<|pad|>", parse_special=True)[1] == size
    assert size not in tokenizer.encode("<|pad|>")[:-1]


def test_tokenizer_json_is_preferred(model_directories: dict[str, Path], tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((model_directories["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    assert "<|eot_id|>" in load_tokenizer(tmp_path).special_tokens


def test_chat_templates_are_found(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    settings_file = tmp_path / "tokenizer_config.json"
    assert load_tokenizer(tmp_path).chat_template is None
    settings_file.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    assert load_tokenizer(tmp_path).chat_template == "D"
    settings_file.write_text('{"tokenizer_class": "AsciiTokenizer", "chat_template": "S"}')
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(tmp_path).chat_template == "S"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "holds neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.model", b"", "tokenizer.model is empty"),
        ("tokenizer.model", b"junk", "tokenizer.model is not a SentencePiece model"),
        ("tokenizer.json", b"", "tokenizer.json cannot be read"),
        ("tokenizer.json", b'{"version": 1}', "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json must hold a JSON object"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("generation_config.json", b'{"eos_token_id": "two"}', "generation_config.json: eos_token_id must be"),
    ],
)
def test_damaged_directories_are_named(tmp_path: Path, name: str | None, content: bytes, message: str):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_sentencepiece_model_that_rewrites_its_text_is_refused(tmp_path: Path):
    (tmp_path / "rules.tsv").write_text("74 68 65\t54 48 45\n")  # "the" becomes "THE" once everything is decoded
    rules = str(tmp_path / "rules.tsv")
    corpus = iter(["the quick brown fox jumps over the lazy dog"] * 40)
    settings_ = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    with (tmp_path / "tokenizer.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus, model_writer=writer, denormalization_rule_tsv=rules, **settings_
        )
    with pytest.raises(CheckpointError, match=r"tokenizer.model: its decoder does more than to join its tokens' texts"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_with_holes_keeps_its_last_tokens(tmp_path: Path):
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models

    library = LibraryTokenizer(models.WordLevel({"a": 0, "b": 7, "c": 1000}, unk_token="a"))
    library.decoder = decoders.Fuse()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1001
    ids = [1000, 7, 3, 0, 1001, 999]
    assert tokenizer.decode(ids) == library.decode(ids) == "cba"


def test_importing_needs_no_library():
    code = (
        "import sys; import jaxserve.tokenization.tokenizer, jaxserve.tokenization.chat_template;"
        "heavy = {'jax', 'numpy', 'tokenizers', 'sentencepiece', 'jinja2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_toy_needs_no_files():
    assert AsciiTokenizer().encode("x", parse_special=True) == [120]
