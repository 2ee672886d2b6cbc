"""Writes a step's keys and values into the pages: the contract over every backend."""

import jax

from kernels_pallas import dispatch
from kernels_pallas.kv_write.xla import kv_write_xla

__all__ = ["kv_write"]

IMPLEMENTATIONS = {"xla": kv_write_xla}


def kv_write(
    k_pages_GKZH: jax.Array,
    v_pages_GKZH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    slots_T: jax.Array,
    *,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Returns the pools with each token's key and value in its slot; in place when the caller's jit donates the pools.

    Args:
      k_pages_GKZH: the pool of keys.
      v_pages_GKZH: the pool of values.
      k_TKH: new keys, cast to the pool's dtype.
      v_TKH: new values.
      slots_T: page * page_size + offset of each token. From num_pages * page_size on a token is dropped (padding); a slot
        must never be negative (it would wrap), and the live slots of a step are distinct.
      backend: "auto" or "xla".

    Raises:
      ValueError: shapes that do not belong together, or an unknown backend.
    """
    T, K, H = k_TKH.shape
    _, pool_K, _, pool_H = k_pages_GKZH.shape
    if k_TKH.shape != v_TKH.shape or k_pages_GKZH.shape != v_pages_GKZH.shape or slots_T.shape != (T,):
        raise ValueError(f"keys {k_TKH.shape}, values {v_TKH.shape} and slots {slots_T.shape} do not belong together")
    if (pool_K, pool_H) != (K, H):
        raise ValueError(f"tokens have (KV heads, head_dim) {(K, H)}, the pool has {(pool_K, pool_H)}")
    args = (k_pages_GKZH, v_pages_GKZH, k_TKH, v_TKH, slots_T)
    return dispatch.choose_and_call("kv_write", IMPLEMENTATIONS, backend, *args)
