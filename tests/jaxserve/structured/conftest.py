"""One compiler a tokenizer, and a way to sample without a model: uniformly among what is allowed, in a hurry to end."""

import json
import random

import numpy as np
import pytest

from jaxserve.model_source import EMBEDDED
from jaxserve.structured.compiler import GrammarCompiler, GrammarLimits
from jaxserve.structured.constraint import CompiledConstraint
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.loading import load_tokenizer

PATIENT = GrammarLimits(deadline_s=60.0)
"""The machine that runs the tests may have other things to do."""

PROMPT = (5, 6, 7)
NUM_PADDING = 37


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
def compilers(tokenizers_by_name):
    return {
        name: GrammarCompiler(tokenizer, tokenizer.vocab_size + NUM_PADDING, tokenizer.eos_token_ids, PATIENT)
        for name, tokenizer in tokenizers_by_name.items()
    }


class Sampler:
    """Draws completions through the masks of one tokenizer's compiler."""

    def __init__(self, tokenizer, compiler: GrammarCompiler):
        self.tokenizer = tokenizer
        self.compiler = compiler
        self.eos = tokenizer.eos_token_ids[0]

    def all_words(self) -> np.ndarray:
        return np.full(-(-(self.tokenizer.vocab_size + NUM_PADDING) // 32), 0xFFFFFFFF, np.uint32)

    def allowed(self, state) -> np.ndarray:
        words = self.all_words()
        state.restrict(words)
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))

    def draw(self, constraint: CompiledConstraint, seed: int, max_tokens: int = 400) -> tuple[list[int], bool]:
        """Token ids without the end, and whether it was reached. The longer it gets, the more it wants to end."""
        rng = random.Random(seed)
        state = constraint.start(PROMPT)
        drawn = []
        for n in range(max_tokens):
            allowed = self.allowed(state)
            if self.eos in allowed and rng.random() < 0.1 + n / max_tokens:
                state.accept(self.eos)
                return drawn, True
            token_id = self._pick(rng, allowed, n)
            state.accept(token_id)
            drawn.append(token_id)
        return drawn, self.eos in self.allowed(state)

    def _pick(self, rng, allowed, n: int) -> int:
        """Anything at first; later on mostly what closes strings, arrays and objects, which is short."""
        candidates = [int(i) for i in allowed if i != self.eos] or [self.eos]
        if rng.random() < min(0.95, n / 20):
            closing = [i for i in candidates if self.tokenizer.token_bytes(i) in (b'"', b"]", b"}", b'"}', b'"]', b"]}")]
            candidates = closing or candidates
        return rng.choice(candidates)

    def texts(self, constraint: CompiledConstraint, num: int, max_tokens: int = 400) -> list[str]:
        """Of as many draws, those that ended by the grammar."""
        drawn = (self.draw(constraint, seed, max_tokens) for seed in range(num))
        return [self.tokenizer.new_stream(PROMPT).push(ids) for ids, is_whole in drawn if is_whole]


@pytest.fixture(params=["embedded", "byte_level"])
def sampler(request, tokenizers_by_name, compilers):
    return Sampler(tokenizers_by_name[request.param], compilers[request.param])


@pytest.fixture
def ascii_sampler(tokenizers_by_name, compilers):
    return Sampler(tokenizers_by_name["ascii"], compilers["ascii"])


@pytest.fixture
def embedded_sampler(tokenizers_by_name, compilers):
    return Sampler(tokenizers_by_name["embedded"], compilers["embedded"])
