"""From logical axes to a PartitionSpec: the only place that knows which dimension is cut over which mesh axes."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

from sharding import axes

RULES: dict[str, tuple[str, ...]] = {
    axes.EMBED: (),
    axes.PAGES: (),
    axes.VOCAB: axes.TENSOR_AXES,
    axes.HEADS: axes.TENSOR_AXES,
    axes.MLP: axes.TENSOR_AXES,
    axes.FUSED: axes.TENSOR_AXES,
    axes.KV_HEADS: (axes.KV,),
}


def spec_for(logical_axes: Sequence[str | None], rules: dict[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """Returns the PartitionSpec of a tensor with these logical axes, one a dimension; None is not cut.

    Raises:
        ValueError: an axis without a rule, or a mesh axis that two dimensions would be cut over.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for name in logical_axes:
        if name is None:
            entries.append(None)
            continue
        if name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule; known: {', '.join(sorted(rules))}")
        for mesh_axis in rules[name]:
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {name!r} of {tuple(logical_axes)} both use mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = name
        entries.append(rules[name] or None)
    return PartitionSpec(*entries)
