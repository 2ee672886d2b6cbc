"""A foreign checkpoint as a source of canonical parameters: a plan over an Orbax tree, read piece by piece.

Holds the chunks of one stacked tensor at a time, in `OrbaxTree`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoints.flax_trees import mapping as mappings
from jaxserve.checkpoints.flax_trees.facts import facts_of
from jaxserve.checkpoints.flax_trees.mapping import Mapping as NameMapping
from jaxserve.checkpoints.flax_trees.orbax_tree import OrbaxTree
from jaxserve.checkpoints.flax_trees.pieces import finish, index_of, plan_for
from jaxserve.checkpoints.source import TensorSpec, cast
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

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            piece = self._plan.pieces[path]
            index = index_of(piece, self._tree.spec(piece.leaf).shape, self._facts)
            array = np.ascontiguousarray(finish(piece, self._tree.read(piece.leaf, index), self._facts))
            yield path, array if dtype is None else cast(array, dtype, path)


def choose_mapping(tree: str, file: str | Path | None) -> NameMapping | None:
    """Returns the mapping of a file or of a built-in name; None for "auto"."""
    if file is not None:
        return mappings.read(file)
    return None if tree == AUTO else mappings.built_in(tree)
