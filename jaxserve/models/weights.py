"""Parameters by name: what a checkpoint must hold, whoever wrote it.

The canonical tree is a nested dict with Flax leaf names (`kernel` [in, out], `scale`, `embedding`, `bias`); paths are its keys
joined by "/". Hugging Face names follow from paths by rule. How an engine lays the same numbers out to compute with them is
the family's `served_layout`, not this file's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the canonical tree.

    Attributes:
        path: "layers/0/self_attn/q_proj/kernel".
        shape: as stored canonically.
        axes: a logical axis name (see `sharding.axes`) or None a dimension.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def is_transposed_in_huggingface(self) -> bool:
        """Hugging Face stores matrices [out, in]."""
        return self.path.endswith("/kernel")

    @property
    def huggingface_name(self) -> str:
        stem, _, leaf = self.path.rpartition("/")
        name = stem.replace("/", ".") + "." + ("bias" if leaf == "bias" else "weight")
        return name if stem.startswith("lm_head") else "model." + name

    @property
    def huggingface_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_transposed_in_huggingface else self.shape


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns {path: leaf} of a nested mapping; integer keys and `layers_0` read like `layers/0`."""
    leaves: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                name = str(key)
                head, _, tail = name.rpartition("_")
                if head and tail.isdigit():
                    name = f"{head}/{tail}"
                visit(child, f"{path}/{name}" if path else name)
        else:
            leaves[path] = node

    visit(tree, "")
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of {path: leaf}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def check_complete(parameters: Iterable[Parameter], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError unless `shapes` {path: shape} is exactly what `parameters` declare."""
    expected = {p.path: p.shape for p in parameters}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source}: the parameters do not match the configuration: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
            + "."
        )
    for path, shape in expected.items():
        if tuple(shapes[path]) != shape:
            raise CheckpointError(f"{source}: {path} has shape {tuple(shapes[path])}, the configuration says {shape}.")
