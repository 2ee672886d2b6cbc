"""Each row's own parameters reach the head, nothing of a former owner does, and a mask has a bit a token."""

import jax
import numpy as np
import pytest

from jaxserve.execution.logits import PROCESSED, RAW
from jaxserve.execution.row_state import ADMISSION_TOKENS, RowState, admit
from jaxserve.execution.row_table import RowTable, admission_layout, admission_parts, head_layout, unpack_admission
from jaxserve.plan import Admission, RowSampling, SequencePlan
from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS
from jaxserve.testing.fake_runner import toy_config

PROCESSORS = (("scale", 2), ("ban", 0))
CONFIG = toy_config(max_num_seqs=4, vocab_size=70, logits_processors=PROCESSORS)
PLAIN = RowSampling(0.0, 0, 1.0, 0.0, (5, 6))


def sequence(row, start=0, num_tokens=1, **more):
    return SequencePlan(f"r{row}", row, start, num_tokens, (), samples=True, **more)


def head_views():
    layout = head_layout(4, dict(PROCESSORS))
    return layout.host_views(np.full(layout.size, 99, np.int32))


def test_the_head_gets_each_rows_own_parameters():
    table = RowTable(CONFIG)
    table.admit(Admission(1, "r1", RowSampling(0.5, 7, 0.9, 0.1, (11, 2**32 - 1), 1.5, -1.0, 2.0, ((3, 4.0),))))
    table.admit(Admission(3, "r3", PLAIN._replace(logprob_token_ids=(8,), processors=(("scale", (0.25, 2.0)),))))
    views = head_views()
    group = [sequence(3, 8, num_logprobs=0), sequence(1, 2, 4, num_logprobs=3, is_processed=True)]
    table.pack_head(group, views, masked=[1])
    assert views["rows_S"].tolist() == [3, 1, 4, 4]
    assert views["positions_S"][:2].tolist() == [9, 6]
    np.testing.assert_allclose(views["temperature_S"], [0.0, 0.5, 0.0, 0.0])
    assert views["top_k_S"][:2].tolist() == [0, 7]
    assert views["keys_S2"][:2].tolist() == [[5, 6], [11, 2**32 - 1]]
    assert views["logprobs_S"].tolist() == [RAW, PROCESSED, 0, 0]
    assert views["is_masked_S"].tolist() == [0, 1, 0, 0]
    assert views["repetition_S"].tolist() == [1.0, 1.5, 1.0, 1.0]
    assert views["frequency_S"].tolist() == [0.0, -1.0, 0.0, 0.0]
    assert views["presence_S"].tolist() == [0.0, 2.0, 0.0, 0.0]
    assert views["has_bias_S"].tolist() == [0, 1, 0, 0]
    assert views["picks_S"].tolist() == [1, 0, 0, 0]
    assert views["scale is on"].tolist() == [1, 0, 0, 0]
    assert views["scale parameters"][0].tolist() == [0.25, 2.0]
    assert views["ban is on"].tolist() == [0, 0, 0, 0]
    assert table.picked_ids(3) == (8,)


def test_a_row_forgets_its_former_owner():
    table = RowTable(CONFIG)
    table.admit(Admission(2, "a", PLAIN._replace(allowed_token_ids=(1,), logprob_token_ids=(8,), processors=(("ban", ()),))))
    table.admit(Admission(2, "b", PLAIN))
    views = head_views()
    table.pack_head([sequence(2)], views)
    assert views["ban is on"].tolist() == views["picks_S"].tolist() == [0, 0, 0, 0]
    assert table.pack_allowed([sequence(2)], 2, {}) is None
    assert table.picked_ids(2) == ()


def forbidden(words):
    return [[token for token in range(70) if not row[token // 32] >> (token % 32) & 1] for row in words]


def test_the_mask_has_a_bit_a_token():
    """Whitelist, stop tokens that come too early and a grammar: what one of them forbids is forbidden."""
    table = RowTable(CONFIG)
    table.admit(Admission(1, "r1", PLAIN._replace(allowed_token_ids=tuple(range(1, 69)))))
    assert table.pack_allowed([sequence(0)], 2, {}) is None
    grammar = np.full(3, 0xFFFFFFFF, np.uint32)
    grammar[1] &= ~np.uint32(1 << 3)
    group = [sequence(0), sequence(1, forbidden=(0, 33)), sequence(2)]
    words, masked = table.pack_allowed(group, 4, {"r1": grammar, "r2": grammar})
    assert forbidden(words) == [[], [0, 33, 35, 69], [35], []]
    assert masked == [1, 2]


def test_min_tokens_yield_to_a_form_that_is_complete():
    """Where nothing but the end is left, it comes, however early."""
    end_alone = np.zeros(3, np.uint32)
    end_alone[0] = 1 << 7
    group = [sequence(0, forbidden=(7, 33)), sequence(1, forbidden=(7, 33))]
    words, masked = RowTable(CONFIG).pack_allowed(group, 2, {"r1": end_alone})
    assert forbidden(words) == [[7, 33], [i for i in range(70) if i != 7]]
    assert masked == [0, 1]


@pytest.mark.parametrize("num_prompt", [0, 5, ADMISSION_TOKENS + 7])
def test_an_admission_counts_every_token(num_prompt):
    """However many calls a prompt takes: 1 for a token of the prompt, 2 more for each time in the output."""
    generator = np.random.default_rng(num_prompt)
    prompt = tuple(generator.integers(0, 60, num_prompt).tolist())
    output = tuple(generator.integers(10, 70, 2 * ADMISSION_TOKENS - 3).tolist())
    sampling = PLAIN._replace(repetition_penalty=2.0, logit_bias=((4, 1.5), (69, -2.0)), logprob_token_ids=(7, 9))
    layout = admission_layout()
    sizes = (70, MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS)
    dtypes = (np.int32, np.int32, np.float32, np.int32)
    state = RowState(*(np.full((4, size), 77, dtype) for size, dtype in zip(sizes, dtypes, strict=True)))
    write = jax.jit(lambda state, buffer: admit(state, unpack_admission(layout, buffer)))
    for parts in admission_parts(Admission(2, "r2", sampling, prompt, output), 70):
        buffer = np.zeros(layout.size, np.int32)
        views = layout.host_views(buffer)
        for name, value in parts.items():
            views[name][...] = value
        state = write(state, buffer)
    state = jax.tree.map(np.asarray, state)
    expected = 2 * np.bincount(output, minlength=70) + np.isin(np.arange(70), prompt)
    np.testing.assert_array_equal(state.counts_RV[2], expected)
    assert state.bias_ids_RB[2, :3].tolist() == [4, 69, 70]
    assert state.bias_values_RB[2, :3].tolist() == [1.5, -2.0, 0.0]
    assert state.picked_ids_RI[2, :3].tolist() == [7, 9, 70]
    for leaf in jax.tree.leaves(state):
        assert (leaf[[0, 1, 3]] == 77).all(), "other rows are left alone"


def test_who_uses_nothing_of_it_is_not_told():
    assert list(admission_parts(Admission(2, "r2", PLAIN), 70)) == []
