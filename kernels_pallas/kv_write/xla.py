"""kv_write as one XLA scatter a pool, in place where the caller donates the pool."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch


def kv_write_xla(
    k_pages_GKZH: jax.Array, v_pages_GKZH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `api.kv_write`. On a CPU the scatter is in place for 32-bit pages only (`_scatter_bits`)."""
    k_TKH, v_TKH = k_TKH.astype(k_pages_GKZH.dtype), v_TKH.astype(v_pages_GKZH.dtype)
    is_16_bit_on_cpu = dispatch.current_platform() == "cpu" and k_pages_GKZH.dtype.itemsize == 2
    scatter = _scatter_bits if is_16_bit_on_cpu else _scatter
    return scatter(k_pages_GKZH, k_TKH, slots_T), scatter(v_pages_GKZH, v_TKH, slots_T)


def _scatter(pages_GKZH: jax.Array, x_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    _, K, Z, _ = pages_GKZH.shape
    # Every (token, head) is an index of its own: a slice over the heads makes XLA:CPU transpose the whole pool.
    head_K = jnp.arange(K, dtype=slots_T.dtype)
    # mode="drop" drops indices past the end; a negative one would wrap and overwrite the last page.
    return pages_GKZH.at[slots_T[:, None] // Z, head_K[None, :], slots_T[:, None] % Z].set(x_TKH, mode="drop")


def _scatter_bits(pages_GKZH: jax.Array, x_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    """Scatters the bits of 16-bit floats as uint16, for XLA:CPU.

    XLA:CPU turns a bfloat16 scatter, and a bfloat16 dynamic_update_slice in a loop too, into float32: it converts the
    whole pool there and back, a slice update even once a token (590 ms for 512 tokens into 512 pages). The two bitcasts
    still copy the pool once each; only 32-bit pages are written in place (measured, jax 0.10.2).
    """
    bits_GKZH = jax.lax.bitcast_convert_type(pages_GKZH, jnp.uint16)
    bits_TKH = jax.lax.bitcast_convert_type(x_TKH, jnp.uint16)
    return jax.lax.bitcast_convert_type(_scatter(bits_GKZH, bits_TKH, slots_T), pages_GKZH.dtype)
