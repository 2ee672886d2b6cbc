"""A row of a deterministic product, sum or log_softmax on a CPU has the same bits however many rows there are."""

import functools

import jax
import numpy as np
import pytest

from jaxserve.models import linear, sums
from jaxserve.models.linear import DETERMINISTIC_COMPILER_OPTIONS, LinearContext, linear_f32, rows_per_product

ROWS = (1, 2, 3, 8, 12, 17, 32, 33, 64, 160)
# (inner, outer): each kind of `rows_per_product`, at its limits, and sizes that fill no vector
SHAPES = [(77, 33), (512, 96), (768, 130), (2100, 96)]
MORE_SHAPES = [(64, 128), (513, 40), (1024, 256), (1025, 64), (2048, 64), (4096, 32), (768, 4096)]
RELATIVE_TO_FLOAT64 = 3e-6
"""Of the largest sum: 4,096 products of float32, rounded one after the other, stay far below."""


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(function, *arguments, is_deterministic=True):
    options = DETERMINISTIC_COMPILER_OPTIONS["cpu"] if is_deterministic else None
    fresh = jax.jit(lambda *given: function(*given))  # a function that jax knows would not be traced again
    return np.asarray(fresh.lower(*arguments).compile(compiler_options=options)(*arguments))


def row_counts_that_differ(function, x, *others):
    """Returns the numbers of rows at which some row has other bits than among all rows."""
    expected = run(function, x, *others)
    return [n for n in ROWS if n < len(x) and (run(function, x[:n], *others) != expected[:n]).any()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("inner", "outer"), SHAPES + [pytest.param(*shape, marks=pytest.mark.slow) for shape in MORE_SHAPES]
)
def test_products(inner, outer, dtype):
    x, weight = values(ROWS[-1], inner).astype(dtype), values(outer, inner, seed=1).astype(dtype)
    multiply = functools.partial(linear_f32, ctx=LinearContext("cpu", is_deterministic=True))
    assert row_counts_that_differ(multiply, x, weight) == []
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(run(multiply, x, weight), exact, rtol=0, atol=RELATIVE_TO_FLOAT64 * np.abs(exact).max())


def test_products_need_their_tiles_and_the_compiler_option(monkeypatch):
    """The negative controls; when one fails on a newer XLA, what it switches off may go."""
    x, weight = values(64, 768), values(130, 768, seed=1)
    deterministic = functools.partial(linear_f32, ctx=LinearContext("cpu", is_deterministic=True))
    fast = functools.partial(linear_f32, ctx=LinearContext("cpu"))
    assert row_counts_that_differ(fast, x, weight) != []
    monkeypatch.setattr(linear, "rows_per_product", lambda inner_size: None)
    assert row_counts_that_differ(deterministic, x, weight) != []
    monkeypatch.undo()
    monkeypatch.setattr(linear, "MIN_DETERMINISTIC_ROWS", 1)
    assert row_counts_that_differ(deterministic, x, weight) == [1]
    monkeypatch.undo()
    one_chain = values(64, 256), values(130, 256, seed=1)
    all_rows, few_rows = (
        run(deterministic, rows, one_chain[1], is_deterministic=False) for rows in (x[:, :256], x[:8, :256])
    )
    assert (few_rows != all_rows[:8]).any()


def test_tiles_are_of_whole_vectors_and_fit():
    assert [rows_per_product(n) for n in (1, 512, 513, 768, 1024, 1025, 2048, 2049, 65536)] == [
        None, None, 48, 32, 32, 16, 16, 16, 16,
    ]  # fmt: skip


@pytest.mark.parametrize("width", [192, 777, *(pytest.param(width, marks=pytest.mark.slow) for width in (18, 320, 32000))])
@pytest.mark.parametrize(
    ("ours", "numpys"),
    [
        (lambda x: sums.row_sums(x * x)[:, None], lambda x: (x * x).sum(axis=-1, keepdims=True)),
        (sums.log_softmax, lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True))),
    ],
    ids=["squares", "log_softmax"],
)
def test_sums(ours, numpys, width):
    x = 3 * values(64, width)
    assert row_counts_that_differ(ours, x) == []
    np.testing.assert_allclose(run(ours, x), numpys(x.astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_jaxs_own_softmax_differs():
    assert row_counts_that_differ(functools.partial(jax.nn.log_softmax, axis=-1), 3 * values(64, 320)) != []
