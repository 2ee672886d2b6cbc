"""The tests' own material: the same bits each time, loadable by the libraries that define the formats."""

import json

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING, TinyLlama, write_tiny_llama


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    one = write_tiny_llama(tmp_path / "one", tokenizer="bytes")
    other = write_tiny_llama(tmp_path / "other", tokenizer="bytes")
    different = write_tiny_llama(tmp_path / "different", seed=1)
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    assert (one / "model.safetensors").read_bytes() != (different / "model.safetensors").read_bytes()


def test_shards_hold_the_tensors_of_the_single_file(tmp_path):
    whole = load_file(write_tiny_llama(tmp_path / "whole", dtype="bfloat16") / "model.safetensors")
    cut = write_tiny_llama(tmp_path / "cut", dtype="bfloat16", num_shards=3)
    weight_map = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    for name, tensor in whole.items():
        assert np.array_equal(load_file(cut / weight_map[name])[name], tensor)


def test_scales_are_those_that_make_tokens_diverse():
    tensors = TinyLlama(hidden_size=256, vocab_size=1000).tensors()
    assert np.std(tensors["model.embed_tokens.weight"]) == pytest.approx(0.4, rel=0.02)
    assert np.std(tensors["lm_head.weight"]) == pytest.approx(2.5 / 16, rel=0.02)
    assert np.mean(tensors["model.norm.weight"]) == pytest.approx(1, abs=0.05)


def test_tied_models_have_no_head_and_rope_scaling_is_written():
    model = TinyLlama(is_tied=True, rope_scaling=LLAMA3_ROPE_SCALING)
    assert "lm_head.weight" not in model.tensors()
    assert model.config()["tie_word_embeddings"] is True
    assert model.config()["rope_scaling"]["rope_type"] == "llama3"


def test_tokenizers_load_and_stay_within_the_vocabulary(tmp_path):
    path = write_tiny_llama(tmp_path / "bytes", tokenizer="bytes", vocab_size=320)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = tokenizer.encode("a page holds Zürich 🙂").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a page holds Zürich 🙂"
    assert tokenizer.get_vocab_size() <= 320
    path = write_tiny_llama(tmp_path / "pieces", tokenizer="sentencepiece", vocab_size=320)
    pieces = sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))
    assert pieces.decode(pieces.encode("a page holds Zürich 🙂")) == "a page holds Zürich 🙂"
    assert pieces.vocab_size() <= 320
