"""Single arrays of an Orbax payload, read and written in strips.

Orbax hands tensorstore an array as a whole, and tensorstore encodes every chunk of it before it waits for the disk: an array
is there twice. Those that are too large for that come through here (ADR 0016). Knows where Orbax keeps an array: zarr3 under
its dotted name, in the OCDBT store `state/`. Does not know parameters or manifests. Holds no state.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxserve.checkpoints.safetensors_file import copy_bits
from jaxserve.checkpoints.source import cast

_CHUNK_BYTES = 4 << 20  # as `orbax_store` asks Orbax for
_STRIP_BYTES = 64 << 20

Strip = tuple[slice, ...]


def placeholder(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns what Orbax is given to save in place of an array that `create` and `write` put there later."""
    return np.zeros((1,) * len(shape), dtype)


def create(payload: Path, path: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """Replaces a saved placeholder by an array of this shape, otherwise as Orbax made it."""
    spec = _open(payload, path).spec().to_json()
    # Orbax opens zarr3 behind a cast; what is below it says how the array is stored.
    spec = spec.get("base", spec)
    chunk = _chunk_shape(shape, np.dtype(ts.dtype(spec["dtype"]).numpy_dtype).itemsize)
    metadata = spec["metadata"]
    metadata["shape"] = list(shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(chunk)
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = list(chunk)
    fresh = {"driver": "zarr3", "kvstore": _location(payload, path), "metadata": metadata}
    return ts.open(fresh, create=True, delete_existing=True).result()


def strips(store: ts.TensorStore) -> Iterator[Strip]:
    """Yields parts that cover an array, whole chunks of about 64 MB, cut along its longest dimension."""
    shape = tuple(store.shape)
    axis = max(range(len(shape)), key=shape.__getitem__)
    step = max(1, (store.chunk_layout.write_chunk.shape or shape)[axis])
    slice_bytes = math.prod(shape) // max(shape[axis], 1) * store.dtype.numpy_dtype.itemsize
    length = step * max(1, _STRIP_BYTES // max(1, step * slice_bytes))
    for start in range(0, shape[axis], length):
        yield tuple(slice(start, min(start + length, n)) if i == axis else slice(0, n) for i, n in enumerate(shape))


def write(store: ts.TensorStore, strip: Strip, array: Any) -> None:
    """Writes one part, and waits until it is on the disk."""
    store[strip].write(np.asarray(array[strip]), can_reference_source_data_indefinitely=True).result()


def read(payload: Path, path: str, dtype: np.dtype) -> np.ndarray:
    """Returns an array cast to `dtype`, holding it and one strip."""
    store = _open(payload, path)
    out = np.empty(store.shape, dtype)
    for strip in strips(store):
        copy_bits(out[strip], cast(store[strip].read().result(), dtype, path))
    return out


def _open(payload: Path, path: str) -> ts.TensorStore:
    return ts.open({"driver": "zarr3", "kvstore": _location(payload, path)}, open=True).result()


def _location(payload: Path, path: str) -> dict[str, Any]:
    store = os.path.abspath(payload / "state")
    return {"driver": "ocdbt", "base": f"file://{store}/", "path": path.replace("/", ".") + "/"}


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape whose longest dimension was halved until a chunk is small enough; the last one may be padded."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES and max(chunk) > 1:
        longest = max(range(len(chunk)), key=chunk.__getitem__)
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)
