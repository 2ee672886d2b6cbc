"""The manifest of a directory that jaxserve wrote: what it holds, and the hash of every file.

Neither Orbax payloads (3 of 3 flipped bits loaded silently wrong, see ADR 0008) nor safetensors carry a checksum of their
own, so this file is what notices. Knows JSON and its own layout. Does not know Orbax, safetensors or jax. Holds no state.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import digests, directory
from jaxserve.checkpoints.digests import Digest
from jaxserve.checkpoints.source import TensorSpec
from jaxserve.errors import CheckpointError

NAME = "manifest.json"
HUGGINGFACE_NAME = "jaxserve_manifest.json"  # in a directory that is shared with other programs, which have manifests too
FORMAT = "jaxserve-checkpoint"
VERSION = 1

_REMEDY = "copy the checkpoint again, or convert it again from its source"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        creator: program and version that wrote the directory.
        dtype: the floating-point type of the parameters, or "mixed".
        num_parameters: scalars over all tensors.
        num_bytes: bytes over all tensors.
        parameters: {path: (shape, dtype name)}.
        files: {relative name: sha256}, every file but the manifest.
    """

    creator: str
    dtype: str
    num_parameters: int
    num_bytes: int
    parameters: dict[str, tuple[tuple[int, ...], str]]
    files: dict[str, Digest]


def write(
    root: Path,
    creator: str,
    parameters: Mapping[str, tuple[tuple[int, ...], str]],
    num_bytes: int,
    *,
    name: str = NAME,
    files: Iterable[str] | None = None,
) -> Manifest:
    """Hashes files below `root`, all of them if `files` does not name some, and writes the manifest there."""
    if files is None:
        files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    dtypes = {dtype for _, dtype in parameters.values()}
    manifest = Manifest(
        creator=creator,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        num_parameters=sum(math.prod(shape) for shape, _ in parameters.values()),
        num_bytes=num_bytes,
        parameters=dict(parameters),
        files=digests.of_files(root, sorted(files)),
    )
    partial = root / f".{name}.partial"
    partial.write_bytes(_render(manifest))
    partial.replace(root / name)
    return manifest


def write_huggingface(root: Path, specs: Mapping[str, TensorSpec], files: Iterable[str] | None = None) -> None:
    """Records a Hugging Face directory of these tensors; `files` as in `write`."""
    write(
        root,
        creator=creator(),
        parameters={name: (spec.shape, spec.dtype.name) for name, spec in specs.items()},
        num_bytes=sum(spec.num_bytes for spec in specs.values()),
        name=HUGGINGFACE_NAME,
        files=files,
    )


def read(root: Path, name: str = NAME) -> Manifest:
    """Returns the manifest of `root`, whose own digest is checked first.

    Raises:
        CheckpointError: missing, damaged, edited, or of another format or version.
    """
    source = root / name
    data = directory.read_bytes(root, name, directory.MAX_JSON_BYTES)
    fields = directory.parse_json(data, str(source))
    if fields.get("format") != FORMAT:
        raise CheckpointError(f"{source}: format must be {FORMAT!r}, it says {fields.get('format')!r}.")
    if fields.get("version") != VERSION:
        raise CheckpointError(
            f"{source}: version must be {VERSION}, it says {fields.get('version')!r}; use a matching jaxserve release."
        )
    try:
        manifest = Manifest(
            creator=fields["creator"],
            dtype=fields["dtype"],
            num_parameters=fields["num_parameters"],
            num_bytes=fields["num_bytes"],
            parameters={k: (tuple(v["shape"]), v["dtype"]) for k, v in fields["parameters"].items()},
            files={k: Digest("sha256", v["sha256"], v["bytes"]) for k, v in fields["files"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} is damaged ({error!r}); {_REMEDY}.") from error
    if _render(manifest) != data:
        raise CheckpointError(f"{source} is damaged or was edited: its own sha256 does not match; {_REMEDY}.")
    return manifest


def _render(manifest: Manifest) -> bytes:
    """Returns the one spelling of a manifest; reading compares it byte by byte, so that a flip anywhere is found."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "creator": manifest.creator,
        "dtype": manifest.dtype,
        "num_parameters": manifest.num_parameters,
        "num_bytes": manifest.num_bytes,
        "parameters": {k: {"shape": list(s), "dtype": d} for k, (s, d) in manifest.parameters.items()},
        "files": {k: {"bytes": d.num_bytes, "sha256": d.value} for k, d in manifest.files.items()},
    }
    fields["sha256"] = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return (json.dumps(fields, indent=1) + "\n").encode()


def creator() -> str:
    """Returns this program and its version."""
    try:
        return f"jaxserve {metadata.version('jaxserve')}"
    except metadata.PackageNotFoundError:
        return "jaxserve"
