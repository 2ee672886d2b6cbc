"""Sums along the last axis in one order, and logarithms and exponentials by one routine, however many rows there are.

XLA:CPU sums the last axis of a small array by another routine than of a large one, and computes what is left over when vectors are
full by scalar routines that differ by an ulp (measured on jax 0.10.2: `log_softmax` of [S, 320] has other bits at 2 to 12 rows than
from 32 on, of [S, 32000] at 3 rows, a mean of 192 squares at 12).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LANES = 64
"""A multiple of every vector's length."""


def row_sums(x: jax.Array) -> jax.Array:
    """Returns the sums over the last axis, float32: lane by lane in sequence, and then the lanes in pairs."""
    width = x.shape[-1]
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -width % LANES),))
    # Without the barrier a product in x might be fused into the sum, in one rounding, in one program and not in another.
    lanes = jnp.sum(lax.optimization_barrier(x.reshape(*x.shape[:-1], -1, LANES)), axis=-2)
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def in_vectors(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns an elementwise function of x, every element computed by its vector routine."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % LANES))
    return lax.optimization_barrier(function(lax.optimization_barrier(flat)))[: x.size].reshape(x.shape)


def exp_below_max(x_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x - max(x) over the last axis, and its exponentials."""
    shifted_SV = x_SV - jnp.max(x_SV, axis=-1, keepdims=True)
    # Whole vectors in every row, so that no part of the loop ends inside one.
    padded_SV = jnp.pad(shifted_SV, ((0, 0), (0, -x_SV.shape[-1] % LANES)))
    exps_SV = lax.optimization_barrier(jnp.exp(lax.optimization_barrier(padded_SV)))
    return shifted_SV, exps_SV[:, : x_SV.shape[-1]]


def log_softmax(x_SV: jax.Array) -> jax.Array:
    """Returns x - log(sum(exp(x))) over the last axis."""
    shifted_SV, exps_SV = exp_below_max(x_SV)
    return shifted_SV - in_vectors(jnp.log, row_sums(exps_SV))[:, None]


def softmax(x_SV: jax.Array) -> jax.Array:
    """Returns exp(x) / sum(exp(x)) over the last axis."""
    _, exps_SV = exp_below_max(x_SV)
    return exps_SV / row_sums(exps_SV)[:, None]
