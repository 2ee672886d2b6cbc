"""The largest number of each row and its place: what greedy sampling is.

XLA:CPU compiles `argmax` to one scalar loop on one core, 2.2 ms for 32 rows of 32,000 numbers; two passes and a product that it
runs in vectors on all cores say the same in 0.5 (measured, jax 0.10.2). Elsewhere `argmax` is one fused reduction.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch


def largest(x_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each row's largest number, the first of equals: (places int32 [S], numbers [S]).

    A row that holds a NaN gives NaN, and a place that is in the row and means nothing.
    """
    if dispatch.current_platform() == "cpu":
        return _largest_on_cpu(x_SV)
    places_S = jnp.argmax(x_SV, axis=-1).astype(jnp.int32)  # of a NaN, if there is one
    return places_S, jnp.take_along_axis(x_SV, places_S[:, None], axis=-1)[:, 0]


def _largest_on_cpu(x_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
    width = x_SV.shape[1]
    max_S = jnp.max(x_SV, axis=-1)
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    places_S = jnp.min(jnp.where(x_SV == max_S[:, None], columns, width - 1), axis=-1)
    # The compiled maximum passes over NaN; a sum does not, and a product with ones is the fastest sum.
    sums_S = jnp.matmul(x_SV, jnp.ones((width, 1), x_SV.dtype), precision="highest")[:, 0]
    return places_S, jnp.where(jnp.isnan(sums_S), jnp.nan, max_S)
