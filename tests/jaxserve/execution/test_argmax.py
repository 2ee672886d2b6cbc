"""The largest of each row is numpy's, whatever form the platform takes."""

import jax
import numpy as np
import pytest

from jaxserve.execution import argmax

INF = np.float32(np.inf)


def rows() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((7, 1003), dtype=np.float32)
    x[1, [5, 800]] = x[1].max() + 1  # equals
    x[2, :] = -INF
    x[3, :-1] = -INF  # the last column alone
    x[4, 17] = INF
    x[5] = -3.0
    return x


@pytest.mark.parametrize("num_rows", [1, 7])
def test_places_and_numbers_are_numpys(num_rows):
    x = rows()[-num_rows:]
    places, numbers = (np.asarray(a) for a in jax.jit(argmax.largest)(x))
    np.testing.assert_array_equal(numbers, x.max(axis=1))
    is_anywhere = x.max(axis=1) == -INF  # nothing may be sampled: the place means nothing
    np.testing.assert_array_equal(places[~is_anywhere], x.argmax(axis=1)[~is_anywhere])


@pytest.mark.parametrize("place", [0, 501, 1002])
def test_a_nan_anywhere_gives_nan_in_its_row_alone(place):
    x = rows()
    x[0, place] = x[3, place] = np.nan
    places, numbers = (np.asarray(a) for a in jax.jit(argmax.largest)(x))
    np.testing.assert_array_equal(np.isnan(numbers), [True, False, False, True, False, False, False])
    assert ((places >= 0) & (places < x.shape[1])).all()
