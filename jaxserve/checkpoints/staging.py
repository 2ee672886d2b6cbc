"""A directory that appears whole or not at all, whatever kills the process or the machine meanwhile.

Knows how to write beside a destination, to flush, to change names in one step, and what killed writers leave. Does not know
what is written. Holds no state but the lock on the directory that it is writing.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxserve.errors import CheckpointError

# A directory with none of these is not a checkpoint, and is never replaced even if asked to. They are written last and
# removed first, so that no reader, ours or not, takes a part for the whole.
MARKS = ("config.json", "manifest.json", "jaxserve_manifest.json")

_STAGING = re.compile(r"\.(tmp|old)-(?P<destination>.+)-[0-9a-f]{8}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <linux/fcntl.h>, <linux/fs.h>


def is_staging(path: Path) -> bool:
    """Returns whether a directory is one that `staged` writes to, or leaves behind when its process is killed."""
    return _STAGING.fullmatch(path.resolve().name) is not None


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
    if not any((destination / mark).is_file() for mark in MARKS):
        raise CheckpointError(
            f"{destination} does not look like a checkpoint (none of {', '.join(MARKS)}), so it is not overwritten; "
            "remove it yourself if that is what you mean."
        )


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `destination` that takes its name when the block ends without an error.

    Everything is on the disk before the name changes, and the name changes in one step: a killed process or a power failure
    leaves the destination as it was or complete. On any error, Ctrl-C included, what was written is removed. Only a killed
    process leaves its `.tmp-*` directory behind; the next writer to the same destination removes it.

    Raises:
        CheckpointError: the destination exists and is not empty and `overwrite` is false, or is no checkpoint; or it cannot
            be written, as on a full disk.
    """
    destination = Path(os.path.abspath(destination))
    try:
        check_destination(destination, overwrite)
        clear_abandoned(destination)
        beside, lock = _locked_directory(destination)
        try:
            yield beside
            _flush(beside)
            check_destination(destination, overwrite)  # again: writing took minutes
            _take_name(beside, destination)
            _flush_directory(destination.parent)
        finally:
            _discard(beside)  # what failed, or the checkpoint that was replaced
            os.close(lock)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}. Nothing was left there.") from error


def clear_abandoned(destination: Path) -> None:
    """Removes what killed writers to `destination` left beside it; a writer that is alive holds a lock on its directory."""
    destination = Path(os.path.abspath(destination))
    for path in destination.parent.iterdir():
        match = _STAGING.fullmatch(path.name)
        if match is None or match["destination"] != destination.name or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another clean-up came first, or it is not ours to remove
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _discard(path)
            finally:
                os.close(descriptor)


def _locked_directory(destination: Path) -> tuple[Path, int]:
    """Returns a new directory and the descriptor whose lock, which ends with the process, says that it is in use."""
    while True:
        beside = destination.parent / f".tmp-{destination.name}-{uuid.uuid4().hex[:8]}"
        beside.mkdir()
        descriptor = os.open(beside, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else can take ours for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if beside.exists():  # else a clean-up took it before it was locked
            return beside, descriptor
        os.close(descriptor)


def _take_name(beside: Path, destination: Path) -> None:
    """Gives `destination` the content of `beside`, and `beside` that of a destination that was not empty."""
    if not destination.exists() or not any(destination.iterdir()):
        beside.rename(destination)  # replaces an empty directory in one step
        return
    if _exchange(beside, destination):
        return
    # Where names cannot be exchanged, a kill between these two lines leaves the old checkpoint under the name `.old-*`.
    retired = beside.with_name(beside.name.replace(".tmp-", ".old-", 1))
    destination.rename(retired)
    try:
        beside.rename(destination)
    except BaseException:
        retired.rename(destination)
        raise
    _discard(retired)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _flush(root: Path) -> None:
    """Waits until every file below `root`, and every name, is on the disk; marks last."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in sorted(names, key=lambda name: name in MARKS):
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(folder))


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Removes a directory, the files that make it a checkpoint first; no error if that fails or it is gone."""
    for mark in MARKS:
        with contextlib.suppress(OSError):
            (path / mark).unlink()
    shutil.rmtree(path, ignore_errors=True)
