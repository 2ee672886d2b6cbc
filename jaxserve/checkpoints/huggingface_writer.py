"""Writing a Hugging Face directory: safetensors files of bounded size, their index, and the files beside them.

Tensor files are laid out as the safetensors library lays them out, byte for byte, but streamed: a tensor is read, written and
dropped. Holds no state.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxserve.checkpoints import manifest
from jaxserve.checkpoints.huggingface import INDEX, SINGLE
from jaxserve.checkpoints.orbax_store import write_files
from jaxserve.checkpoints.safetensors_file import DTYPES, copy_bits
from jaxserve.checkpoints.source import InMemory, ParameterSource, TensorSpec
from jaxserve.checkpoints.staging import staged
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter, check_complete

MAX_SHARD_BYTES = 5_000_000_000

_METADATA = {"format": "pt"}  # transformers refuses a file without it
_STRIP_BYTES = 16 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(
    path: str | Path,
    parameters: Sequence[Parameter],
    params: Mapping[str, Any],
    config: Mapping[str, Any] | bytes,
    files: Mapping[str, bytes] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, list[str]]:
    """Writes parameters as a directory that Hugging Face libraries load; it appears whole or not at all.

    Args:
        path: the destination; its parent must exist.
        parameters: every tensor of the model; gives names and orientation.
        params: arrays in the canonical tree, nested or {path: array}.
        config: config.json.
        files: tokenizer and template files by name.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
        overwrite: replace a checkpoint that is already there.

    Returns:
        {file: tensor names in it}.

    Raises:
        CheckpointError: the destination is taken, or `params` are not what `parameters` declare.
    """
    return write_from(
        path, parameters, InMemory(params), config, files or {}, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )


def write_from(
    path: str | Path,
    parameters: Sequence[Parameter],
    source: ParameterSource,
    config: Mapping[str, Any] | bytes,
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> dict[str, list[str]]:
    """Writes what `source` yields, holding what the source holds and one tensor more."""
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, got {max_shard_bytes}.")
    specs = source.specs
    check_complete(parameters, {name: spec.shape for name, spec in specs.items()}, str(path))
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {spec.dtype}; allowed are {', '.join(d.name for d in _NAMES)}.")
    shards = _split(parameters, specs, max_shard_bytes)
    with staged(Path(path), overwrite=overwrite) as root:
        held: dict[str, list[str]] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held[file] = _write_file(root / file, shard, specs, source, on_bytes)
        if len(shards) > 1:
            weight_map = {name: file for file, names in held.items() for name in names}
            index = {
                "metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (root / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        write_files(root, config, files)
        manifest.write_huggingface(root, specs)
    return held


def _split(parameters: Sequence[Parameter], specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[Parameter]]:
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        num_bytes = specs[parameter.path].num_bytes
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += num_bytes
    return shards


def _write_file(
    path: Path,
    shard: Sequence[Parameter],
    specs: Mapping[str, TensorSpec],
    source: ParameterSource,
    on_bytes: Callable[[int], Any],
) -> list[str]:
    # The library's order: wider types first, so that every tensor is aligned; then by name.
    order = sorted(shard, key=lambda p: (_rank(specs[p.path].dtype), p.huggingface_name))
    header: dict[str, Any] = {"__metadata__": _METADATA}
    begin = 0
    for parameter in order:
        spec = specs[parameter.path]
        header[parameter.huggingface_name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(parameter.huggingface_shape),
            "data_offsets": [begin, begin + spec.num_bytes],
        }
        begin += spec.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    by_path = {parameter.path: parameter for parameter in order}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # Read in the source's order, which may hold many tensors in one, and written where each belongs.
        for name, array in source.iterate([name for name in specs if name in by_path]):
            parameter, values = by_path[name], np.asarray(array)
            file.seek(8 + len(text) + header[parameter.huggingface_name]["data_offsets"][0])
            _write_tensor(file, values.T if parameter.is_transposed_in_huggingface else values)
            on_bytes(values.nbytes)
            del array, values  # before the next one is read
    return [p.huggingface_name for p in order]


def _rank(dtype: np.dtype) -> int:
    return list(DTYPES.values()).index(dtype)


def _write_tensor(file: BinaryIO, values: np.ndarray) -> None:
    """Writes in strips, so that a transposed tensor needs no second copy of itself."""
    rows = values.reshape(1, -1) if values.ndim < 2 else values
    strip_rows = max(1, _STRIP_BYTES // max(rows[:1].nbytes, 1))
    for start in range(0, rows.shape[0], strip_rows):
        part = rows[start : start + strip_rows]
        strip = np.empty(part.shape, part.dtype)
        copy_bits(strip, part)
        file.write(strip.view(np.uint8).data)
