"""Sums along the last axis in one order, and logarithms and exponentials by one routine, however many rows there are.

XLA:CPU sums the last axis of a small array by another routine than of a large one, and computes what is left over when vectors
are full by scalar routines that differ by an ulp (measured on jax 0.10.2: `log_softmax` of [S, 320] has other bits at 2 to 12
rows than from 32 on, of [S, 32000] at 3 rows, a mean of 192 squares at 12).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.models.linear import LinearContext, linear_f32

LANES = 64
"""A multiple of every vector's length."""

BLOCK = 256
"""Most elements that one product sums; few enough that `linear` need not cut it into tiles."""

NUM_ONES = 8
"""Columns of the same sum: with one alone, a product is no longer a matrix product."""


def row_sums(x: jax.Array) -> jax.Array:
    """Returns the sums over the last axis, float32, as products with ones: blocks first, and then their sums."""
    *lead, width = x.shape
    if width > BLOCK:
        blocks = jnp.pad(x, ((0, 0),) * len(lead) + ((0, -width % BLOCK),)).reshape(*lead, -1, BLOCK)
        return row_sums(row_sums(blocks))
    ones = lax.optimization_barrier(jnp.ones((NUM_ONES, width), jnp.float32))
    sums = linear_f32(x.reshape(-1, width), ones, LinearContext("cpu", is_deterministic=True))
    return sums[:, 0].reshape(lead)


def row_sums_in_a_loop(x: jax.Array) -> jax.Array:
    """Returns `row_sums` of the very elements that a loop reads after it.

    What is read by a loop is computed once; into other readers XLA fuses it anew, and an exponential there may differ by an ulp.
    """
    return lax.fori_loop(0, 2, lambda _, sums: row_sums(x), jnp.zeros(x.shape[:-1], jnp.float32))


def in_vectors(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns an elementwise function of x, every element computed by its vector routine."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % LANES))
    return lax.optimization_barrier(function(lax.optimization_barrier(flat)))[: x.size].reshape(x.shape)


def whole_rows(function: Callable[[jax.Array], jax.Array], x_RC: jax.Array) -> jax.Array:
    """Returns an elementwise function of x over rows of whole vectors, so that no part of the loop ends inside one."""
    padded_RC = jnp.pad(x_RC, ((0, 0), (0, -x_RC.shape[1] % LANES)))
    return lax.optimization_barrier(function(lax.optimization_barrier(padded_RC)))[:, : x_RC.shape[1]]


def exp_below_max(x_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x - max(x) over the last axis, and its exponentials."""
    shifted_SV = x_SV - jnp.max(x_SV, axis=-1, keepdims=True)
    return shifted_SV, whole_rows(jnp.exp, shifted_SV)


def log_softmax(x_SV: jax.Array) -> jax.Array:
    """Returns x - log(sum(exp(x))) over the last axis."""
    shifted_SV, exps_SV = exp_below_max(x_SV)
    return shifted_SV - in_vectors(jnp.log, row_sums(exps_SV))[:, None]
