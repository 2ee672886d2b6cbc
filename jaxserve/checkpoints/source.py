"""Where parameters come from while they are written somewhere else: one tensor at a time, in the canonical tree.

Knows shapes, floating-point types and casts. Does not know file formats or jax. Holds no state.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.weights import flatten

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of one stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class ParameterSource(Protocol):
    """Parameters by canonical path, read when asked for."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What there is."""
        ...

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, Any]]:
        """Yields (path, array) in the order of `paths`, holding on to none of them.

        Args:
            dtype: cast to it; None keeps the bits. A source that reads in parts casts in parts.
        """
        ...


class InMemory:
    """A nested or flat dict of numpy or jax arrays as a source."""

    def __init__(self, params: Mapping[str, Any]):
        self._leaves = flatten(params)
        for path, leaf in self._leaves.items():
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise CheckpointError(f"{path} must be an array, it is a {type(leaf).__name__}.")

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {path: TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in self._leaves.items()}

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, Any]]:
        for path in paths:
            leaf = self._leaves[path]
            yield path, leaf if dtype is None else cast(np.asarray(leaf), dtype, path)


class Cast:
    """Another source with every tensor cast to one floating-point type."""

    def __init__(self, source: ParameterSource, dtype: np.dtype):
        self._source = source
        self._dtype = dtype

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {path: TensorSpec(spec.shape, self._dtype) for path, spec in self._source.specs.items()}

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, Any]]:
        return self._source.iterate(paths, dtype or self._dtype)


def float_dtype(name: Any) -> np.dtype:
    """Returns the dtype called "float32", "bfloat16" or "float16" (a numpy or jax dtype will do as well)."""
    try:
        known = name if isinstance(name, str) else np.dtype(name).name
    except TypeError:
        known = repr(name)
    if known not in FLOATS:
        raise CheckpointError(f"dtype must be one of {', '.join(FLOATS)}, got {known}.")
    return FLOATS[known]


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns `values` as `dtype`, rounding to nearest even.

    Raises:
        CheckpointError: a finite value of tensor `name` does not fit float16.
    """
    if values.dtype == dtype:
        return values
    if values.dtype == BFLOAT16:
        # ml_dtypes converts to float32 at 0.2 GB/s; bfloat16 is the upper half of a float32: 1.2 GB/s.
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    try:
        with np.errstate(over="raise", invalid="ignore"):
            return values.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise CheckpointError(
            f"{name} holds values beyond the range of {dtype.name}; convert to bfloat16 or float32 instead."
        ) from error
