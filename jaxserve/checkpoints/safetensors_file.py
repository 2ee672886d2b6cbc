"""One .safetensors file: a checked header, and parts of tensors read without mapping or holding the file.

Knows the safetensors format (https://github.com/huggingface/safetensors#format) for reading. `safetensors.safe_open` judges
every file before this module believes its header; what that lets pass (duplicate names) is refused here. Does not know
models. Holds no state.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxserve.checkpoints import directory
from jaxserve.checkpoints.source import FLOATS, TensorSpec, cast
from jaxserve.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {"F32": FLOATS["float32"], "BF16": FLOATS["bfloat16"], "F16": FLOATS["float16"]}

_MAX_HEADER_BYTES = 32 << 20  # 200,000 tensors; parsing takes 20 times the memory
_STRIP_BYTES = 4 << 20  # read and transposed at a time, by each thread
# numpy transposes 117 MB of bfloat16 at 0.2 GB/s, in tiles of this size at 1.2 GB/s (one core, AVX512 machine)
_TILE_SHORT, _TILE_LONG = 16, 512


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        dtype: as the header spells it: "BF16".
        begin: offset in the file [bytes].
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def spec(self) -> TensorSpec:
        """Shape and numpy type; CheckpointError if the type is none that is served."""
        if self.dtype not in DTYPES:
            remedy = "start from the unquantised checkpoint (bfloat16)"
            raise CheckpointError(
                f"{self.file}: {self.name} has dtype {self.dtype}; allowed are {', '.join(DTYPES)}; {remedy}."
            )
        return TensorSpec(self.shape, DTYPES[self.dtype])


def _opened(path: Path, shown: Path) -> BinaryIO:
    try:
        if not path.is_file():  # opening a named pipe would wait forever
            raise CheckpointError(f"{shown} is not a regular file.")
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be read: {error.strerror}.") from error


def refuse_pickle(path: Path, shown: Path) -> None:
    """Raises CheckpointError if the first bytes are those of a pickle or of an archive, whatever the name says."""
    with _opened(path, shown) as file:
        start = file.read(9)
    if start[4:] == b"\0\0\0\0{":  # the shape of a safetensors header: a length below 4 GB, then JSON
        return
    kind = None
    if start[:4] == b"PK\x03\x04":
        kind = "a zip archive (PyTorch's pickle format)"
    elif start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a pickle"
    if kind:
        raise CheckpointError(
            f"{shown} is {kind}, whatever its name; pickles can run code and are never opened. "
            "Convert it to safetensors first."
        )


def read_header(path: Path, shown: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file.

    Args:
        path: the real file.
        shown: its name for messages.

    Raises:
        CheckpointError: truncated, overlapping, not safetensors, or a name that is there twice.
    """
    refuse_pickle(path, shown)
    with _opened(path, shown) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shown} is not a complete safetensors file: it says that its header has {length} bytes, more than the "
            f"{_MAX_HEADER_BYTES} allowed; copy or download it again."
        )
    try:
        from safetensors import SafetensorError, safe_open  # the engine core runs where it is not installed
    except ImportError as error:
        raise CheckpointError(f"{shown} needs the package safetensors; install it with pip.") from error
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{shown} is not a complete safetensors file ({error}); copy or download it again.") from error
    with _opened(path, shown) as file:
        length = int.from_bytes(file.read(8), "little")
        header = directory.parse_json(file.read(length), f"{shown} (header)")
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read(
    tensor: StoredTensor, index: tuple[slice, ...], dtype: np.dtype, *, is_transposed: bool, pool: Executor
) -> np.ndarray:
    """Returns a part of a tensor: one array of that part's size is held, plus a strip a thread.

    Args:
        index: half-open ranges with step 1 in the *file's* orientation.
        dtype: what to cast to.
        is_transposed: whether the result is the transpose of what the file has.
    """
    stored = tensor.spec.dtype
    if not tensor.shape:
        return read(_as_vector(tensor), (slice(0, 1),), dtype, is_transposed=False, pool=pool).reshape(())
    bounds = [s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)]
    shape = tuple(stop - start for start, stop in bounds)
    out = np.empty(shape[::-1] if is_transposed else shape, dtype)
    target = out.T if is_transposed else out
    row_bytes = int(np.prod(tensor.shape[1:], dtype=np.int64)) * stored.itemsize
    strip_rows = max(_TILE_SHORT, _STRIP_BYTES // max(row_bytes, 1))
    first, last = bounds[0]
    columns = tuple(slice(*b) for b in bounds[1:])

    def fill(start: int) -> None:
        stop = min(start + strip_rows, last)
        strip = np.empty((stop - start, *tensor.shape[1:]), stored)
        _read_exactly(descriptor, strip, tensor.begin + start * row_bytes, tensor)
        part = cast(strip[(slice(None), *columns)], dtype, f"{tensor.file}: {tensor.name}")
        copy_bits(target[start - first : stop - first], part)

    with tensor.file.open("rb") as file:
        descriptor = file.fileno()
        for _ in pool.map(fill, range(first, last, strip_rows)):
            pass
    return out


def _as_vector(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.name, tensor.file, tensor.dtype, (1,), tensor.begin)


def _read_exactly(descriptor: int, into: np.ndarray, offset: int, tensor: StoredTensor) -> None:
    view = into.view(np.uint8).reshape(-1).data
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: {tensor.name} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise CheckpointError(f"{tensor.file}: {tensor.name} ends too early; the file was cut while it was read.")
        view, offset = view[count:], offset + count


def copy_bits(target: np.ndarray, part: np.ndarray) -> None:
    """Assigns `part` as plain integers (numpy drops the GIL for those), in tiles where one of the two is transposed."""
    bits = np.dtype(f"u{part.dtype.itemsize}")
    target, part = target.view(bits), part.view(bits)
    if part.ndim != 2 or part.flags.c_contiguous == target.flags.c_contiguous:
        target[...] = part
        return
    # The short side lies along the target's contiguous dimension: the other way round is 2-5 times slower.
    height, width = (_TILE_LONG, _TILE_SHORT) if target.flags.c_contiguous else (_TILE_SHORT, _TILE_LONG)
    rows, columns = part.shape
    for j in range(0, columns, width):
        for i in range(0, rows, height):
            target[i : i + height, j : j + width] = part[i : i + height, j : j + width]
