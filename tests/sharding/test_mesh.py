"""Which meshes there are, and what fits them."""

import itertools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding

from sharding import axes
from sharding.mesh import TensorParallelism, divides, make_mesh
from sharding.rules import spec_for


@pytest.mark.parametrize(
    ("size", "num_kv_heads", "kv", "group"),
    [
        (1, 8, 1, 1),
        (2, 8, 2, 1),
        (8, 8, 8, 1),
        (4, 2, 2, 2),  # fewer KV heads than devices: two devices share each
        (8, 1, 1, 8),  # one KV head: everybody has it
        (8, 4, 4, 2),
        (6, 4, 2, 3),
        (3, 8, 1, 3),
        (16, 8, 8, 2),
    ],
)
def test_of(size, num_kv_heads, kv, group):
    parallel = TensorParallelism.of(size, num_kv_heads)
    assert (parallel.kv, parallel.group, parallel.size) == (kv, group, size)
    assert num_kv_heads % parallel.kv == 0, "a device holds whole KV heads"


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "mlp", "fits"),
    [
        (1, 7, 7, 11, True),
        (2, 32, 8, 14336, True),
        (8, 32, 8, 14336, True),
        (16, 32, 8, 14336, True),
        (8, 12, 4, 64, False),  # 12 query heads over 8
        (2, 32, 8, 11, False),  # the MLP does not divide
        (4, 8, 2, 64, True),
        (8, 8, 2, 64, True),
        (6, 12, 4, 60, True),
        (3, 9, 3, 10, False),
    ],
)
def test_divides(size, heads, kv_heads, mlp, fits):
    assert divides(size, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=mlp) is fits


def test_what_divides_leaves_each_device_whole_groups_of_query_heads():
    """For every shape with as many query heads for each KV head: a device's query heads need the KV heads that it has."""
    seen = 0
    for size, kv_heads, per_kv in itertools.product(range(1, 17), range(1, 17), range(1, 9)):
        if divides(size, num_heads=kv_heads * per_kv, num_kv_heads=kv_heads, intermediate_size=size):
            seen += 1
            parallel = TensorParallelism.of(size, kv_heads)
            heads_a_device, kv_heads_a_device = kv_heads * per_kv // size, kv_heads // parallel.kv
            assert heads_a_device * parallel.group == per_kv * kv_heads_a_device
            assert heads_a_device % kv_heads_a_device == 0
    assert seen > 300


@pytest.mark.parametrize(("size", "num_kv_heads"), [(1, 1), (2, 2), (8, 8), (8, 2), (6, 4), (4, 1)])
def test_make_mesh(size, num_kv_heads):
    parallel = TensorParallelism.of(size, num_kv_heads)
    mesh = make_mesh(parallel)
    assert mesh.axis_names == axes.MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "kv": parallel.kv, "group": parallel.group, "expert": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4, "the default of jax moved to Explicit"
    assert list(mesh.devices.flat) == jax.devices()[:size]


def test_make_mesh_takes_the_devices_it_is_given():
    devices = jax.devices()[4:7]
    assert list(make_mesh(TensorParallelism(kv=2), devices).devices.flat) == devices[:2]


def test_too_few_devices_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="tensor_parallel_size 4 needs as many devices, found 3"):
        make_mesh(TensorParallelism(kv=4), jax.devices()[:3])
    with pytest.raises(ValueError, match="tensor_parallel_size 16 needs as many devices, found 8"):
        make_mesh(TensorParallelism(kv=8, group=2))
    with pytest.raises(ValueError, match="found 0"):
        make_mesh(TensorParallelism(), [])


def test_fewer_kv_heads_than_devices_are_held_by_several():
    """2 KV heads over 4 devices: the first two hold head 0, the others head 1; query heads are cut four ways."""
    mesh = make_mesh(TensorParallelism.of(4, 2))

    def places(logical, shape):
        indices = NamedSharding(mesh, spec_for(logical)).devices_indices_map(shape)
        return [indices[d][0].indices(shape[0])[:2] for d in jax.devices()[:4]]

    assert places((axes.KV_HEADS,), (2,)) == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert places((axes.HEADS,), (8,)) == [(0, 2), (2, 4), (4, 6), (6, 8)]
