"""A self-contained Orbax directory: parameters, configuration, tokenizer, and a manifest that notices damage.

    config.json, tokenizer files, chat template, generation_config.json     as Hugging Face wrote them
    params/                                                                 an Orbax v1 checkpoint, nested canonical tree
    manifest.json                                                           see `manifest`

`orbax.checkpoint.v1.load(path / "params")` reads the parameters without jaxserve. Knows Orbax. Does not know model families
or Hugging Face tensors. Holds no state.
"""

import contextlib
import functools
import json
import logging
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxserve.checkpoints import directory, orbax_arrays, records
from jaxserve.checkpoints import manifest as manifests
from jaxserve.checkpoints.directory import PARAMS
from jaxserve.checkpoints.manifest import Manifest
from jaxserve.checkpoints.source import FLOATS, InMemory, ParameterSource, TensorSpec, cast
from jaxserve.checkpoints.staging import staged
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter, check_complete, flatten, unflatten

_MAX_ITEMSIZE = 4

GROUP_BYTES = 256 << 20  # written or read in one Orbax call; a larger tensor goes in strips (`orbax_arrays`)
_CONCURRENT_BYTES = 1 << 30

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in tensorstore's messages, between a page of specifications
_MAX_REASON = 300
_STILL_S = 0.3


def save(
    path: str | Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any] | bytes,
    files: Mapping[str, bytes] | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Writes parameters as a directory that `load` reads; the directory appears whole or not at all.

    Args:
        path: the destination; its parent must exist.
        params: arrays in the canonical tree, nested or {path: array}; numpy or jax, sharded or not.
        config: config.json, as Hugging Face spells it.
        files: tokenizer and template files by name (`directory.SIDECARS`).
        overwrite: replace a checkpoint that is already there.

    Raises:
        CheckpointError: the destination is taken, a leaf is no array, or its type is none that is served.
    """
    return save_from(path, InMemory(params), config, files or {}, overwrite=overwrite)


def save_from(
    path: str | Path,
    source: ParameterSource,
    config: Mapping[str, Any] | bytes,
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> Manifest:
    """Writes what `source` yields, holding at most one group of `GROUP_BYTES` (or one larger tensor) at a time.

    Args:
        on_bytes: told how many bytes of parameters were just written.
    """
    specs = source.specs
    for name, spec in specs.items():
        if spec.dtype not in FLOATS.values():
            raise CheckpointError(f"{name} has dtype {spec.dtype}; allowed are {', '.join(FLOATS)}; cast it first.")
    if not specs:
        raise CheckpointError(f"{path}: there are no parameters to save.")
    if jax.process_count() > 1:
        raise CheckpointError(f"{path}: saving works from one process; gather the parameters to one and save them there.")
    with staged(Path(path), overwrite=overwrite) as root:
        _write_payload(root / PARAMS, source, on_bytes, str(path))
        # Orbax notes where it wrote: a path of this machine, and not even the one the checkpoint will have.
        (root / PARAMS / "commit_success.txt").write_text(f"Checkpoint commit was successful to {PARAMS}\n")
        write_files(root, config, files)
        return manifests.write(
            root,
            creator=manifests.creator(),
            parameters={name: (spec.shape, spec.dtype.name) for name, spec in specs.items()},
            num_bytes=sum(spec.num_bytes for spec in specs.values()),
        )


def _write_payload(payload: Path, source: ParameterSource, on_bytes: Callable[[int], Any], shown: str) -> None:
    specs = source.specs
    shapes = {name: spec.shape for name, spec in specs.items()}
    places = {name: orbax_arrays.placeholder(spec.shape, spec.dtype) for name, spec in specs.items()}
    # Ctrl-C inside a write would leave threads writing into a directory that is being removed. It reaches this thread, which
    # then waits for the other one: at most one group.
    with ThreadPoolExecutor(1) as writer, _orbax_errors(shown, "written"):
        writer.submit(_save_tree, payload, unflatten(places)).result()
        stores = writer.submit(orbax_arrays.create, payload, shapes).result()
        for group in _groups(specs):
            if specs[group[0]].num_bytes <= GROUP_BYTES:
                writer.submit(orbax_arrays.write, stores, dict(source.iterate(group))).result()
                on_bytes(sum(specs[name].num_bytes for name in group))
                continue
            for _, array in source.iterate(group):
                for strip in orbax_arrays.strips(stores[group[0]]):
                    writer.submit(orbax_arrays.write_strip, stores[group[0]], strip, array).result()
                    on_bytes(array[strip].nbytes)
                del array  # before the next one is read


def _save_tree(payload: Path, tree: dict[str, Any]) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False  # zstd takes 24 % off random bfloat16, and loading takes 2.5 times as long
    try:
        with context:
            ocp.save(str(payload), tree)
    except Exception:
        _wait_until_still(payload.parent)
        raise


def _wait_until_still(folder: Path) -> None:
    """Waits for the writes that Orbax leaves running when one of them fails: they would come back after a removal."""
    before = None
    while (now := sorted(str(path) for path in folder.rglob("*"))) != before:
        before = now
        time.sleep(_STILL_S)


def write_files(root: Path, config: Mapping[str, Any] | bytes, files: Mapping[str, bytes]) -> None:
    """Writes the files beside the tensors, and config.json last: without it nobody takes the directory for a model."""
    text = config if isinstance(config, bytes) else (json.dumps(config, indent=2) + "\n").encode()
    directory.parse_json(text, directory.CONFIG)
    for name, data in files.items():
        if name not in directory.SIDECARS:
            raise CheckpointError(f"files may hold {', '.join(directory.SIDECARS)}; got {name!r}.")
        (root / name).write_bytes(data)
    (root / directory.CONFIG).write_bytes(text)


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns config.json."""
    return directory.read_json(Path(path), directory.CONFIG)


