"""Axes: against numpy written out by hand."""

import numpy as np
import pytest

from jaxserve.checkpoints.flax_trees.axes import parse
from jaxserve.errors import CheckpointError

NUMBERS = {"vocab_size": 3, "num_heads": 2}
X = np.arange(4 * 3 * 2 * 6).reshape(4, 3, 2, 6)

CASES = {
    "A B C D": lambda x: x,
    "A B C D -> A B (C D)": lambda x: x.reshape(4, 3, 12),
    "A B C D -> (D A) B C": lambda x: x.transpose(3, 0, 1, 2).reshape(24, 3, 2),
    "A {layer} C D -> C A D": lambda x: x[:, 1].transpose(1, 0, 2),
    "2 {layer} C D -> (C D)": lambda x: x[2, 1].reshape(12),
    "A<vocab_size B 1 D -> A B D": lambda x: x[:3, :, 1],
    "A B C (half pair:2) -> A B C (pair half)": lambda x: np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1),
    "(heads:num_heads rest) B 0 D -> heads B (rest D)": lambda x: (
        x[:, :, 0].reshape(2, 2, 3, 6).swapaxes(1, 2).reshape(2, 3, 12)
    ),
}


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_as_numpy_does_it(text, kind):
    import jax.numpy as jnp

    axes = parse(text)
    captures = {"layer": 1} if axes.bound else {}
    x = X if kind == "numpy" else jnp.asarray(X)
    result = axes.apply(x[axes.index(X.shape, captures, NUMBERS)], NUMBERS)
    np.testing.assert_array_equal(np.asarray(result), CASES[text](X))
    assert axes.shape(X.shape, captures, NUMBERS) == CASES[text](X).shape
    assert axes.rank == 4
    assert axes.is_identity == (text == "A B C D")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "both sides"),
        ("0 {layer}", "both sides"),
        ("A B -> A", "both sides"),
        ("A B -> A B C", "both sides"),
        ("A A -> A", "both sides"),
        ("A -2 -> A", "'-2' must be a name"),
        ("A {2*layer} -> A", "must be a name"),
        ("A< B -> A B", "'A<' must be a name"),
        ("{layer} {layer} A -> A", "binds layer twice"),
        ("(a b) C -> a b C", "all but one with their size"),
        ("() A -> A", "must hold names"),
    ],
)
def test_what_is_not_understood_is_named(text, message):
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4 B C D -> B C D", "an axis of 4 has no 5 elements"),
        ("A B C D<9 -> A B C D", "an axis of 6 has no 9 elements"),
        ("A (b pair:2) C D -> A b pair C D", "an axis of 3 cannot be cut"),
        ("A (b:1 pair:2) C D -> A b pair C D", "an axis of 3 cannot be cut"),
        ("A B C<other D -> A B C D", "other is no number"),
    ],
)
def test_axes_that_do_not_fit_a_shape(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse(text).shape(X.shape, {}, NUMBERS)
