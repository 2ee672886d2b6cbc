"""One compiler and sampler a tokenizer."""

import json

import pytest

from jaxserve.model_source import EMBEDDED
from jaxserve.structured.compiler import GrammarCompiler, GrammarLimits
from jaxserve.testing.constrained_sampler import ConstrainedSampler
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.loading import load_tokenizer

PATIENT = GrammarLimits(deadline_s=60.0)
"""The machine that runs the tests may have other things to do."""

NUM_PADDING = 37
"""Tokens of the model that the tokenizer does not know."""


def write_byte_level(directory):
    """A byte-level BPE of a few hundred tokens, GPT-2's kind, with a special token in the middle of a text's own bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(['{"name": "Zoë", "ages": [1, 22, 333], "ok": true}'] * 40, trainer)
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def tokenizers_by_name(tmp_path_factory):
    return {
        "embedded": load_tokenizer(EMBEDDED),
        "byte_level": write_byte_level(tmp_path_factory.mktemp("byte_level")),
        "ascii": AsciiTokenizer(),
    }


@pytest.fixture(scope="session")
def samplers(tokenizers_by_name):
    return {name: sampler_of(tokenizer) for name, tokenizer in tokenizers_by_name.items()}


def sampler_of(tokenizer) -> ConstrainedSampler:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_PADDING, tokenizer.eos_token_ids, PATIENT)
    return ConstrainedSampler(tokenizer, compiler)


@pytest.fixture(params=["embedded", "byte_level"])
def sampler(request, samplers):
    return samplers[request.param]


@pytest.fixture
def ascii_sampler(samplers):
    return samplers["ascii"]


@pytest.fixture
def embedded_sampler(samplers):
    return samplers["embedded"]


@pytest.fixture(scope="session")
def make_sampler():
    """Makes one for a tokenizer of the test's own."""
    return sampler_of
