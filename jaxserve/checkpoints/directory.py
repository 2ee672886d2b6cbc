"""The files of a model directory: which names count, what may be followed, and how JSON is read.

Knows file names and limits. Does not know tensors, hashes or jax. Holds no state.
"""

import json
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # Hugging Face
PARAMS = "params"  # Orbax

# What travels with the tensors. Everything else stays behind, custom code (`*.py`) first of all.
SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

MAX_JSON_BYTES = 64 << 20  # an index of 100,000 tensors is 10 MB
MAX_SIDECAR_BYTES = 512 << 20  # the largest published tokenizer.json is below 40 MB


def member(root: Path, name: str) -> Path:
    """Returns the real path of the file `name` of the model directory `root`.

    A symbolic link may lead anywhere inside the root, or, in a Hugging Face cache snapshot, to that repository's blobs.

    Raises:
        CheckpointError: the name is not a plain relative one, or the link leads out of the root.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{root}: {name!r} is not a file name inside the model directory.")
    real_root = root.resolve()
    real = (root / name).resolve()
    if real.is_relative_to(real_root):
        return real
    if is_snapshot(real_root) and real.parent == blobs(real_root):
        return real
    raise CheckpointError(
        f"{root / name} is a link to {real}, outside the model directory; copy the file itself into {root}."
    )


def is_snapshot(real_root: Path) -> bool:
    """Returns whether a directory is a snapshot in a Hugging Face cache: links to that repository's blobs."""
    snapshots = real_root.parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def blobs(real_root: Path) -> Path:
    """Returns where a snapshot's links lead."""
    return real_root.parent.parent / "blobs"


def read_bytes(root: Path, name: str, max_bytes: int = MAX_SIDECAR_BYTES) -> bytes:
    """Returns the content of one file of `root`; CheckpointError if it is missing, a link outwards, or too large."""
    path = member(root, name)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{root / name} is not a regular file.")
        if size > max_bytes:
            raise CheckpointError(f"{root / name} has {size} bytes, more than the {max_bytes} allowed for such a file.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{root / name} cannot be read: {error.strerror}.") from error


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """Returns the JSON object in `data`; CheckpointError naming `source` for anything else, duplicate keys included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{source}: the key {twice!r} is there twice; which of the two is meant is unknown.")
        return keys

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not UTF-8 text (byte {error.start}); the file is damaged.") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}; the file is damaged or incomplete.") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source} is not JSON that can be read: {error}.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{source} must hold a JSON object, it holds a {type(parsed).__name__}.")
    return parsed


def read_json(root: Path, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file of `root`."""
    return parse_json(read_bytes(root, name, MAX_JSON_BYTES), str(root / name))


def read_sidecars(root: Path) -> dict[str, bytes]:
    """Returns {name: content} of the tokenizer, template and generation files that `root` has."""
    return {name: read_bytes(root, name) for name in SIDECARS if (root / name).exists() or (root / name).is_symlink()}
