"""The paged KV cache as a model sees it during one step.

Owns, for the length of a trace, the page arrays that a step threads through its layers. How pages are laid out and read is the
kernels' business; which pages belong to whom is the scheduler's.
"""

from dataclasses import dataclass

import jax

from jaxserve.plan import KVSpec
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.paged_attention.api import RaggedBatch, Tiling, paged_attention


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """Static choices of an engine: which implementation, which tiles."""

    tiling: Tiling
    backend: str = "auto"


class PagedCache:
    """K and V of all layers, this step's destinations and this step's work.

    Attributes:
        k_pages, v_pages: one array [G, K, Z, H] a layer.
        block_tables: one [R, P] a group.
        slots: one [T] a group: page * Z + offset of each token; G * Z for padding.
        rows_T: block-table row of each token; positions_T: its position, -1 for padding.
        prompt_lens_T: length of the prompt of each token's sequence, for positions that depend on it.
    """

    def __init__(
        self,
        specs: tuple[KVSpec, ...],
        group_of_layer: tuple[int, ...],
        k_pages: tuple[jax.Array, ...],
        v_pages: tuple[jax.Array, ...],
        block_tables: tuple[jax.Array, ...],
        slots: tuple[jax.Array, ...],
        rows_T: jax.Array,
        positions_T: jax.Array,
        prompt_lens_T: jax.Array,
        batch: RaggedBatch,
        context: AttentionContext,
    ):
        self.specs = specs
        self.group_of_layer = group_of_layer
        self.k_pages = list(k_pages)
        self.v_pages = list(v_pages)
        self.block_tables = block_tables
        self.slots = slots
        self.rows_T = rows_T
        self.positions_T = positions_T
        self.prompt_lens_T = prompt_lens_T
        self._batch = batch
        self._context = context

    def write(self, layer: int, k_TKH: jax.Array, v_TKH: jax.Array) -> None:
        """Stores this step's keys and values of one layer."""
        dtype = self.k_pages[layer].dtype
        self.k_pages[layer], self.v_pages[layer] = kv_write(
            self.k_pages[layer],
            self.v_pages[layer],
            k_TKH.astype(dtype),
            v_TKH.astype(dtype),
            self.slots[self.group_of_layer[layer]],
        )

    def attend(self, layer: int, q_TNH: jax.Array, *, scale: float, soft_cap: float | None = None) -> jax.Array:
        """Returns causal attention [T, N, H] of this step's queries over all that their sequences have stored."""
        return paged_attention(
            q_TNH,
            self.k_pages[layer],
            self.v_pages[layer],
            self.block_tables[self.group_of_layer[layer]],
            self._batch,
            scale=scale,
            sliding_window=self.specs[layer].window,
            soft_cap=soft_cap,
            tiling=self._context.tiling,
            backend=self._context.backend,
        )
