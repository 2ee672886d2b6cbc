"""kv_write as one XLA scatter a pool, in place where the caller donates the pool."""

import jax
import jax.numpy as jnp


def kv_write_xla(
    k_pages_GKZH: jax.Array, v_pages_GKZH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `api.kv_write`."""
    return _scatter(k_pages_GKZH, k_TKH, slots_T), _scatter(v_pages_GKZH, v_TKH, slots_T)


def _scatter(pages_GKZH: jax.Array, x_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    dtype = pages_GKZH.dtype
    x_TKH = x_TKH.astype(dtype)
    if dtype.itemsize == 2:
        # XLA:CPU scatters into a 16-bit float array by converting all of it to float32 and back; its bits are an integer.
        bits_GKZH = jax.lax.bitcast_convert_type(pages_GKZH, jnp.uint16)
        bits_TKH = jax.lax.bitcast_convert_type(x_TKH, jnp.uint16)
        return jax.lax.bitcast_convert_type(_scatter_native(bits_GKZH, bits_TKH, slots_T), dtype)
    return _scatter_native(pages_GKZH, x_TKH, slots_T)


def _scatter_native(pages_GKZH: jax.Array, x_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    _, K, Z, _ = pages_GKZH.shape
    # Every (token, head) is an index of its own: a full slice over the heads makes XLA:CPU transpose the whole pool.
    head_K = jnp.arange(K, dtype=slots_T.dtype)
    # mode="drop" drops indices past the end; a negative one would wrap and overwrite the last page.
    return pages_GKZH.at[slots_T[:, None] // Z, head_K[None, :], slots_T[:, None] % Z].set(x_TKH, mode="drop")
