"""Whether a checkpoint is what was written: the work behind `jaxserve verify`.

Every hash that was recorded, then every tensor's name, shape and type against config.json. Does not know how hashes are
recorded (`records`) nor how tensors lie in files. Holds no state.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from jaxserve.checkpoints import directory, manifest, records
from jaxserve.checkpoints.huggingface import HuggingFaceSource
from jaxserve.checkpoints.load import Format, detect
from jaxserve.checkpoints.orbax_store import OrbaxSource
from jaxserve.checkpoints.source import ParameterSource, TensorSpec
from jaxserve.errors import CheckpointError
from jaxserve.models.registry import make_model
from jaxserve.models.weights import check_complete


@dataclass(frozen=True, slots=True)
class Verification:
    """A checkpoint without a fault.

    Attributes:
        record: what the files were compared with; None if there is nothing, so that only the structure was checked.
        num_files: that a load may read.
        num_bytes: of these files.
        unread: files that lie there and that no load reads; nothing is said of them.
    """

    path: Path
    format: Format
    record: str | None
    num_files: int
    num_bytes: int
    num_tensors: int
    unread: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.num_tensors} tensors, {self.num_files} files of {self.num_bytes / 1e9:.2f} GB"
        beside = f" Not checked, as no load reads them: {', '.join(self.unread)}." if self.unread else ""
        if self.record is not None:
            return f"{self.path}: {what} are as {self.record} says.{beside}"
        return (
            f"{self.path}: there is nothing to compare the files with (no {manifest.HUGGINGFACE_NAME}, no Hugging Face cache). "
            f"Names, shapes and types of {what} fit config.json; `jaxserve verify --write {self.path}` records the files as "
            f"they are.{beside}"
        )


def verify(path: str | Path, *, write: bool = False, show_progress: bool = True) -> Verification:
    """Checks every file and every tensor of a checkpoint; what it says is the same as what a load would find.

    Args:
        path: a directory of either format.
        write: record a Hugging Face directory as it is now, in place of what was recorded before; only the structure is
            checked then.
        show_progress: draw a bar in bytes on stderr if that is a terminal.

    Raises:
        CheckpointError: names each file that is missing, damaged or unexpected, or the tensors that do not fit config.json.
        UnknownModelError: no family is registered for config.json.
    """
    root = Path(path)
    found = detect(root)
    if write:
        _check_writable(root, found)
        tensors = _open(root, found)
        return _described(root, found, tensors, _record(root, tensors.specs))
    names = records.readable(root)
    total = sum(directory.member(root, name).stat().st_size for name in names if (root / name).exists())
    # disable=None: silent unless stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc=root.name, file=sys.stderr,
              disable=None if show_progress else True) as bar:  # fmt: skip
        record = records.check(root, bar.update)
    return _described(root, found, _open(root, found), record.source if record is not None else None)


def _open(root: Path, found: Format) -> ParameterSource:
    """Returns the tensors, whose headers and names were checked against config.json."""
    parameters = make_model(directory.read_json(root, directory.CONFIG)).parameters()
    if found == "huggingface":
        return HuggingFaceSource(root, parameters)
    source = OrbaxSource(root, verify=False)
    check_complete(parameters, {name: spec.shape for name, spec in source.specs.items()}, str(root))
    return source


def _record(root: Path, specs: Mapping[str, TensorSpec]) -> str:
    manifest.write_huggingface(root, specs, records.readable(root))
    return manifest.HUGGINGFACE_NAME


def _check_writable(root: Path, found: Format) -> None:
    if found != "huggingface":
        raise CheckpointError(f"{root} has its {manifest.NAME} already; --write is for Hugging Face directories.")
    if directory.is_snapshot(root.resolve()):
        raise CheckpointError(
            f"{root} is in the Hugging Face cache, which names files by their hash; --write is not needed."
        )


def _described(root: Path, found: Format, tensors: ParameterSource, record: str | None) -> Verification:
    names = records.readable(root)
    own = {manifest.NAME, manifest.HUGGINGFACE_NAME, directory.PARAMS}
    return Verification(
        path=root,
        format=found,
        record=record,
        num_files=len(names),
        num_bytes=sum((root / name).stat().st_size for name in names),
        num_tensors=len(tensors.specs),
        unread=tuple(sorted(entry.name for entry in root.iterdir() if entry.name not in names | own)),
    )
