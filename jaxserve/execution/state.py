"""What lives on the device between steps: pages, block tables, last tokens.

Donated to each step; the runner is its only owner.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ResolvedConfig
from jaxserve.execution.struct import Leaf, struct
from jaxserve.plan import KVSpec, kv_groups
from sharding import axes
from sharding.rules import spec_for


@struct
class DeviceState:
    """The engine's memory.

    Attributes:
        k_pages, v_pages: [G, K, Z, H] a layer, KV heads cut over the mesh.
        block_tables: int32 [R, P] a group.
        last_token_R: the token each row sampled last; read by the next step before the host has seen it.
    """

    k_pages: tuple[Leaf, ...]
    v_pages: tuple[Leaf, ...]
    block_tables: tuple[Leaf, ...]
    last_token_R: Leaf


State = TypeVar("State")

PAGES_SPEC = spec_for((axes.PAGES, axes.KV_HEADS, None, None))


def state_specs(specs: tuple[KVSpec, ...]) -> DeviceState:
    """Returns the PartitionSpec of each array of the state."""
    replicated = PartitionSpec()
    return DeviceState(
        k_pages=(PAGES_SPEC,) * len(specs),
        v_pages=(PAGES_SPEC,) * len(specs),
        block_tables=(replicated,) * len(kv_groups(specs)),
        last_token_R=replicated,
    )


def abstract_state(specs: tuple[KVSpec, ...], config: ResolvedConfig, mesh: Mesh) -> DeviceState:
    """Returns shapes, dtypes and shardings of the state."""

    def pages(spec: KVSpec) -> jax.ShapeDtypeStruct:
        shape = (config.num_pages, spec.num_kv_heads, config.page_size, spec.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.kv_dtype), sharding=NamedSharding(mesh, PAGES_SPEC))

    def replicated(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    layers = tuple(pages(spec) for spec in specs)
    tables = tuple(replicated((config.max_num_seqs, config.max_pages_per_seq)) for _ in kv_groups(specs))
    return DeviceState(layers, layers, tables, replicated((config.max_num_seqs,)))


def make_state(abstract: State) -> State:
    """Returns a state of zeros; zeroed because stale bits that decode as NaN would poison masked sums (0 * NaN)."""

    def zeros(leaf: Any) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            sizes = (len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True))
            return np.zeros(tuple(sizes), leaf.dtype)

        if leaf.sharding.mesh.devices.flat[0].platform == "cpu":  # no program to compile
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)
        return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    return jax.tree.map(zeros, abstract)
