"""The pieces of a plan made tensors, whatever holds the leaves; and a tree in memory made canonical.

Knows numpy and jax arrays. Reads no files. Holds no state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.checkpoints.flax_trees import arithmetic
from jaxserve.checkpoints.flax_trees.facts import facts_of
from jaxserve.checkpoints.flax_trees.mapping import Mapping as NameMapping
from jaxserve.checkpoints.flax_trees.plan import Piece, Plan, detect, make_plan
from jaxserve.models.weights import Parameter


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
