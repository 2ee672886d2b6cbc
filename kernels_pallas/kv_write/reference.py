"""The specification of kv_write, in numpy: one token at a time."""

import numpy as np


def kv_write_reference(
    k_pages_GKZH: np.ndarray, v_pages_GKZH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray, slots_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pages with token t's key and value at slot page * Z + offset; a slot past the pool drops its token."""
    k_pages_GKZH, v_pages_GKZH = k_pages_GKZH.copy(), v_pages_GKZH.copy()
    G, _, Z, _ = k_pages_GKZH.shape
    for k_KH, v_KH, slot in zip(k_TKH, v_TKH, slots_T, strict=True):
        if slot < G * Z:
            k_pages_GKZH[slot // Z, :, slot % Z] = k_KH
            v_pages_GKZH[slot // Z, :, slot % Z] = v_KH
    return k_pages_GKZH, v_pages_GKZH
