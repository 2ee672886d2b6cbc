"""`@struct`: a frozen dataclass that is a pytree.

Unflattening bypasses `__init__`, so that tracers, shapes and shardings can stand where arrays do; jax's own
`register_dataclass` runs `__init__` (and what it checks) again on each of them.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")

Leaf = Any
"""A field of a struct: an array, or in the same tree its shape, its PartitionSpec or its sharding."""


@dataclass_transform(frozen_default=True)
def struct(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose fields are all children of a pytree node."""
    frozen = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(frozen))  # type: ignore[arg-type]

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names), None

    def unflatten(_: None, children: Any) -> Any:
        node = object.__new__(frozen)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(node, name, child)
        return node

    jax.tree_util.register_pytree_with_keys(frozen, flatten_with_keys, unflatten)
    return frozen