def verify(path: str | Path) -> Manifest:
    """Hashes every file and returns the manifest; CheckpointError names each file that is not as it was written."""
    records.check(Path(path))
    return manifests.read(Path(path))


def load(path: str | Path, abstract: Mapping[str, jax.ShapeDtypeStruct], *, verify: bool = True) -> dict[str, jax.Array]:
    """Restores parameters straight to their shards.

    Args:
        abstract: {path: shape, dtype to cast to, sharding}; without a sharding, the first device.
        verify: hash every file first (1.5 GB/s a core; the read that follows comes from the page cache).

    Raises:
        CheckpointError: names the file that is damaged, or the tensors that are missing, unknown or of another shape.
    """
    root = Path(path)
    manifest = manifests.read(root)
    _check_matches(root, manifest, abstract)
    if verify:
        records.check(root)
    _check_payload(root, manifest)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: target if target.sharding is not None else jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=here)
        for name, target in abstract.items()
    }
    return _restore(root, targets)


class OrbaxSource:
    """The parameters of a directory, one group at a time as numpy arrays."""

    def __init__(self, path: str | Path, *, verify: bool = True):
        self._root = Path(path)
        self.manifest = manifests.read(self._root)
        if verify:
            records.check(self._root)
        _check_payload(self._root, self.manifest)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, FLOATS[dtype]) for name, (shape, dtype) in self.manifest.parameters.items()
        }

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for group in _groups({name: self.specs[name] for name in paths}):
            if self.specs[group[0]].num_bytes > GROUP_BYTES:
                with _orbax_errors(self._root / PARAMS, "restored"):
                    yield group[0], orbax_arrays.read(self._root / PARAMS, group[0], dtype or self.specs[group[0]].dtype)
                continue
            arrays = _restore(self._root, {name: _numpy_target(self.specs[name]) for name in group})
            for name in group:
                yield name, cast(arrays.pop(name), dtype or self.specs[name].dtype, name)


def _groups(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, spec in specs.items():
        if group and size + spec.num_bytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += spec.num_bytes
    if group:
        yield group


@contextlib.contextmanager
def _orbax_errors(path: str | Path, done: str) -> Iterator[None]:
    """One line for what Orbax and tensorstore raise: bare `Exception` for some failures, ValueError for a full disk.

    Orbax also logs the traceback of each of its threads, which ends in the same error, and closes its event loop while threads
    of tensorstore still report to it, which prints more of them. None of that is shown.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(_is_no_error)
    sys.unraisablehook = functools.partial(_show_unless_late, hook)
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        text = os.strerror(int(number[1])) if number else " ".join(str(error).split())[:_MAX_REASON]
        raise CheckpointError(f"{path} cannot be {done} by Orbax: {text}.") from error
    else:
        sys.unraisablehook = hook  # after an error it stays: the reports come when they come
    finally:
        logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _show_unless_late(hook: Callable[[Any], Any], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def _concurrent_bytes(largest_bytes: int) -> int:
    """Returns a limit for Orbax, which refuses a tensor that is not smaller than it (a 128,256 x 4,096 embedding is 1 GB)."""
    return max(_CONCURRENT_BYTES, 2 * largest_bytes + 1)


def _restore(root: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Loads exactly `targets` {path: target}.

    With `partial_load` Orbax answers an unknown name, or a numpy target of another shape, with the target itself; every
    caller has compared names and shapes with the manifest, and the manifest with the payload.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    largest = max((math.prod(target.shape) * _MAX_ITEMSIZE for target in targets.values()), default=0)
    context.memory.read_concurrent_bytes = _concurrent_bytes(largest)
    with _orbax_errors(root / PARAMS, "restored"), context:
        tree = ocp.load(os.path.abspath(root / PARAMS), unflatten(targets))
    return {path: functools.reduce(operator.getitem, path.split("/"), tree) for path in targets}


def _numpy_target(spec: TensorSpec) -> np.ndarray:
    """Returns an array that occupies no memory; its type makes Orbax restore numpy."""
    return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)


def _check_payload(root: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the payload holds exactly the tensors that the manifest names."""
    with _orbax_errors(root / PARAMS, "read"):
        tree = ocp.metadata(os.path.abspath(root / PARAMS)).metadata
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{root / PARAMS} holds no tree of tensors; convert the checkpoint again from its source.")
    stored = {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in flatten(tree).items()}
    for name in sorted(stored.keys() | manifest.parameters.keys()):
        held, said = stored.get(name, "nothing"), manifest.parameters.get(name, "nothing")
        if isinstance(held, tuple) and held[1] not in FLOATS:
            raise CheckpointError(f"{root / PARAMS}: {name} has dtype {held[1]}; allowed are {', '.join(FLOATS)}.")
        if held != said:
            raise CheckpointError(
                f"{root / PARAMS} holds {held} as {name}, {manifests.NAME} says {said}; convert the checkpoint again from its "
                "source."
            )


def _check_matches(root: Path, manifest: Manifest, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    expected: Sequence[Parameter] = [Parameter(k, tuple(v.shape), (None,) * len(v.shape)) for k, v in abstract.items()]
    check_complete(expected, {name: shape for name, (shape, _) in manifest.parameters.items()}, str(root))
    for name, target in abstract.items():
        if np.dtype(target.dtype) not in FLOATS.values():
            raise CheckpointError(f"{name} is asked for as {target.dtype}; allowed are {', '.join(FLOATS)}.")
