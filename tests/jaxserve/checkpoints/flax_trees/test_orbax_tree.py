"""Orbax directories: which tree is taken, what is read of it, and what is refused."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

from jaxserve.checkpoints.flax_trees.orbax_item import find_item
from jaxserve.checkpoints.flax_trees.orbax_tree import OrbaxTree
from jaxserve.errors import CheckpointError

STACKED = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(ml_dtypes.bfloat16)
TREE = {
    "params": {"layers": {"w": STACKED}, "a.b": {"c/d %3A?#é": np.arange(3.0, dtype=np.float32)}, "frozen": None},
    "step": 3,
    "opt_state": [{"mu": np.ones(2, np.float32)}, ()],
}
LEAVES = {"params/layers/w", "params/a.b/c/d %3A?#é", "opt_state/0/mu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small tree as Orbax saves it in every way; not to be changed by tests."""
    root = tmp_path_factory.mktemp("orbax")
    tree = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, TREE)
    for use_ocdbt in (True, False):
        for use_zarr3 in (True, False):
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
            ocp.Checkpointer(handler).save(root / f"v0 ocdbt={use_ocdbt} zarr3={use_zarr3}", tree)
    v1.save(str(root / "v1"), tree)
    return root


WAYS = [f"v0 ocdbt={a} zarr3={b}" for a in (True, False) for b in (True, False)] + ["v1"]


@pytest.mark.parametrize("way", WAYS)
def test_every_format_of_arrays_is_read(way, saved):
    tree = OrbaxTree(find_item(saved / way).path)
    assert set(tree.leaves) == LEAVES
    assert tree.spec("params/layers/w").shape == (6, 4, 5)
    assert tree.spec("params/layers/w").dtype == ml_dtypes.bfloat16
    everything = (slice(None),) * 3
    assert tree.read("params/layers/w", everything).tobytes() == STACKED.tobytes()
    assert tree.read("params/layers/w", (slice(0, 6), 2, slice(1, 3))).tobytes() == STACKED[:, 2, 1:3].tobytes()
    np.testing.assert_array_equal(tree.read("params/a.b/c/d %3A?#é", (slice(None),)), np.arange(3.0))


def _touch(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True)
        (root / path / "_METADATA").write_text("{}")


@pytest.mark.parametrize(
    ("paths", "found", "step"),
    [
        (["."], ".", None),
        (["items"], "items", None),
        (["mine"], "mine", None),
        (["state"], "state", None),
        (["optimizer_state", "model_params"], "model_params", None),
        (["2/default", "10/default", "9/default"], "10/default", 10),
        (["step_2/items", "checkpoint-30/items", "run.4/items"], "checkpoint-30/items", 30),
        (["7", "8"], "8", 8),
        (["8/items", "9.orbax-checkpoint-tmp-1/items"], "8/items", 8),
        (["a/b/items"], None, None),
    ],
)
def test_which_tree_is_taken(paths, found, step, tmp_path):
    for path in paths:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "_METADATA").write_text("{}")
    item = find_item(tmp_path)
    assert (item.path if item else None) == (tmp_path / found if found else None)
    assert (item.step if item else None) == step


def test_a_step_that_has_no_tree_is_passed_over(tmp_path):
    _touch(tmp_path, "8/items")
    (tmp_path / "9/metrics").mkdir(parents=True)
    assert find_item(tmp_path).step == 8


def test_several_trees_of_unusual_names_are_not_guessed(tmp_path):
    _touch(tmp_path, "actor", "critic")
    with pytest.raises(
        CheckpointError, match=r"several trees \(actor, critic\); give the directory of the one with the param"
    ):
        find_item(tmp_path)


def test_what_was_not_finished_is_said_to_be(tmp_path, saved):
    _touch(tmp_path, "8.orbax-checkpoint-tmp-123/items")
    for path in (tmp_path, tmp_path / "8.orbax-checkpoint-tmp-123"):
        with pytest.raises(CheckpointError, match="only a checkpoint that was not finished .*8.orbax-checkpoint-tmp-123"):
            find_item(path)
    copy = shutil.copytree(saved / WAYS[0], tmp_path / "unmerged")
    (copy / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="no manifest.ocdbt: the checkpoint was not finished, or not copied whole"):
        OrbaxTree(copy)


def _metadata(copy, change):
    path = copy / "_METADATA"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def _entry(metadata, **fields):
    next(iter(metadata["tree_metadata"].values())).update(fields)


DAMAGE = {
    "a link outwards": (lambda p: os.symlink("/etc", p / "params"), "is a link to /etc, outside"),
    "a link in a folder": (lambda p: os.symlink("/etc/hostname", p / "params.layers.w" / "0.0.9"), "outside the model directory"),
    "no tree": (lambda p: _metadata(p, lambda m: m.pop("tree_metadata")), "lists no tree; Orbax from 0.5 on writes one"),
    "an entry of nothing": (lambda p: _metadata(p, lambda m: _entry(m, key_metadata=3)), "an entry that is not Orbax's"),
    "a name outwards": (
        lambda p: _metadata(p, lambda m: _entry(m, key_metadata=[{"key": "../../etc"}])),
        "names '../../etc', which is no name inside",
    ),
    "metadata cut": (lambda p: (p / "_METADATA").write_text('{"tree'), "_METADATA is not valid JSON"),
    "an array gone": (lambda p: shutil.rmtree(p / "params.layers.w"), "params/layers/w cannot be read: "),
    "a chunk cut": (lambda p: (p / "params.layers.w/0.0.0").write_bytes(b"x"), "params/layers/w cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_and_traps_are_named(case, saved, tmp_path):
    damage, message = DAMAGE[case]
    copy = shutil.copytree(saved / "v0 ocdbt=False zarr3=False", tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        OrbaxTree(copy).read("params/layers/w", (slice(None), 1, slice(None)))


def test_optimizer_arrays_are_never_read(saved, tmp_path):
    """Nor is their metadata opened before somebody asks for it."""
    copy = shutil.copytree(saved / "v0 ocdbt=False zarr3=False", tmp_path / "copy")
    shutil.rmtree(copy / "opt_state.0.mu")
    tree = OrbaxTree(copy)
    assert "opt_state/0/mu" in tree.leaves
    assert tree.read("params/layers/w", (slice(None), 1, slice(None))).tobytes() == STACKED[:, 1].tobytes()


def test_the_layers_of_a_stacked_array_decode_each_chunk_once(saved, tmp_path):
    """After the first layer the file could be gone."""
    copy = shutil.copytree(saved / "v0 ocdbt=False zarr3=False", tmp_path / "copy")
    tree = OrbaxTree(copy)
    for layer in range(4):
        assert tree.read("params/layers/w", (slice(None), layer, slice(None))).tobytes() == STACKED[:, layer].tobytes()
        (copy / "params.layers.w/0.0.0").unlink(missing_ok=True)
