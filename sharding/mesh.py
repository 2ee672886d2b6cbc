"""The device mesh of one engine, and which sizes of it a model allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding import axes


@dataclass(frozen=True, slots=True)
class TensorParallelism:
    """How t devices share K KV heads: `kv` of them hold different KV heads, `group` of them the same ones.

    A PartitionSpec cannot cut 2 heads over 4 devices and replicate the rest, so t is split into two mesh axes.
    """

    kv: int = 1
    group: int = 1

    @property
    def size(self) -> int:
        return self.kv * self.group

    @classmethod
    def of(cls, size: int, num_kv_heads: int) -> "TensorParallelism":
        kv = math.gcd(size, num_kv_heads)
        return cls(kv=kv, group=size // kv)


def divides(size: int, *, num_heads: int, num_kv_heads: int, intermediate_size: int) -> bool:
    """Returns whether `size` devices can share such a layer without a remainder."""
    parallel = TensorParallelism.of(size, num_kv_heads)
    return num_heads % size == 0 and (num_heads // num_kv_heads) % parallel.group == 0 and intermediate_size % size == 0


def make_mesh(parallel: TensorParallelism, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes of `sharding.axes` over the first `parallel.size` devices.

    Args:
        parallel: its axis sizes.
        devices: jax devices; None takes jax.devices().

    Raises:
        ValueError: there are fewer devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < parallel.size:
        raise ValueError(f"tensor_parallel_size {parallel.size} needs as many devices, found {len(devices)}")
    grid = np.array(devices[: parallel.size]).reshape(1, parallel.kv, parallel.group, 1)
    return Mesh(grid, axes.MESH_AXES, axis_types=(AxisType.Auto,) * len(axes.MESH_AXES))
