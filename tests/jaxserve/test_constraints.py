"""AllOf: what each of several constraints allows."""

import numpy as np

from jaxserve.constraints import AllOf


class Never:
    """Forbids one token until it was told of another one."""

    def __init__(self, token_id, until):
        self.token_id, self.until, self.prompts = token_id, until, []

    def start(self, prompt_token_ids):
        self.prompts.append(prompt_token_ids)
        return State(self.token_id, self.until)


class State:
    def __init__(self, token_id, until):
        self.token_id, self.until, self.is_over = token_id, until, False

    def restrict(self, words):
        if not self.is_over:
            words[self.token_id // 32] &= np.uint32(~np.uint32(1 << self.token_id % 32))

    def accept(self, token_id):
        self.is_over |= token_id == self.until


def allowed(state):
    words = np.full(2, 0xFFFFFFFF, np.uint32)
    state.restrict(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_each_constraint_counts_and_hears_of_each_token():
    constraints = Never(3, until=7), Never(40, until=8)
    both = AllOf(constraints)
    state, other = both.start((1, 2)), both.start((5,))
    assert [c.prompts for c in constraints] == [[(1, 2), (5,)]] * 2
    everything = set(range(64))
    assert allowed(state) == everything - {3, 40}
    state.accept(7)
    assert allowed(state) == everything - {40}
    state.accept(8)
    assert allowed(state) == everything
    assert allowed(other) == everything - {3, 40}, "completions share nothing"
