"""What was recorded of a model directory's files, and whether they still are so.

A record is the manifest that jaxserve writes, or the names that huggingface_hub gives the blobs of its cache: sha256 of large
files, git's sha1 of small ones. A directory from elsewhere has none. Does not know tensors or jax. Holds no state.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.checkpoints import digests, directory, manifest
from jaxserve.checkpoints.digests import Digest
from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Record:
    """Hashes of a directory's files.

    Attributes:
        source: what holds them, for messages.
        files: {relative name: digest}.
        remedy: what helps when files differ.
    """

    source: str
    files: Mapping[str, Digest]
    remedy: str


def find(root: Path) -> Record | None:
    """Returns the record of a directory, or None.

    Raises:
        CheckpointError: there is a manifest, and it is damaged.
    """
    if (root / directory.PARAMS).is_dir() and (root / manifest.NAME).exists():
        remedy = (
            "copy the checkpoint again, or convert it again from its source. (A file edited on purpose counts as damaged too: "
            "convert the checkpoint again from its source.)"
        )
        return Record(manifest.NAME, manifest.read(root).files, remedy)
    cached = _cached(root)
    if cached:
        remedy = f"remove the damaged files and {root} from the Hugging Face cache, and fetch the model again"
        return Record("the Hugging Face cache", cached, remedy)
    if os.path.lexists(root / manifest.HUGGINGFACE_NAME):
        remedy = (
            f"copy or convert the checkpoint again. (After an edit on purpose: `jaxserve verify --write {root}` records the "
            "files as they are.)"
        )
        return Record(manifest.HUGGINGFACE_NAME, manifest.read(root, manifest.HUGGINGFACE_NAME).files, remedy)
    return None


def check(root: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Record | None:
    """Hashes every file that the record of `root` lists, and returns the record, if there is one.

    Args:
        on_bytes: told, by one thread at a time, how many bytes were just hashed.

    Raises:
        CheckpointError: names each file that is missing, of another size or content, or that a load would read although it
            was not there when the record was made.
    """
    record = find(root)
    if record is not None:
        _compare(root, record, record.files, readable(root), on_bytes)
    return record


def check_sidecars(root: Path) -> None:
    """The same for config.json, the tokenizer and the other files beside the tensors: before anything is made of them."""
    record = find(root)
    if record is not None:
        beside = {directory.CONFIG, *directory.SIDECARS}
        files = {name: digest for name, digest in record.files.items() if name in beside}
        _compare(root, record, files, readable(root) & beside)


def readable(root: Path) -> set[str]:
    """Returns the names of the files in `root` that a load may read."""
    beside = {directory.CONFIG, *directory.SIDECARS}
    present = {path.name for path in root.iterdir() if not path.is_dir() or path.is_symlink()}
    payload = root / directory.PARAMS
    if payload.is_dir():
        below = {path.relative_to(root).as_posix() for path in payload.rglob("*") if not path.is_dir()}
        return (present & beside) | below
    return {name for name in present if name in beside or name == directory.INDEX or name.endswith(".safetensors")}


def _compare(
    root: Path,
    record: Record,
    expected: Mapping[str, Digest],
    present: set[str],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    clauses = digests.differences(root, expected, on_bytes)
    clauses += [f"{name} is not in {record.source}, but would be read" for name in sorted(present - record.files.keys())]
    if clauses:
        raise CheckpointError(f"{root}: {'; '.join(clauses)}. The checkpoint is damaged: {record.remedy}")


def _cached(root: Path) -> dict[str, Digest]:
    """Returns the digests of a Hub cache's snapshot, whose files are links to blobs; other names say nothing."""
    real_root = root.resolve()
    if not directory.is_snapshot(real_root):
        return {}
    found = {}
    for name in readable(root):
        blob = (root / name).resolve()
        if blob.parent != directory.blobs(real_root):
            continue
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            found[name] = Digest("sha256", blob.name, None)
        elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
            found[name] = Digest("git-sha1", blob.name, None)
    return found
