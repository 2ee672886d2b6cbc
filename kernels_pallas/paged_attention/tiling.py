"""Tile sizes of ragged paged attention: which exist, and the measured defaults in `tuned.json`.

Without jax, because the scheduler budgets with split_size and query_tile. A change of `split_size` changes the bits of
every context longer than the smaller of the two values; a change of the others must not change bits on a CPU.
"""

import dataclasses
import functools
import json
import pathlib


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of one attention program; hashable, part of the compile key. Build it with `default_tiling`."""

    split_size: int = 128
    """KV tokens of a work item; ranges start at its multiples. A multiple of the page size (and of 128 on a CPU)."""
    query_tile: int = 64
    """Query tokens of a prefill tile."""
    decode_block: int = 4
    """xla: fewest decode items that are computed at once."""
    head_block: int = 64
    """triton: most query heads of one KV head in a program, a power of two; a larger group takes several programs."""
    kv_block: int = 64
    """triton: KV tokens of one pipelined step inside a split."""
    decode_num_warps: int = 4
    """triton: warps of a decode program."""
    decode_num_stages: int = 3
    """triton: software pipeline depth; pages are an indirect load, so (num_stages - 1) // 2 tiles are in flight."""
    prefill_num_warps: int = 4
    """triton: warps of a prefill program."""
    prefill_num_stages: int = 3
    """triton: as `decode_num_stages`."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Tiling.{field.name} must be a positive integer, got {value!r}")


@functools.cache
def _tuned() -> list[dict]:
    return json.loads((pathlib.Path(__file__).parent / "tuned.json").read_text())["entries"]


def default_tiling(
    platform: str,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype_bytes: int = 2,
    device_kind: str = "",
) -> Tiling:
    """Returns the tuned tiling of a platform and a model's shape.

    The first entry of `tuned.json` that fits gives the sizes. A split is enlarged to whole pages; on a GPU the query tile
    is what fills `prefill_rows` rows of the matrix unit with the query heads of one KV head.

    Args:
      platform: "cpu", "gpu" ("cuda" and "rocm" too); any other takes the CPU's sizes.
      num_q_heads: query heads, of one device or of the model: only the ratio to `num_kv_heads` counts.
      num_kv_heads: KV heads.
      head_dim: head dim.
      page_size: page size [tokens].
      dtype_bytes: bytes of an element of q and of the pages.
      device_kind: `jax.Device.device_kind`, such as "NVIDIA L4"; empty takes the platform's general entry.
    """
    platform = "gpu" if platform in ("gpu", "cuda", "rocm") else "cpu"
    entry = next(
        entry
        for entry in _tuned()
        if entry["platform"] == platform
        and head_dim <= entry.get("max_head_dim", head_dim)
        and dtype_bytes >= entry.get("min_dtype_bytes", 0)
        and any(kind in device_kind.upper() for kind in entry.get("device_kinds", [""]))
    )
    sizes = dict(entry["tiling"])
    sizes["split_size"] = -(-sizes["split_size"] // page_size) * page_size
    if "prefill_rows" in entry:
        group_rows = 1 << (num_q_heads // num_kv_heads - 1).bit_length()
        sizes["head_block"] = min(group_rows, entry["prefill_rows"])
        sizes["query_tile"] = entry["prefill_rows"] // sizes["head_block"]
    return Tiling(**sizes)
