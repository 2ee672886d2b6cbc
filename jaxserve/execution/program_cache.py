"""Compiled programs that are kept between starts: one that is found is neither traced nor lowered nor compiled.

Knows files; what a program depends on is `program_key`'s. An entry is a serialized executable, which can run code as it is
loaded: only entries that this user alone can have written are read. Whatever is wrong with an entry, the program is compiled
and the entry replaced. Processes may share a directory.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxserve.execution import program_key
from jaxserve.execution.compilation import process_counter
from jaxserve.execution.program_key import UnknownDependency

_MAGIC = b"jaxserve program 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size

MAX_BYTES = 2 << 30
"""Of all entries; beyond it those go that were not used for longest."""

_UNFINISHED = ".tmp"
_UNFINISHED_S = 3600.0


class ProgramCache:
    """The programs of one process on one set of devices.

    Args:
        directory: where the entries are; made if it is not there, and not used if others can write to it. None keeps nothing.
        devices: on which the programs run, in the mesh's order.
        ingredients: what most programs depend on, the model for instance. One that cannot be in a key keeps nothing.

    Attributes:
        num_loaded, num_compiled: programs so far.
        reasons: why programs were compiled that might have been kept.
    """

    def __init__(self, directory: str | Path | None = None, devices: Iterable[jax.Device] = (), ingredients: Any = None):
        self.num_loaded = self.num_compiled = 0
        self.reasons: set[str] = set()
        self._devices = tuple(devices)
        self._lock = threading.Lock()  # of the counts: programs are loaded by several threads
        self._directory: Path | None = None
        if directory is None:
            return
        try:
            program_key.describe(ingredients)
            self._process = program_key.describe_process(self._devices)
            self._directory = _private(Path(directory))
        except (UnknownDependency, OSError) as error:
            self.reasons.add(str(error))

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._directory is not None

    def load_or_compile(
        self, compile_program: Callable[[], Any], function: Any, in_specs: Any, out_specs: Any, arguments: Any, *options: Any
    ) -> Any:
        """Returns the kept program, or else the one that `compile_program` returns, and keeps it.

        Args:
            compile_program: () -> jax.stages.Compiled; called from where our sources are in the key.
            function: what is traced.
            in_specs, out_specs: trees of PartitionSpec.
            arguments: the tuple of abstract arguments.
            options: whatever else the program depends on.
        """
        try:
            path = self._path(function, in_specs, out_specs, arguments, *options)
        except UnknownDependency as unknown:
            self.reasons.add(str(unknown))
            path = None
        in_tree = jax.tree.structure((arguments, {}))
        out_tree = jax.tree.structure(out_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        program = None if path is None else self._load(path, in_tree, out_tree)
        is_loaded = program is not None
        if program is None:
            num_hits = process_counter().num_cache_hits()
            program = compile_program()
            if path is not None and process_counter().num_cache_hits() == num_hits:
                self._store(path, program, in_tree, out_tree)
            elif (
                path is not None
            ):  # XLA:CPU (jax 0.10.2) serializes what it has loaded without an error, and without its functions
                self.reasons.add("jax's persistent cache had them already")
        with self._lock:
            self.num_loaded += is_loaded
            self.num_compiled += not is_loaded
        return program

    def _path(self, *dependencies: Any) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / program_key.digest(self._process, program_key.describe(dependencies))

    def _load(self, path: Path, in_tree: Any, out_tree: Any) -> Any:
        payload = self._read(path)
        if payload is None:
            return None
        try:
            from jax.experimental.serialize_executable import deserialize_and_load

            program = deserialize_and_load(payload, in_tree, out_tree, execution_devices=self._devices)
        except Exception as error:  # jax and its plugins say in many ways that they cannot
            self.reasons.add(f"loading: {type(error).__name__}: {error}")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        return program

    def _read(self, path: Path) -> bytes | None:
        """Returns the payload of an entry that is whole and that nobody else can have written."""
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                objection = _objection(path, os.fstat(file.fileno()), stat.S_ISREG)
                data = file.read() if objection is None else b""
        except FileNotFoundError:
            return None
        except OSError as error:  # a symbolic link, for instance
            self.reasons.add(f"reading: {error}")
            return None
        if objection is not None:
            self.reasons.add(objection)
            return None
        payload = data[len(_MAGIC) + _DIGEST_BYTES :]
        if data[: len(_MAGIC) + _DIGEST_BYTES] != _header(path, payload):
            self.reasons.add(f"{path} is damaged")
            return None
        return payload

    def _store(self, path: Path, program: Any, in_tree: Any, out_tree: Any) -> None:
        try:
            from jax.experimental.serialize_executable import serialize

            payload, *trees = serialize(program)
        except Exception as error:  # likewise
            self.reasons.add(f"serializing: {type(error).__name__}: {error}")
            return
        if trees != [in_tree, out_tree]:
            self.reasons.add(f"serializing: expected the trees {in_tree} and {out_tree}, got {trees}")
            return
        try:
            self._make_room(len(payload))
            with _staged(path) as file:
                file.write(_header(path, payload))
                file.write(payload)
        except OSError as error:
            self.reasons.add(f"writing: {error}")

    def _make_room(self, num_bytes: int) -> None:
        """Removes what other processes left unfinished, and the entries that were not used for longest."""
        assert self._directory is not None
        found = []
        for entry in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry))
        newest = max((mtime for mtime, _, _ in found), default=0.0)
        total = num_bytes + sum(size for _, size, _ in found)
        for mtime, size, entry in sorted(found):
            is_unfinished = entry.suffix == _UNFINISHED and mtime < newest - _UNFINISHED_S
            if is_unfinished or total > MAX_BYTES:
                entry.unlink(missing_ok=True)
                total -= size


def _header(path: Path, payload: bytes) -> bytes:
    """Returns what stands before the payload: its digest, and the name's, so that an entry under another name is damaged."""
    return _MAGIC + hashlib.sha256(path.name.encode() + payload).digest()


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Any]:
    """A file that appears under its name whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=_UNFINISHED)
    try:
        with open(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _private(directory: Path) -> Path | None:
    """Returns the directory, made if need be; None and a warning if somebody else can write to it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    objection = _objection(directory, directory.lstat(), stat.S_ISDIR)
    if objection is not None:
        warnings.warn(f"Compiled programs are not kept: {objection}.", stacklevel=2)
        return None
    return directory


def _objection(path: Path, status: os.stat_result, is_expected: Callable[[int], bool]) -> str | None:
    """Returns why a file or directory may hold what somebody else has put there, or None."""
    if is_expected(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return (
        f"{path} must belong to this user and be writable by nobody else; it belongs to user {status.st_uid} and has mode "
        f"{stat.filemode(status.st_mode)}. Remove it, or choose another compilation_cache_dir"
    )
