"""kv_write in plain XLA operations, in place where the caller donates the pool."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import dispatch


def kv_write_xla(
    k_pages_GKZH: jax.Array, v_pages_GKZH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, slots_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `api.kv_write`."""
    k_TKH, v_TKH = k_TKH.astype(k_pages_GKZH.dtype), v_TKH.astype(v_pages_GKZH.dtype)
    if dispatch.current_platform() == "cpu" and k_pages_GKZH.dtype.itemsize == 2:
        return _write_one_by_one(k_pages_GKZH, v_pages_GKZH, k_TKH, v_TKH, slots_T)
    return _scatter(k_pages_GKZH, k_TKH, slots_T), _scatter(v_pages_GKZH, v_TKH, slots_T)


def _scatter(pages_GKZH: jax.Array, x_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    _, K, Z, _ = pages_GKZH.shape
    # Every (token, head) is an index of its own: a slice over the heads makes XLA:CPU transpose the whole pool.
    head_K = jnp.arange(K, dtype=slots_T.dtype)
    # mode="drop" drops indices past the end; a negative one would wrap and overwrite the last page.
    return pages_GKZH.at[slots_T[:, None] // Z, head_K[None, :], slots_T[:, None] % Z].set(x_TKH, mode="drop")


def _write_one_by_one(k_pages_GKZH, v_pages_GKZH, k_TKH, v_TKH, slots_T):
    """Writes 16-bit pages on a CPU, token by token.

    XLA:CPU scatters into a bfloat16 array by converting all of it to float32 and back, and a bitcast to uint16 around the
    scatter copies all of it too (measured, jax 0.10.2: temporaries as large as both pools). Slice updates in a loop are
    in place.
    """
    G, K, Z, H = k_pages_GKZH.shape

    def write_token(t, pools):
        slot = slots_T[t]
        start = (slot // Z, 0, slot % Z, 0)

        def update(pages_GKZH, x_TKH):
            # Slice starts are clamped, not dropped: a padding token writes back what is there.
            old_1K1H = lax.dynamic_slice(pages_GKZH, start, (1, K, 1, H))
            new_1K1H = jnp.where(slot < G * Z, x_TKH[t][None, :, None, :], old_1K1H)
            return lax.dynamic_update_slice(pages_GKZH, new_1K1H, start)

        return update(pools[0], k_TKH), update(pools[1], v_TKH)

    return lax.fori_loop(0, slots_T.shape[0], write_token, (k_pages_GKZH, v_pages_GKZH))
