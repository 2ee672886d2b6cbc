"""Rows restricted together are what they are alone."""

import numpy as np

from jaxserve.structured.all_of import AllOf
from jaxserve.structured.bad_words import BadWords
from jaxserve.structured.compiled_grammar import compute_masks
from jaxserve.structured.rows import restrict_rows
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.testing.constrained_sampler import PROMPT


def test_rows_together_are_rows_alone(ascii_sampler):
    sampler = ascii_sampler
    plain = sampler.compiler.compile(StructuredOutputsParams(json_object=True))
    both = AllOf((sampler.compiler.compile(StructuredOutputsParams(regex="[a-d]+")), BadWords(((ord("b"),),))))
    dead = sampler.compiler.compile(StructuredOutputsParams(choice=["aé"]))
    compiled = {0: plain, 2: both, 3: BadWords(((5,),)), 4: dead, 6: both}

    def start(row):
        return compiled[row].start(PROMPT, {4: b"a", 6: b"acd"}.get(row, b""))

    states = {row: start(row) for row in compiled}
    for step in range(3):
        words = np.stack([sampler.all_words()] * 8)
        failed = restrict_rows(states, words)
        assert list(failed) == ([4] if 4 in states else [])
        states.pop(4, None)
        for row in range(8):
            expected = sampler.all_words()
            if row in states:
                alone = start(row)
                for byte in b"{}"[:step] if row == 0 else b"aa"[:step]:
                    alone.accept(byte)
                alone.restrict(expected)
            if row != 4:
                np.testing.assert_array_equal(words[row], expected, err_msg=f"row {row}, step {step}")
        for row, state in states.items():
            state.accept((b"{}" if row == 0 else b"aa")[step] if step < 2 else 0)


def test_a_mask_that_was_computed_ahead_is_forgotten_by_a_token(ascii_sampler):
    compiled = ascii_sampler.compiler.compile(StructuredOutputsParams(regex="ab"))
    states = [compiled.start(PROMPT), compiled.start(PROMPT)]
    compute_masks(states)
    states[0].accept(ord("a"))
    assert [chr(i) for state in states for i in ascii_sampler.allowed(state)] == ["b", "a"]
