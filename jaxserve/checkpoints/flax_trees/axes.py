"""How the axes of a stored tensor become those of a canonical one, written as einops writes it.

    D N H -> D (N H)               the last two axes become one
    D {layer} N H -> D (N H)       one tensor for each index of the second axis; the index is `layer` in the target's path
    1 K D H -> D (K H)             the slice at index 1 of the first axis
    V<vocab_size D -> V D          of the first axis, the leading `vocab_size` (a number of config.json)
    D N (half pair:2) -> D (N pair half)    an axis cut in two of which one has a given size, and put together again

Knows shapes and how to index, reshape and transpose numpy and jax arrays. Does not know paths. Holds no state.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.checkpoints.flax_trees.arithmetic import evaluate
from jaxserve.errors import CheckpointError

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class _SourceAxis:
    """One axis of the stored tensor.

    Attributes:
        names: of the axes that it is cut into, in order; one unless it was written in parentheses; none if it is indexed.
        sizes: their sizes where given.
        index: taken from it.
        bound: the capture that its index is, one target for each.
        limit: as many leading elements are kept.
    """

    names: tuple[str, ...] = ()
    sizes: tuple[str | None, ...] = ()
    index: int | None = None
    bound: str | None = None
    limit: str | None = None


@dataclass(frozen=True, slots=True)
class Axes:
    """One parsed rule; make it with `parse`."""

    text: str
    source: tuple[_SourceAxis, ...]
    result: tuple[tuple[str, ...], ...]

    @property
    def rank(self) -> int:
        return len(self.source)

    @property
    def bound(self) -> dict[str, int]:
        """{capture: the stored tensor's axis}."""
        return {axis.bound: place for place, axis in enumerate(self.source) if axis.bound is not None}

    @property
    def is_identity(self) -> bool:
        """Whether every tensor of this rank stays as it is."""
        plain = all(len(axis.names) == 1 and axis.limit is None for axis in self.source)
        return plain and self.result == tuple(axis.names for axis in self.source)

    def index(
        self, shape: tuple[int, ...], captures: Mapping[str, int], numbers: Mapping[str, Any]
    ) -> tuple[int | slice, ...]:
        """Returns what is read of a stored tensor for one target.

        Raises:
            CheckpointError: an index or a limit is beyond the axis.
        """
        result: list[int | slice] = []
        for axis, length in zip(self.source, shape, strict=True):
            place = captures[axis.bound] if axis.bound is not None else axis.index
            if place is None:
                stop = length if axis.limit is None else int(evaluate(axis.limit, numbers))
                result.append(slice(0, stop))
            else:
                stop = place + 1
                result.append(place)
            if stop > length:
                raise CheckpointError(f"axes {self.text!r}: an axis of {length} has no {stop} elements.")
        return tuple(result)

    def shape(self, shape: tuple[int, ...], captures: Mapping[str, int], numbers: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the target's shape."""
        sizes = self._sizes(shape, self.index(shape, captures, numbers), numbers)
        return tuple(math.prod(sizes[name] for name in group) for group in self.result)

    def apply(self, block: Any, numbers: Mapping[str, Any]) -> Any:
        """Returns the target from what `index` selected, whose indexed axes are gone."""
        kept = [axis for axis in self.source if axis.names]
        sizes = self._cut(kept, block.shape, numbers)
        before = [name for axis in kept for name in axis.names]
        after = [name for group in self.result for name in group]
        cut = block.reshape([sizes[name] for name in before])
        if before != after:
            cut = cut.transpose([before.index(name) for name in after])
        return cut.reshape([math.prod(sizes[name] for name in group) for group in self.result])

    def _sizes(self, shape: tuple[int, ...], index: tuple[int | slice, ...], numbers: Mapping[str, Any]) -> dict[str, int]:
        lengths = [part.stop for part in index if isinstance(part, slice)]
        return self._cut([axis for axis in self.source if axis.names], tuple(lengths), numbers)

    def _cut(self, axes: list[_SourceAxis], lengths: tuple[int, ...], numbers: Mapping[str, Any]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for axis, length in zip(axes, lengths, strict=True):
            known = [None if size is None else int(evaluate(size, numbers)) for size in axis.sizes]
            product = math.prod(size for size in known if size is not None)
            if product <= 0 or length % product or (None not in known and product != length):
                raise CheckpointError(f"axes {self.text!r}: an axis of {length} cannot be cut into {axis.sizes}.")
            for name, size in zip(axis.names, known, strict=True):
                sizes[name] = length // product if size is None else size
        return sizes


def parse(text: str) -> Axes:
    """Returns the rule that `text` writes.

    Raises:
        CheckpointError: says what of it is not understood.
    """
    left, arrow, right = text.partition("->")
    source = tuple(_source_axis(match, text) for match in _TOKEN.finditer(left))
    names = [name for axis in source for name in axis.names]
    if not arrow:
        right = " ".join(f"({' '.join(axis.names)})" for axis in source if axis.names)
    result = tuple(tuple((m[1] if m[1] is not None else m[2]).split()) for m in _TOKEN.finditer(right))
    if not names or sorted(names) != sorted(name for group in result for name in group) or len(set(names)) != len(names):
        raise CheckpointError(
            f"axes {text!r}: both sides of -> must have the same names, each once; got {names} and {result}."
        )
    bound = [axis.bound for axis in source if axis.bound is not None]
    if len(set(bound)) != len(bound):
        raise CheckpointError(f"axes {text!r} binds {bound[0]} twice.")
    return Axes(text, source, result)


def _source_axis(match: re.Match[str], text: str) -> _SourceAxis:
    if match[1] is not None:
        parts = [part.partition(":") for part in match[1].split()]
        sizes = tuple(size or None for _, _, size in parts)
        if parts and all(_NAME.fullmatch(name) for name, _, _ in parts) and sizes.count(None) <= 1:
            return _SourceAxis(tuple(name for name, _, _ in parts), sizes)
        raise CheckpointError(
            f"axes {text!r}: ({match[1]}) must hold names, all but one with their size, as in (half pair:2)."
        )
    token = match[2]
    if token.isdigit():
        return _SourceAxis(index=int(token))
    if token.startswith("{") and token.endswith("}") and _NAME.fullmatch(token[1:-1]):
        return _SourceAxis(bound=token[1:-1])
    name, _, limit = token.partition("<")
    if _NAME.fullmatch(name) and bool(limit) == ("<" in token):
        return _SourceAxis((name,), (None,), limit=limit or None)
    raise CheckpointError(
        f"axes {text!r}: {token!r} must be a name, {{a capture}}, an index, name<limit, or names in parentheses."
    )
