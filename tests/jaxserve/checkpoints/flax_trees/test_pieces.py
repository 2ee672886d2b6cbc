"""Trees in memory give the same tensors as those on disk, with the layout detected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import CheckpointError
from jaxserve.model_source import canonical_leaves
from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING


def assert_same_bits(leaves, known):
    assert leaves.keys() == known.canonical.keys()
    for path, leaf in leaves.items():
        assert np.asarray(leaf).tobytes() == np.ascontiguousarray(known.canonical[path]).tobytes(), path


@pytest.mark.parametrize("kind", ["numpy", "jax", "FrozenDict", "train state"])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_maxtext_in_memory(kind, is_stacked, known, trees):
    known = known(rope_scaling=LLAMA3_ROPE_SCALING, dtype="bfloat16")
    tree = {"params": trees.maxtext(known, is_stacked=is_stacked)}
    if kind != "numpy":
        tree = jax.tree.map(jnp.asarray, tree)
    if kind == "FrozenDict":
        tree = FrozenDict(tree)
    elif kind == "train state":
        tree = {"params": tree, "opt_state": {"mu": tree}, "step": jnp.zeros((), jnp.int32)}
    leaves = canonical_leaves(tree, known.config)
    assert_same_bits(leaves, known)
    assert all(isinstance(leaf, np.ndarray if kind == "numpy" else jax.Array) for leaf in leaves.values())


@pytest.mark.parametrize("form", ["nested", "flat", "stacked"])
def test_gemma_in_memory(form, known, trees):
    known = known(is_tied=True, num_layers=7)
    assert_same_bits(canonical_leaves(trees.gemma(known, form), known.config), known)


def test_arrays_that_are_spread_over_devices_stay_so(known, trees):
    known = known()
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    tree = jax.device_put(trees.maxtext(known, is_stacked=True), sharding)
    leaves = canonical_leaves(tree, known.config)
    assert_same_bits(leaves, known)
    assert len(leaves["layers/1/mlp/up_proj/kernel"].sharding.device_set) == 4


def test_a_tree_of_another_model_is_one_error(known, trees):
    other = known(num_layers=2)
    with pytest.raises(CheckpointError, match=r"params is a tree of no known layout: 12 leaves .* The nearest is maxtext"):
        canonical_leaves({"params": trees.maxtext(known(), is_stacked=True)}, other.config)
