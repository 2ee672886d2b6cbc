"""A foreign checkpoint as a source of canonical parameters: a plan over an Orbax tree, read piece by piece.

Holds the chunks of one stacked tensor at a time, in `OrbaxTree`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoints.flax_trees import arithmetic
from jaxserve.checkpoints.flax_trees import mapping as mappings
from jaxserve.checkpoints.flax_trees.facts import facts_of
from jaxserve.checkpoints.flax_trees.mapping import Mapping as NameMapping
from jaxserve.checkpoints.flax_trees.orbax_tree import OrbaxTree
from jaxserve.checkpoints.flax_trees.plan import Piece, Plan, detect, make_plan
from jaxserve.checkpoints.source import TensorSpec
from jaxserve.models.weights import Parameter

AUTO = "auto"


class FlaxTreeSource:
    """The canonical parameters of one Orbax tree directory.

    Attributes:
        specs: in the order in which they are read best, leaf by leaf.
        mapping_name: of the mapping that was given or found.

    Raises:
        CheckpointError: the tree is not, by the mapping, what `parameters` declare.
    """

    def __init__(
        self, path: Path, parameters: Sequence[Parameter], config: Mapping[str, Any], mapping: NameMapping | None = None
    ):
        self._tree = OrbaxTree(path)
        self._facts = facts_of(config)
        shapes = {leaf: self._tree.spec(leaf).shape for leaf in self._tree.leaves}
        self._plan = plan_for(mapping, shapes, parameters, self._facts, str(path))
        self.mapping_name = self._plan.mapping.name
        declared = {parameter.path: parameter.shape for parameter in parameters}
        self.specs: Mapping[str, TensorSpec] = {
            target: TensorSpec(declared[target], self._tree.spec(piece.leaf).dtype)
            for target, piece in self._plan.pieces.items()
        }

    def iterate(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            piece = self._plan.pieces[path]
            index = index_of(piece, self._tree.spec(piece.leaf).shape, self._facts)
            yield path, np.ascontiguousarray(finish(piece, self._tree.read(piece.leaf, index), self._facts))


def plan_for(
    mapping: NameMapping | None,
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Sequence[Parameter],
    facts: Mapping[str, Any],
    source: str,
) -> Plan:
    """Returns a plan without faults: of `mapping`, or of the built-in one that fits."""
    if mapping is None:
        return detect(shapes, parameters, facts, source)
    plan = make_plan(mapping, shapes, parameters, facts)
    plan.check(source)
    return plan


def choose_mapping(tree: str, file: str | Path | None) -> NameMapping | None:
    """Returns the mapping of a file or of a built-in name; None for "auto"."""
    if file is not None:
        return mappings.read(file)
    return None if tree == AUTO else mappings.built_in(tree)


def index_of(piece: Piece, shape: tuple[int, ...], facts: Mapping[str, Any]) -> tuple[int | slice, ...]:
    """Returns what of a leaf the piece is made of."""
    return (slice(None),) * len(shape) if piece.axes is None else piece.axes.index(shape, piece.captures, facts)


def finish(piece: Piece, block: Any, facts: Mapping[str, Any]) -> Any:
    """Returns the canonical tensor from the part of the leaf that `index_of` selected; numpy stays numpy, jax jax."""
    if piece.value is not None:
        block = arithmetic.apply(piece.value, block, facts)
    return block if piece.axes is None else piece.axes.apply(block, facts)


def convert_in_memory(
    leaves: Mapping[str, Any], parameters: Sequence[Parameter], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Returns {canonical path: array} of a tree in memory {path: array}, its layout found among the built-in mappings."""
    facts = facts_of(config)
    plan = plan_for(None, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, parameters, facts, source)
    result: dict[str, Any] = {}
    for target, piece in plan.pieces.items():
        leaf = leaves[piece.leaf]
        part = leaf if piece.axes is None else leaf[index_of(piece, tuple(leaf.shape), facts)]
        result[target] = finish(piece, part, facts)
    return result
