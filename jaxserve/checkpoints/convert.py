"""Hugging Face directory to Orbax directory and back, and Flax programs' own trees to either: the work behind `jaxserve convert`.

Streams: the process holds one group of tensors (`orbax_store.GROUP_BYTES`, or one larger tensor) and what Orbax copies of
it, whatever the size of the model. Knows what is copied beside the tensors. Does not know how either format lies on disk.
Holds no state.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxserve.checkpoints import directory, huggingface_writer, orbax_store, records
from jaxserve.checkpoints.flax_trees.checkpoint import FlaxOptions, find_checkpoint
from jaxserve.checkpoints.huggingface import HuggingFaceSource
from jaxserve.checkpoints.load import FORMATS, Format, detect
from jaxserve.checkpoints.orbax_store import OrbaxSource
from jaxserve.checkpoints.source import Cast, ParameterSource, float_dtype
from jaxserve.checkpoints.staging import check_destination, clear_abandoned
from jaxserve.errors import CheckpointError
from jaxserve.models.registry import make_model
from jaxserve.models.weights import Parameter, check_complete


@dataclass(frozen=True, slots=True)
class ConversionSummary:
    """What `convert` did.

    Attributes:
        format: of the destination.
        layout: of the source: its format, or the mapping by which a Flax program's own tree was read, and its step.
        dtype: of the destination's tensors, or "mixed".
        num_parameters: scalars.
        num_bytes: of tensors, as written.
        files: copied beside the tensors, config.json included.
        elapsed_s: wall time.
    """

    source: Path
    destination: Path
    format: Format
    layout: str
    dtype: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    files: tuple[str, ...]
    elapsed_s: float


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Any = None,
    to: Format = "orbax",
    show_progress: bool = True,
    max_shard_bytes: int = huggingface_writer.MAX_SHARD_BYTES,
    overwrite: bool = False,
    flax: FlaxOptions | None = None,
) -> ConversionSummary:
    """Writes the checkpoint at `source` in another format, type or both.

    Without `dtype` every tensor keeps its bits, and config.json and the tokenizer files their bytes. On any error, Ctrl-C
    included, the destination is as it was.

    Args:
        source: a directory of either format, or a Flax program's own Orbax checkpoint.
        destination: a directory that does not exist yet, or is empty.
        dtype: cast to "float32", "bfloat16" or "float16"; config.json then says so too.
        to: the format to write.
        show_progress: draw a bar in bytes on stderr if that is a terminal.
        max_shard_bytes: size of the files of a Hugging Face destination.
        overwrite: replace a checkpoint that is at the destination.
        flax: how to read a Flax program's own checkpoint; one is recognised without it too.

    Raises:
        CheckpointError: source missing, damaged or not what its config.json says; destination taken; disk full.
        UnknownModelError: no family is registered for the source.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(os.path.abspath(destination))
    if to not in FORMATS:
        raise CheckpointError(f"to must be one of {', '.join(FORMATS)}, got {to!r}.")
    _check_apart(source, destination)
    check_destination(destination, overwrite)
    clear_abandoned(destination)  # before room is looked for
    found = find_checkpoint(source, flax) or _Directory(source, detect(source))
    records.check(source)
    config_bytes = found.read_config()
    config = directory.parse_json(config_bytes, str(found.config_path))
    parameters = make_model(config).parameters()
    tensors, layout = found.open(parameters, config)
    if dtype is not None:
        tensors = Cast(tensors, float_dtype(dtype))
        config_bytes = _with_dtype(config, float_dtype(dtype).name)
    files = found.read_files()
    num_bytes = sum(spec.num_bytes for spec in tensors.specs.values())
    _check_space(destination, num_bytes)
    # disable=None: silent unless stderr is a terminal
    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=destination.name, file=sys.stderr,
               disable=None if show_progress else True)  # fmt: skip
    options = {"overwrite": overwrite, "on_bytes": bar.update}
    with bar:
        if to == "orbax":
            orbax_store.save_from(destination, tensors, config_bytes, files, **options)
        else:
            options["max_shard_bytes"] = max_shard_bytes
            huggingface_writer.write_from(destination, parameters, tensors, config_bytes, files, **options)
    names = (directory.CONFIG, *files)
    return _summary(source, destination, to, layout, tensors, names, time.monotonic() - started)


def _summary(
    source: Path,
    destination: Path,
    to: Format,
    layout: str,
    tensors: ParameterSource,
    files: tuple[str, ...],
    elapsed_s: float,
) -> ConversionSummary:
    specs = tensors.specs
    dtypes = {spec.dtype.name for spec in specs.values()}
    return ConversionSummary(
        source=source,
        destination=destination,
        format=to,
        layout=layout,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        num_tensors=len(specs),
        num_parameters=sum(spec.num_bytes // spec.dtype.itemsize for spec in specs.values()),
        num_bytes=sum(spec.num_bytes for spec in specs.values()),
        files=files,
        elapsed_s=elapsed_s,
    )


@dataclass(frozen=True, slots=True)
class _Directory:
    """A source of one of our two formats."""

    path: Path
    format: Format

    @property
    def config_path(self) -> Path:
        return self.path / directory.CONFIG

    def read_config(self) -> bytes:
        return directory.read_bytes(self.path, directory.CONFIG, directory.MAX_JSON_BYTES)

    def read_files(self) -> dict[str, bytes]:
        return directory.read_sidecars(self.path)

    def open(self, parameters: tuple[Parameter, ...], config: dict[str, Any]) -> tuple[ParameterSource, str]:
        """Returns the tensors of a source whose files are as they were recorded, and what they are called."""
        if self.format == "huggingface":
            return HuggingFaceSource(self.path, parameters), self.format
        stored = OrbaxSource(self.path, verify=False)
        check_complete(parameters, {name: spec.shape for name, spec in stored.specs.items()}, str(self.path))
        return stored, self.format


def _check_apart(source: Path, destination: Path) -> None:
    one, other = source.resolve(), destination.resolve()
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        raise CheckpointError(f"{destination} and {source} must not lie in one another; choose another destination.")


def _check_space(destination: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < num_bytes * 1.02:
        raise CheckpointError(f"{destination.parent} has {free} bytes free, the checkpoint needs {num_bytes}.")


def _with_dtype(config: dict[str, Any], dtype: str) -> bytes:
    spellings = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]  # transformers 5 and 4
    return (json.dumps(config | dict.fromkeys(spellings, dtype), indent=2) + "\n").encode()
