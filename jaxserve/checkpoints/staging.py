"""A directory that appears whole or not at all.

Knows how to write beside a destination and to rename. Does not know what is written. Holds no state.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxserve.errors import CheckpointError

# A directory with none of these is not a checkpoint, and is never replaced even if asked to.
_CHECKPOINT_MARKS = ("manifest.json", "config.json")


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises CheckpointError if a checkpoint must not be written at `destination`."""
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination}: its parent directory does not exist; create {destination.parent} first.")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise CheckpointError(f"{destination} exists and is not a plain directory; choose another destination.")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{destination} exists and is not empty; choose another, or pass --overwrite (overwrite=True)."
        )
    if not any((destination / mark).is_file() for mark in _CHECKPOINT_MARKS):
        raise CheckpointError(
            f"{destination} does not look like a checkpoint (none of {', '.join(_CHECKPOINT_MARKS)}), so it is not "
            "overwritten; remove it yourself if that is what you mean."
        )


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `destination` that takes its name when the block ends without an error.

    On any error, Ctrl-C included, what was written is removed and the destination is as it was. Only a killed process
    leaves its `.tmp-*` directory behind.

    Raises:
        CheckpointError: the destination exists and is not empty and `overwrite` is false, or is no checkpoint.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, overwrite)
    tag = uuid.uuid4().hex[:8]
    beside = destination.parent / f".tmp-{destination.name}-{tag}"
    beside.mkdir()
    try:
        yield beside
        check_destination(destination, overwrite)  # again: writing took minutes
        retired = None
        if destination.exists():
            retired = destination.parent / f".old-{destination.name}-{tag}"
            destination.rename(retired)
        try:
            beside.rename(destination)
        except BaseException:
            if retired is not None:
                retired.rename(destination)
            raise
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
