"""Which directory of an Orbax checkpoint, whoever wrote it, holds the tree of arrays.

    <step>/items/_METADATA       CheckpointManager; the item may have any name, and the step a prefix
    <dir>/state/_METADATA        Orbax v1
    <dir>/_METADATA              PyTreeCheckpointer, StandardCheckpointer, and an item named by itself

Knows Orbax's names of directories; opens no array. Holds no state.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import CheckpointError

METADATA = "_METADATA"
ITEM_NAMES = ("items", "default", "state", "model_params", "params", "model", "pytree")  # the first that is there is taken

_STEP = re.compile(r"(?:.*[._-])?(\d+)")
_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclass(frozen=True, slots=True)
class Item:
    """The directory that holds one tree.

    Attributes:
        step: None where there are no steps.
    """

    path: Path
    step: int | None


def find_item(path: str | Path) -> Item | None:
    """Returns the tree of a checkpoint directory, of its latest finished step if it has steps, or None if it is no such thing.

    Raises:
        CheckpointError: several trees, none of which has a usual name; a checkpoint that was not finished.
    """
    root = Path(path)
    item = _item_of(root)
    if item is not None:
        return Item(item, None)
    steps = sorted((int(m[1]), p.name) for p in _directories(root) if (m := _STEP.fullmatch(p.name)))
    for number, name in reversed(steps):
        item = _item_of(root / name)
        if item is not None:
            return Item(item, number)
    unfinished = [p.name for p in root.iterdir() if _UNFINISHED in p.name] if root.is_dir() else []
    if unfinished or _UNFINISHED in root.name:
        raise CheckpointError(
            f"{root} holds only a checkpoint that was not finished ({', '.join(unfinished) or root.name})."
        )
    return None


def _item_of(path: Path) -> Path | None:
    if _UNFINISHED in path.name:
        return None
    if (path / METADATA).is_file():
        return path
    items = [child.name for child in _directories(path) if (child / METADATA).is_file() and not child.name.isdigit()]
    usual = [name for name in ITEM_NAMES if name in items]
    if usual or len(items) == 1:
        return path / (usual or items)[0]
    if items:
        raise CheckpointError(
            f"{path} holds several trees ({', '.join(sorted(items))}); give the directory of the one with the parameters."
        )
    return None


def _directories(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir() and _UNFINISHED not in child.name] if path.is_dir() else []
