"""The manifest of an Orbax directory: what it holds, and the hash of every file.

Orbax payloads carry no checksum of their own (3 of 3 flipped bits loaded silently wrong, see ADR 0008), so this file is
what notices. Knows JSON and sha256. Does not know Orbax or jax. Holds no state.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import directory
from jaxserve.errors import CheckpointError

NAME = "manifest.json"
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
        files: {relative name: (bytes, sha256 in hexadecimal)}, every file but the manifest.
    """

    creator: str
    dtype: str
    num_parameters: int
    num_bytes: int
    parameters: dict[str, tuple[tuple[int, ...], str]]
    files: dict[str, tuple[int, str]]


def write(root: Path, creator: str, parameters: Mapping[str, tuple[tuple[int, ...], str]], num_bytes: int) -> Manifest:
    """Hashes every file under `root` and writes the manifest there."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    dtypes = {dtype for _, dtype in parameters.values()}
    count = 0
    for shape, _ in parameters.values():
        size = 1
        for length in shape:
            size *= length
        count += size
    manifest = Manifest(
        creator=creator,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        num_parameters=count,
        num_bytes=num_bytes,
        parameters=dict(parameters),
        files=dict(zip(names, _hashes(root, names), strict=True)),
    )
    (root / NAME).write_bytes(_render(manifest))
    return manifest


def read(root: Path) -> Manifest:
    """Returns the manifest of `root`, whose own digest is checked first.

    Raises:
        CheckpointError: missing, damaged, edited, or of another format or version.
    """
    source = root / NAME
    data = directory.read_bytes(root, NAME, directory.MAX_JSON_BYTES)
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
            files={k: (v["bytes"], v["sha256"]) for k, v in fields["files"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} is damaged ({error!r}); {_REMEDY}.") from error
    if _render(manifest) != data:
        raise CheckpointError(f"{source} is damaged or was edited: its own sha256 does not match; {_REMEDY}.")
    return manifest


def verify(root: Path, manifest: Manifest) -> None:
    """Hashes every file that the manifest lists.

    Raises:
        CheckpointError: names each file that is missing, of another size, or of another content.
    """
    damaged = []
    for name, (size, _) in manifest.files.items():
        path = directory.member(root, name)
        if not path.is_file():
            damaged.append(f"{name} is missing")
        elif path.stat().st_size != size:
            damaged.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    if not damaged:
        for name, found in zip(manifest.files, _hashes(root, list(manifest.files)), strict=True):
            if found != manifest.files[name]:
                damaged.append(f"{name} has another sha256 than when it was written")
    if damaged:
        shown = "; ".join(damaged[:5]) + ("; ..." if len(damaged) > 5 else "")
        raise CheckpointError(
            f"{root}: {shown}. The checkpoint is damaged: {_REMEDY}. (A file edited on purpose counts as damaged too: "
            "convert the checkpoint again from its source.)"
        )


def _hashes(root: Path, names: list[str]) -> list[tuple[int, str]]:
    def digest(name: str) -> tuple[int, str]:
        try:
            with (root / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256")
                return file.tell(), found.hexdigest()
        except OSError as error:
            raise CheckpointError(f"{root / name} cannot be read: {error.strerror}.") from error

    # Hashing releases the GIL; four threads are past what one disk delivers.
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, names))


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
        "files": {k: {"bytes": n, "sha256": h} for k, (n, h) in manifest.files.items()},
    }
    fields["sha256"] = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return (json.dumps(fields, indent=1) + "\n").encode()
