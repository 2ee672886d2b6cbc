"""Completions without a model: drawn uniformly among the tokens that a constraint allows, in a growing hurry to end."""

import random

import numpy as np

from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import CompiledConstraint, TokenConstraint
from jaxserve.tokenization.tokenizer import Tokenizer

PROMPT = (5, 6, 7)
"""Some text of every tokenizer, so that what follows is not the start of one."""


class ConstrainedSampler:
    """Draws completions through the masks of one tokenizer's compiler."""

    def __init__(self, tokenizer: Tokenizer, compiler: GrammarCompiler):
        self.tokenizer = tokenizer
        self.compiler = compiler
        self.eos = tokenizer.eos_token_ids[0]

    def all_words(self) -> np.ndarray:
        """A mask that allows everything."""
        return np.full(-(-(self.compiler.vocab_size) // 32), 0xFFFFFFFF, np.uint32)

    def allowed(self, state: TokenConstraint) -> np.ndarray:
        """The token ids that may come next."""
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

    def _pick(self, rng: random.Random, allowed: np.ndarray, n: int) -> int:
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
