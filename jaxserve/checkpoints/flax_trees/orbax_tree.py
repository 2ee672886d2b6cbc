"""The arrays of one Orbax tree directory, read lazily: which leaves there are, and parts of them.

Knows the JSON in `_METADATA`, and that a leaf is a zarr array named by its keys with dots, in a
directory or in the item's OCDBT store. Leaves are opened with tensorstore, so that one layer of a stacked tensor is a range read.
Nothing is executed: no handler named in the checkpoint is looked up. There are no checksums to verify. Holds no state.

Source: orbax-checkpoint 0.12.8, `metadata/tree.py` (the JSON) and `serialization/tensorstore_utils.py` (the drivers).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxserve.checkpoints import directory
from jaxserve.checkpoints.flax_trees.orbax_item import METADATA
from jaxserve.checkpoints.source import TensorSpec
from jaxserve.errors import CheckpointError

_ARRAY_TYPES = ("jax.Array", "np.ndarray")
_CACHE_SLACK = 64 << 20


class OrbaxTree:
    """The arrays of one tree directory, by path: keys joined by "/", without the `value` level of an NNX variable.

    Raises:
        CheckpointError: a file leads out of the directory, or the metadata is not Orbax's.
    """

    def __init__(self, path: Path):
        self._path = path
        _refuse_links_outwards(path)
        metadata = directory.read_json(path, METADATA)
        self._is_zarr3 = metadata.get("use_zarr3") is True
        self._is_ocdbt = (path / "manifest.ocdbt").is_file()
        if not self._is_ocdbt and any(child.name.startswith("ocdbt.process_") for child in path.iterdir()):
            raise CheckpointError(f"{path} has no manifest.ocdbt: the checkpoint was not finished, or not copied whole.")
        self._names = _names_of(metadata, path)
        self._specs: dict[str, TensorSpec] = {}
        self._open_leaf: tuple[str, ts.TensorStore] | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """Every array's path; nothing of them is read."""
        return tuple(self._names)

    def spec(self, leaf: str) -> TensorSpec:
        """Returns shape and type from the array's own metadata."""
        if leaf not in self._specs:
            store = self._store(leaf, cache_bytes=0)
            self._specs[leaf] = TensorSpec(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
        return self._specs[leaf]

    def read(self, leaf: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """Returns a part of one array.

        The array's decoded chunks that the part touches are kept until another array is read, so that the layers of a
        stacked tensor, read one after the other, decode each chunk once.
        """
        if self._open_leaf is None or self._open_leaf[0] != leaf:
            self._open_leaf = None  # frees the cache before the next one fills
            self._open_leaf = leaf, self._store(leaf, cache_bytes=self._bytes_of_touched_chunks(leaf, index))
        with _tensorstore_errors(f"{self._path}: {leaf}"):
            return np.asarray(self._open_leaf[1][index].read().result())

    def _bytes_of_touched_chunks(self, leaf: str, index: tuple[int | slice, ...]) -> int:
        if not any(isinstance(part, int) for part in index):
            return 0
        spec = self.spec(leaf)
        chunk = self._store(leaf, cache_bytes=0).chunk_layout.read_chunk.shape or spec.shape
        touched = [
            (chunk[axis] or spec.shape[axis]) if isinstance(part, int) else spec.shape[axis]
            for axis, part in enumerate(index)
        ]
        return math.prod(touched) * spec.dtype.itemsize + _CACHE_SLACK

    def _store(self, leaf: str, *, cache_bytes: int) -> ts.TensorStore:
        name, root = self._names[leaf], {"driver": "file", "path": f"{self._path.resolve()}/"}
        inside = {"driver": "file", "path": f"{root['path']}{name}/"}
        store = {"driver": "ocdbt", "base": root, "path": f"{name}/"} if self._is_ocdbt else inside
        spec = {"driver": "zarr3" if self._is_zarr3 else "zarr", "kvstore": store, "recheck_cached_data": "open"}
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        with _tensorstore_errors(f"{self._path}: {leaf}"):
            return ts.open(spec, read=True, open=True, context=context).result()


class _tensorstore_errors:
    """Tensorstore raises ValueError for files that are missing or damaged; the first line says which."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (ValueError, OSError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self._what} cannot be read: {str(error).splitlines()[0][:300]}") from error


def _names_of(metadata: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Returns {leaf path: name of its zarr array}."""
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path / METADATA} lists no tree; Orbax from 0.5 on writes one, save the checkpoint again.")
    names: dict[str, str] = {}
    for entry in tree.values():
        try:
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path / METADATA} holds an entry that is not Orbax's: {str(entry)[:200]}.") from error
        if kind not in _ARRAY_TYPES:
            continue
        name = ".".join(keys)
        if ".." in name.split("/"):
            raise CheckpointError(f"{path / METADATA} names {name!r}, which is no name inside the directory.")
        if len(keys) > 1 and keys[-1] in ("value", "raw_value"):
            keys.pop()
        leaf = "/".join(keys)
        if leaf in names:
            raise CheckpointError(f"{path / METADATA} has two arrays of the path {leaf}.")
        names[leaf] = name
    if not names:
        raise CheckpointError(f"{path} holds no arrays.")
    return names


def _refuse_links_outwards(path: Path) -> None:
    for parent, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(parent, name)
            if entry.is_symlink():
                directory.member(path, str(entry.relative_to(path)))
