"""A position's bits on a CPU: alone or in a batch, decoded or prefilled, whole or in chunks, in any bucket (DESIGN section 9)."""

import functools

import jax
import numpy as np
import pytest

from kernels_pallas.paged_attention import xla
from kernels_pallas.paged_attention.api import Tiling, default_tiling, paged_attention, plan_ragged_batch

CONTEXT_LEN, Z, NUM_ROWS = 300, 16, 3
POSITIONS = (0, 1, 63, 127, 128, 129, 255, 256, 299)
ROW = 1
# (query heads, KV heads, head_dim, features): every group from 1 on, and the smallest one that a sum can be too small for.
SHAPES = {
    "mha": (4, 4, 64, {}),
    "group-3": (6, 2, 96, {}),
    "mqa": (8, 1, 128, {}),
    "one-head": (1, 1, 32, {}),
    "window-cap-sinks": (
        6,
        2,
        64,
        {"sliding_window": 100, "soft_cap": 5.0, "sinks_N": np.linspace(-1, 1, 6, dtype=np.float32)},
    ),
}


class Layer:
    """One sequence of CONTEXT_LEN tokens in a pool with others, and programs that attend any part of it."""

    def __init__(self, shape: str, tiling: Tiling | None = None):
        N, K, H, self.features = SHAPES[shape]
        rng = np.random.default_rng(0)
        P = -(-CONTEXT_LEN // Z)
        pools = rng.standard_normal((2, NUM_ROWS * P, K, Z, H), dtype=np.float32)
        self.tables_RP = rng.permutation(NUM_ROWS * P).reshape(NUM_ROWS, P).astype(np.int32)
        self.k_pages, self.v_pages = pools
        self.q_TNH = rng.standard_normal((CONTEXT_LEN, N, H), dtype=np.float32)
        shape_of = {"num_q_heads": N, "num_kv_heads": K, "head_dim": H, "page_size": Z}
        self.tiling = default_tiling("cpu", **shape_of) if tiling is None else tiling
        self.scale = H**-0.5

    @functools.cached_property
    def program(self):
        def step(q, k_pages, v_pages, tables, batch):
            options = {"scale": self.scale, "tiling": self.tiling, "backend": "xla", **self.features}
            return paged_attention(q, k_pages, v_pages, tables, batch, **options)

        return jax.jit(step)

    def attend(self, pieces, bucket):
        """Returns the outputs of each (row, first position, last position) of one step of the bucket."""
        num_tokens, num_decode_slots, max_decode_items, max_prefill_tiles = bucket
        rows, firsts, stops = (np.array([piece[i] for piece in pieces]) for i in range(3))
        q_lens = stops - firsts
        batch = plan_ragged_batch(
            rows,
            stops,
            q_lens,
            num_seq_slots=4,
            num_decode_slots=num_decode_slots,
            max_decode_items=max_decode_items,
            max_prefill_tiles=max_prefill_tiles,
            split_size=self.tiling.split_size,
            query_tile=self.tiling.query_tile,
        )
        q_TNH = np.zeros((num_tokens, *self.q_TNH.shape[1:]), np.float32)
        used = sum(q_lens)
        q_TNH[:used] = np.concatenate([self.q_TNH[first:stop] for first, stop in zip(firsts, stops, strict=True)])
        out_TNH = np.asarray(self.program(q_TNH, self.k_pages, self.v_pages, self.tables_RP, batch))
        return np.split(out_TNH[:used], np.cumsum(q_lens)[:-1])

    @functools.cached_property
    def whole_prompt(self):
        return self.attend([(ROW, 0, CONTEXT_LEN)], PREFILL)[0]


PREFILL = (320, 0, 0, 12)
DECODE = (8, 8, 16, 0)
MIXED = (320, 4, 32, 12)


@functools.cache
def layer(shape: str) -> Layer:
    return Layer(shape)


def decode_alone(one: Layer) -> np.ndarray:
    return np.concatenate([one.attend([(ROW, p, p + 1)], DECODE)[0] for p in POSITIONS])


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_has_the_bits_of_prefill(shape):
    one = layer(shape)
    np.testing.assert_array_equal(decode_alone(one), one.whole_prompt[list(POSITIONS)])


@pytest.mark.parametrize("shape", SHAPES)
def test_company_and_bucket_change_no_bit(shape):
    """The same decode among others, and the same chunk beside decodes: another program, other blocks of items."""
    one = layer(shape)
    for p in POSITIONS[3:6]:
        _, mine, _, chunk = one.attend([(0, 200, 201), (ROW, p, p + 1), (2, 299, 300), (ROW, 37, 290)], MIXED)
        np.testing.assert_array_equal(mine[0], one.whole_prompt[p])
        np.testing.assert_array_equal(chunk, one.whole_prompt[37:290])


def test_chunks_have_the_bits_of_the_whole_prompt():
    one = layer("group-3")
    firsts = range(0, CONTEXT_LEN, 37)  # starts inside tiles, inside pages, inside splits
    chunks = [one.attend([(ROW, first, min(first + 37, CONTEXT_LEN))], PREFILL)[0] for first in firsts]
    np.testing.assert_array_equal(np.concatenate(chunks), one.whole_prompt)


def test_block_and_tile_sizes_change_no_bit():
    one = layer("mha")
    other = Layer("mha", Tiling(split_size=128, query_tile=64, decode_block=8))
    np.testing.assert_array_equal(other.attend([(ROW, 0, CONTEXT_LEN)], (320, 0, 0, 8))[0], one.whole_prompt)
    np.testing.assert_array_equal(decode_alone(other), decode_alone(one))


def test_split_size_does_change_bits():
    """The negative control: a comparison that could not tell two orders apart would prove nothing."""
    other = Layer("mha", Tiling(split_size=256, query_tile=32, decode_block=4))
    same = other.attend([(ROW, 0, CONTEXT_LEN)], PREFILL)[0] == layer("mha").whole_prompt
    assert same[:128].all(), "the first split is the same"
    assert not same[128:].all()


def test_thresholds_are_still_needed(monkeypatch):
    """Why decode pads its rows and blocks; when this fails on a newer XLA, both constants may go."""
    monkeypatch.setattr(xla, "MIN_DOT_ROWS", 1)
    assert (decode_alone(Layer("mha")) != layer("mha").whole_prompt[list(POSITIONS)]).any()
    monkeypatch.undo()
    monkeypatch.setattr(xla, "MIN_SUM_ELEMENTS", 1)
    tiling = Tiling(split_size=128, query_tile=32, decode_block=1)
    assert (decode_alone(Layer("one-head", tiling)) != layer("one-head").whole_prompt[list(POSITIONS)]).any()
