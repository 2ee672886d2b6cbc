"""Hashes of files, and what differs from the hashes that were expected.

Knows sha256 and git's name of a blob. Does not know where expectations come from (`records`). Holds no state.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxserve.checkpoints import directory
from jaxserve.errors import CheckpointError

Algorithm = Literal["sha256", "git-sha1"]

# Hashing releases the GIL; four threads are past what one disk delivers.
_NUM_THREADS = 4
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file's content must hash to.

    Attributes:
        algorithm: "sha256", or "git-sha1": sha1 of "blob <size>" and the content, as git names it.
        value: in hexadecimal.
        num_bytes: of the file; None where only its hash is known.
    """

    algorithm: Algorithm
    value: str
    num_bytes: int | None


def of_files(root: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Returns {name: sha256} of files below `root`."""
    listed = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(listed, pool.map(lambda name: _digest(directory.member(root, name), "sha256"), listed), strict=True))


def differences(
    root: Path, expected: Mapping[str, Digest], on_bytes: Callable[[int], object] = lambda count: None
) -> list[str]:
    """Returns a clause for each file of `root` that is missing, of another size or of another content.

    Args:
        on_bytes: told, by one thread at a time, how many bytes were just hashed.

    Raises:
        CheckpointError: a file that cannot be read, or is a link out of the directory.
    """

    lock = threading.Lock()

    def tell(count: int) -> None:
        with lock:
            on_bytes(count)

    def difference(name: str) -> str | None:
        digest, path = expected[name], directory.member(root, name)
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if digest.num_bytes is not None and size != digest.num_bytes:
            return f"{name} has {size} bytes instead of {digest.num_bytes}"
        if _digest(path, digest.algorithm, tell).value != digest.value:
            return f"{name} has another {digest.algorithm} than when it was written"
        return None

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [clause for clause in pool.map(difference, expected) if clause is not None]


def _digest(path: Path, algorithm: Algorithm, on_bytes: Callable[[int], object] = lambda count: None) -> Digest:
    try:
        with path.open("rb", buffering=0) as file:
            if algorithm == "sha256":
                state = hashlib.sha256()
            else:
                state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            block = memoryview(bytearray(_BLOCK_BYTES))
            num_bytes = 0
            while count := file.readinto(block):
                state.update(block[:count])
                on_bytes(count)
                num_bytes += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return Digest(algorithm, state.hexdigest(), num_bytes)
