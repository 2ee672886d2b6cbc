"""How many KV pages an engine gets: from a size that was asked for, or from what a device has left."""

import os
from typing import Any

import jax
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.plan import KVSpec

CPU_DEFAULT_KV_BYTES = 1 << 29
"""A development machine's share: 512 MiB."""

MAX_POOL_TOKENS = 2**31 - 1

ROUND_PAGES_TO = 64
"""num_pages is a shape, so a few MB more or less of free memory must not change every cache key."""


def page_bytes(specs: tuple[KVSpec, ...], page_size: int, kv_dtype: str, kv_shards: int) -> int:
    """Returns what one page id costs on one device over all layers, K and V [bytes].

    Each group has a pool of its own with as many pages, and a page of a group costs its own layers only: together, all layers.
    """
    item = np.dtype(jax.numpy.dtype(kv_dtype)).itemsize
    return sum(2 * spec.num_kv_heads // kv_shards * spec.head_dim * page_size * item for spec in specs)


def num_pages_for(kv_bytes: int, bytes_a_page: int) -> int:
    """Returns how many pages fit, rounded down coarsely where there are many."""
    pages = kv_bytes // bytes_a_page
    return pages // ROUND_PAGES_TO * ROUND_PAGES_TO if pages >= ROUND_PAGES_TO else pages


def free_device_bytes(device: Any, utilization: float) -> int | None:
    """Returns utilization * total - in use [bytes], or None where the platform does not say (a CPU)."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] * utilization) - int(stats.get("bytes_in_use", 0))


def check_fits(num_pages: int, page_size: int, max_model_len: int, bytes_a_page: int) -> None:
    """Raises ConfigError unless one request of the longest length fits the pool, so that every request does, alone."""
    needed = -(-max_model_len // page_size)
    if num_pages < needed:
        raise ConfigError(
            f"The KV pool holds {num_pages} pages of {page_size} tokens ({num_pages * bytes_a_page / 2**20:.0f} MiB), but one "
            f"request of max_model_len {max_model_len} needs {needed} ({needed * bytes_a_page / 2**20:.0f} MiB): give it more "
            f"(num_pages, kv_cache_memory_bytes or gpu_memory_utilization), or lower max_model_len to at most "
            f"{num_pages * page_size}."
        )


def check_addressable(num_pages: int, page_size: int) -> None:
    """Raises ConfigError if the pool has more tokens than their 32-bit slot numbers can tell apart."""
    if num_pages * page_size > MAX_POOL_TOKENS:
        raise ConfigError(
            f"num_pages ({num_pages}) times page_size ({page_size}) must be at most {MAX_POOL_TOKENS} tokens: a token's place in "
            f"the pool is a 32-bit number. Lower num_pages to at most {MAX_POOL_TOKENS // page_size}."
        )


def host_memory_bytes() -> int:
    """Returns all memory of this machine [bytes]."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_host_memory(pool_bytes: int) -> None:
    """Raises ConfigError if the machine has less memory than a KV pool on the CPU would take."""
    total = host_memory_bytes()
    if pool_bytes > total:
        raise ConfigError(
            f"The KV pool would take {pool_bytes / 2**30:.1f} GiB and the machine has {total / 2**30:.1f}: lower num_pages or "
            "kv_cache_memory_bytes."
        )
