"""A foreign tree's leaves, by a mapping, as the tensors that a configuration declares: what comes from where, and what is wrong.

Knows paths and shapes. Reads no tensors and no files. Holds no state.
"""

import difflib
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.checkpoints.flax_trees import mapping as mappings
from jaxserve.checkpoints.flax_trees.axes import Axes
from jaxserve.checkpoints.flax_trees.mapping import Mapping, Rule, fill, normal_path
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter

_SHOWN = 3
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one canonical tensor comes from.

    Attributes:
        leaf: the foreign path, as the tree spells it.
        axes: None leaves the tensor as it is.
        captures: indices of the axes that the rule binds.
        value: an operation on every element.
    """

    leaf: str
    axes: Axes | None
    captures: AbstractMapping[str, int] = field(default_factory=dict)
    value: str | None = None


@dataclass(slots=True)
class Plan:
    """All pieces, and all that keeps them from being the model.

    Attributes:
        pieces: {canonical path: piece}, in the order of the leaves, so that a stacked leaf is read once.
        left_over: leaves below the root that no rule matches.
        problems: sentences about leaves that a rule matches and that do not fit.
    """

    mapping: Mapping
    root: str
    pieces: dict[str, Piece] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unmatched_rules: list[str] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return sum(map(len, (self.missing, self.unknown, self.left_over, self.problems, self.unmatched_rules)))

    @property
    def explained(self) -> int:
        """How many leaves a rule takes somewhere: orders the plans that fail."""
        return len(self.pieces)

    def check(self, source: str) -> None:
        """Raises CheckpointError, one for all of it, unless the plan makes exactly the model."""
        if self.num_faults == 0:
            return
        leaves = [piece.leaf for piece in self.pieces.values()] + self.left_over
        parts = list(self.problems[:_SHOWN])
        if self.missing:
            near = _nearest(self.missing[0], self.left_over)
            hint = f"; nearest left over: {near}" if near else ""
            if self.missing == ["lm_head/kernel"]:
                hint = "; set tie_word_embeddings to true in config.json if the embeddings serve for both"
            parts.append(f"no rule gives {_listed(self.missing)}{hint}")
        if self.unknown:
            targets = list(self.unknown)
            near = _nearest(targets[0], self.missing)
            hint = f"; nearest missing: {near}" if near else ""
            if targets == ["lm_head/kernel"]:
                hint = "; config.json says that the embeddings are tied, set tie_word_embeddings to false if they are not"
            parts.append(f"the configuration has no {_listed(targets)} (from {self.unknown[targets[0]]}){hint}")
        if self.left_over:
            inside = self.left_over[0].removeprefix(f"{self.root}/")
            near = _nearest(inside, [rule.pattern for rule in self.mapping.rules])
            hint = f"; nearest pattern: {near}" if near else ""
            parts.append(f"no rule takes {_listed(self.left_over)}{hint}")
        if self.unmatched_rules:
            near = _nearest(self.unmatched_rules[0], leaves)
            hint = f"; nearest leaf: {near}" if near else ""
            parts.append(f"nothing matches the pattern {_listed(self.unmatched_rules)}{hint}")
        raise CheckpointError(
            f"{source} does not fit the mapping {self.mapping.name} (root {self.root or '.'}; leaves left over: "
            f"{len(self.left_over)}): {'; '.join(parts)}."
        )


def make_plan(
    mapping: Mapping, shapes: AbstractMapping[str, Shape], parameters: Sequence[Parameter], facts: AbstractMapping[str, Any]
) -> Plan:
    """Returns where each of `parameters` comes from.

    Args:
        shapes: {foreign path: shape}.
        facts: see `facts.facts_of`.
    """
    normal = {normal_path(leaf): leaf for leaf in shapes}
    if len(normal) != len(shapes):
        twice = next(leaf for leaf in shapes if normal[normal_path(leaf)] != leaf)
        raise CheckpointError(f"{twice} and {normal[normal_path(twice)]} are the same path, `x_0` and `x/0` being one.")
    rules = [rule for rule in mapping.rules if rule.holds(facts)]
    root = _root(mapping, rules, normal)
    plan = Plan(mapping, root)
    declared = {parameter.path: parameter.shape for parameter in parameters}
    used: set[str] = set()
    for path, leaf in normal.items():
        inside = _below(root, path)
        if inside is None or mapping.ignores(inside):
            continue
        rule, captures = next(((r, c) for r in rules if (c := r.match(inside)) is not None), (None, {}))
        if rule is None:
            plan.left_over.append(leaf)
        else:
            used.add(rule.pattern)
            _add(plan, rule, captures, leaf, shapes[leaf], declared, facts)
    plan.missing = [path for path in declared if path not in plan.pieces]
    if mapping.every_rule_must_match:
        plan.unmatched_rules = [rule.pattern for rule in rules if rule.pattern not in used]
    return plan


def detect(
    shapes: AbstractMapping[str, Shape],
    parameters: Sequence[Parameter],
    facts: AbstractMapping[str, Any],
    source: str,
) -> Plan:
    """Returns the plan of the one built-in mapping under which the tree is exactly the model.

    Raises:
        CheckpointError: there is none, or two that disagree; says what was found and what would fit best.
    """
    plans = [make_plan(mappings.built_in(name), shapes, parameters, facts) for name in mappings.BUILT_IN]
    fitting = [plan for plan in plans if plan.num_faults == 0]
    choices = f"one of {', '.join(mappings.BUILT_IN)}, or a mapping file"
    for other in fitting[1:]:
        if other.pieces != fitting[0].pieces:
            raise CheckpointError(
                f"{source} can be read as {fitting[0].mapping.name} and as {other.mapping.name}, which disagree; "
                f"choose {choices}."
            )
    if fitting:
        return fitting[0]
    best = max(plans, key=lambda plan: (plan.explained, -plan.num_faults))
    found = f"{source} is a tree of no known layout: {len(shapes)} leaves ({_listed(list(shapes))}); choose {choices}"
    if not best.pieces:
        raise CheckpointError(f"{found}.")
    try:
        best.check("it")
    except CheckpointError as error:
        raise CheckpointError(f"{found}. The nearest is {best.mapping.name}, but {error}") from error
    raise AssertionError("a plan with faults passed its check")


def _root(mapping: Mapping, rules: list[Rule], normal: AbstractMapping[str, str]) -> str:
    for root in mapping.roots:
        for path in normal:
            inside = _below(root, path)
            if inside is not None and not mapping.ignores(inside) and any(r.match(inside) is not None for r in rules):
                return root
    return mapping.roots[-1] if mapping.roots else ""


def _below(root: str, path: str) -> str | None:
    if not root:
        return path
    return path[len(root) + 1 :] if path.startswith(root + "/") else None


def _add(
    plan: Plan,
    rule: Rule,
    captures: dict[str, str],
    leaf: str,
    shape: Shape,
    declared: AbstractMapping[str, Shape],
    facts: AbstractMapping[str, Any],
) -> None:
    for template, choices in rule.targets.items():
        fitting = [axes for axes in choices if axes is None or axes.rank == len(shape)]
        if not fitting:
            ranks = " or ".join(repr(axes.text) for axes in choices if axes is not None)
            plan.problems.append(f"{leaf} has shape {shape}, its axes are {ranks}")
            continue
        # The axes of one leaf bind the same captures, whichever of them is chosen for its shape.
        indices = _indices(fitting[0], shape)
        for bound in indices:
            target = fill(template, captures | {name: str(index) for name, index in bound.items()}, facts)
            axes = _choose(plan, fitting, leaf, shape, bound, target, declared, facts)
            if axes == "":
                continue
            if target not in declared:
                plan.unknown.setdefault(target, leaf)
            elif target in plan.pieces:
                plan.problems.append(f"{leaf} and {plan.pieces[target].leaf} both give {target}")
            else:
                plan.pieces[target] = Piece(leaf, None if axes is None or axes.is_identity else axes, bound, rule.value)


def _indices(axes: Axes | None, shape: Shape) -> list[dict[str, int]]:
    result: list[dict[str, int]] = [{}]
    for name, place in (axes.bound if axes is not None else {}).items():
        result = [bound | {name: index} for bound in result for index in range(shape[place])]
    return result


def _choose(
    plan: Plan,
    choices: list[Axes | None],
    leaf: str,
    shape: Shape,
    bound: dict[str, int],
    target: str,
    declared: AbstractMapping[str, Shape],
    facts: AbstractMapping[str, Any],
) -> Any:
    """Returns the axes that give the target its shape, or "" after noting a problem."""
    results: list[tuple[Axes | None, Shape]] = []
    for axes in choices:
        try:
            results.append((axes, shape if axes is None else axes.shape(shape, bound, facts)))
        except CheckpointError as error:
            plan.problems.append(f"{leaf}: {error}")
            return ""
    wanted = declared.get(target)
    matching = [axes for axes, result in results if wanted is None or result == wanted]
    if not matching:
        plan.problems.append(f"{leaf} gives {target} the shape {results[0][1]}, the configuration says {wanted}")
        return ""
    if len(matching) > 1 and wanted is not None:
        texts = " or ".join(repr(axes.text if axes is not None else "as it is") for axes in matching)
        plan.problems.append(f"{leaf} of shape {shape} fits {texts} alike; a mapping file with one of them decides")
        return ""
    return matching[0]


def _nearest(name: str, names: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(dict.fromkeys(names))[:2000], n=2, cutoff=0.3))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
