"""The arrays of an Orbax payload, written and read by tensorstore itself (ADR 0016).

Orbax would hold a large array twice, and after a failed write its threads go on writing while we clean up. So Orbax writes the
tree, with an array of one element in each place, and this module puts the real ones there; every function here returns, or
raises, when nothing is written any more. Knows where Orbax keeps an array: zarr3 under its dotted name, in the OCDBT store
`state/`. Does not know parameters or manifests. Holds no state.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxserve.checkpoints.safetensors_file import copy_bits
from jaxserve.checkpoints.source import cast

# A chunk is read whole for any part of it: each of 8 shards would read all of a tensor that is one chunk.
_CHUNK_BYTES = 4 << 20
_STRIP_BYTES = 64 << 20

Strip = tuple[slice, ...]


def placeholder(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns what Orbax saves in place of an array that `create` makes room for later."""
    return np.zeros((1,) * len(shape), dtype)


def create(payload: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ts.TensorStore]:
    """Replaces saved placeholders by arrays of these shapes, otherwise as Orbax made them."""
    context = ts.Context()
    saved = _wait_for({path: ts.open(_spec(payload, path), open=True, context=context) for path in shapes})
    return _wait_for(
        {
            path: ts.open(
                _spec(payload, path) | {"metadata": _metadata(saved[path], shape)},
                create=True,
                delete_existing=True,
                context=context,
            )
            for path, shape in shapes.items()
        }
    )


def write(stores: Mapping[str, ts.TensorStore], arrays: Mapping[str, Any]) -> None:
    """Writes whole arrays at once; tensorstore holds them a second time."""
    values = {path: np.asarray(array) for path, array in arrays.items()}
    _wait_for(
        {path: stores[path].write(array, can_reference_source_data_indefinitely=True) for path, array in values.items()}
    )


def write_strip(store: ts.TensorStore, strip: Strip, array: Any) -> None:
    """Writes a part of an array."""
    store[strip].write(np.asarray(array[strip]), can_reference_source_data_indefinitely=True).result()


def strips(store: ts.TensorStore) -> Iterator[Strip]:
    """Yields parts that cover an array, whole chunks of about 64 MB, cut along its longest dimension."""
    shape = tuple(store.shape)
    if not shape:
        yield ()
        return
    axis = max(range(len(shape)), key=shape.__getitem__)
    chunk = store.chunk_layout.write_chunk.shape or shape
    step = max(1, chunk[axis] or shape[axis])
    step_bytes = math.prod(shape) // max(shape[axis], 1) * step * store.dtype.numpy_dtype.itemsize
    length = step * max(1, _STRIP_BYTES // max(1, step_bytes))
    for start in range(0, shape[axis], length):
        yield tuple(slice(start, min(start + length, n)) if i == axis else slice(0, n) for i, n in enumerate(shape))


def read(payload: Path, path: str, dtype: np.dtype) -> np.ndarray:
    """Returns an array cast to `dtype`, holding it and one strip."""
    store = ts.open(_spec(payload, path), open=True).result()
    out = np.empty(store.shape, dtype)
    for strip in strips(store):
        copy_bits(out[strip], cast(store[strip].read().result(), dtype, path))
    return out


def _wait_for(futures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results by name; raises the first error when *all* have ended."""
    errors = [error for error in map(_error_of, futures.values()) if error is not None]
    if errors:
        raise errors[0]
    return {path: future.result() for path, future in futures.items()}


def _error_of(future: Any) -> Exception | None:
    try:
        future.result()
    except Exception as error:
        return error
    return None


def _spec(payload: Path, path: str) -> dict[str, Any]:
    store = os.path.abspath(payload / "state")
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": f"file://{store}/", "path": path.replace("/", ".") + "/"},
    }


def _metadata(saved: ts.TensorStore, shape: tuple[int, ...]) -> dict[str, Any]:
    metadata = saved.spec().to_json()["metadata"]
    chunk = list(_chunk_shape(shape, saved.dtype.numpy_dtype.itemsize))
    metadata["shape"] = list(shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = chunk
    return metadata


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape whose longest dimension was halved until a chunk is small enough; the last one may be padded."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES and max(chunk) > 1:
        longest = max(range(len(chunk)), key=chunk.__getitem__)
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)
