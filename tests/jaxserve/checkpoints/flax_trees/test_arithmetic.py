"""Expressions: what they compute, and that nothing else is an expression."""

import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoints.flax_trees.arithmetic import apply, evaluate, names_in
from jaxserve.errors import CheckpointError

NAMES = {"block": 3, "slot": 2, "num_hidden_layers": 26, "hidden_size": 1152, "model_type": "gemma3", "tied": True}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6*block+slot", 20),
        ("num_hidden_layers//6*6 + slot", 26),
        ("(block - 1) % 2", 0),
        ("sqrt(16) / 8", 0.5),
        ("bfloat16(sqrt(hidden_size))", 34.0),  # 33.94 to eight bits
    ],
)
def test_numbers(text, number):
    assert evaluate(text, NAMES) == number


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "block.real", "[1][0]", "lambda: 1", "2**9", "exp(1)", "'a'", "1 if 1 else 2",
     "block and 1", "sqrt(1, 2)", "sqrt(0-1)", "1//0", "model_type", "tied", "other", "1 +", "((((" * 100, ""],
)  # fmt: skip
def test_all_else_is_refused(text):
    with pytest.raises(CheckpointError):
        evaluate(text, NAMES)


def test_the_names_that_are_known_are_listed():
    with pytest.raises(CheckpointError, match="blok is no number .* known are block, hidden_size, num_hidden_layers, slot"):
        evaluate("blok", NAMES)


def test_names_in():
    assert names_in("6*block + sqrt(slot)") == {"block", "slot"}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3, 2)])
def test_a_value_is_computed_in_float32_and_rounded_once(dtype, shape, monkeypatch):
    monkeypatch.setattr("jaxserve.checkpoints.flax_trees.arithmetic._STRIP_ELEMENTS", 8)  # several strips
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    result = apply("x * sqrt(hidden_size)", x, NAMES)
    exact = x.astype(np.float64) * np.float64(np.float32(np.sqrt(1152)))
    assert result.dtype == x.dtype and result.shape == x.shape
    assert result.tobytes() == exact.astype(np.float32).astype(dtype).tobytes()
    import jax.numpy as jnp

    assert np.asarray(apply("x - 1", jnp.asarray(x), NAMES)).tobytes() == (x.astype(np.float32) - 1).astype(dtype).tobytes()


@pytest.mark.parametrize("text", ["x", "2 * x", "x ** 2", "x % 2", "x * x", "y * 2", "x * sqrt"])
def test_a_value_is_one_operation_on_x(text):
    with pytest.raises(CheckpointError):
        apply(text, np.ones(2, np.float32), NAMES)
