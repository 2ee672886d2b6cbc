"""Mapping files: which leaf of a foreign tree is which tensor of the canonical tree. YAML (or JSON, which is YAML).

    roots: ["params/params", "params", ""]          the first of these below which a rule matches is where the tree begins;
                                                     leaves beside it (optimizer state, step) are never read
    ignore: ["vision_encoder/**"]                    leaves below the root that are no part of the model
    every_rule_must_match: true                      the default; the built-in maps, which serve several families, say false
    rules:                                           in order: the first whose `from` matches a leaf, and whose `when` holds
      - from: decoder/layers/mlp/wi_0/kernel
        to: {"layers/{layer}/mlp/gate_proj/kernel": "D {layer} F -> D F"}
      - from: decoder/layers_{layer}/self_attention/query/kernel
        to: {"layers/{layer}/self_attn/q_proj/kernel": "D N H -> D (N H)"}
        value: x * sqrt(head_dim)
        when: {model_type: [llama, mistral]}

`from`: path with `{name}` for a number, `{+name}` for one or more levels, `*` for anything within a level, `**` for any levels.
A level `layers_0` may be written `layers/0` and the other way round.
`to`: a canonical path (then the tensor stays as it is), or several with their axes (see `axes`; null leaves them as they are;
a list means the one that gives the target's shape). Captures are filled in, with arithmetic: `layers/{2*pair+1}/...`.
`value`: one operation on every element, in float32, rounded once to the stored type.
`when`: fields of config.json (rope_type and head_dim among them, also where it leaves them out) and the values they must have.

Knows the format and checks it. Does not know which leaves there are. Holds no state.
"""

import re
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxserve.checkpoints.flax_trees import arithmetic, axes
from jaxserve.checkpoints.flax_trees.axes import Axes
from jaxserve.errors import CheckpointError

BUILT_IN = ("canonical", "maxtext", "linen", "nnx", "tunix", "gemma")

_MAPS = Path(__file__).parent / "maps"
_MAX_BYTES = 4 << 20
_CAPTURE = re.compile(r"\{([^{}]*)\}")
_NUMBERED = re.compile(r"_(\d+|\{[A-Za-z]\w*\}|#\d+#)(?=/|$)")
_PATTERN_PARTS = re.compile(r"\{(\+?)([A-Za-z_]\w*)\}|(\*\*)|(\*)")


def normal_path(path: str) -> str:
    """Returns a path with every `layers_0` written `layers/0`, as `models.weights.flatten` has it."""
    return _NUMBERED.sub(r"/\1", path)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a pattern, where its leaf goes, and how.

    Attributes:
        targets: {path with captures: the axes of which one is chosen by shape; None leaves the tensor as it is}.
    """

    pattern: str
    targets: AbstractMapping[str, tuple[Axes | None, ...]]
    value: str | None = None
    when: AbstractMapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def match(self, path: str) -> dict[str, str] | None:
        """Returns the captures of a normal path, or None."""
        found = compiled(self.pattern).fullmatch(path)
        return found.groupdict() if found else None

    def holds(self, facts: AbstractMapping[str, Any]) -> bool:
        return all(facts.get(name) in values for name, values in self.when.items())


@dataclass(frozen=True, slots=True)
class Mapping:
    """A whole mapping file."""

    name: str
    roots: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    every_rule_must_match: bool = True

    def ignores(self, path: str) -> bool:
        return any(compiled(pattern).fullmatch(path) for pattern in self.ignore)


def fill(template: str, captures: AbstractMapping[str, str], facts: AbstractMapping[str, Any]) -> str:
    """Returns a target's path with its captures and arithmetic filled in."""
    numbers = dict(facts) | {name: int(text) for name, text in captures.items() if text.isdigit()}

    def value(match: re.Match[str]) -> str:
        inside = match[1]
        if inside in captures:
            return captures[inside]
        if inside.removeprefix("+") in captures:
            return captures[inside[1:]]
        return str(int(arithmetic.evaluate(inside, numbers)))

    return _CAPTURE.sub(value, template)


_compiled: dict[str, re.Pattern[str]] = {}


def compiled(pattern: str) -> re.Pattern[str]:
    """Returns the regular expression of a `from` pattern over normal paths."""
    if pattern not in _compiled:
        text, end = "", 0
        normal = normal_path(pattern)
        for match in _PATTERN_PARTS.finditer(normal):
            text += re.escape(normal[end : match.start()])
            if match[2]:
                text += f"(?P<{match[2]}>.+)" if match[1] else f"(?P<{match[2]}>\\d+)"
            else:
                text += ".*" if match[3] else "[^/]*"
            end = match.end()
        try:
            _compiled[pattern] = re.compile(text + re.escape(normal[end:]))
        except re.error as error:
            raise CheckpointError(f"pattern {pattern!r}: {error}; a capture may be there once.") from error
    return _compiled[pattern]


def built_in(name: str) -> Mapping:
    """Returns a built-in mapping; CheckpointError lists the names there are."""
    return parse(text_of(name), name)


def text_of(name: str) -> str:
    """Returns the file of a built-in mapping, comments included, as a start for one's own."""
    if name not in BUILT_IN:
        raise CheckpointError(f"tree must be one of auto, {', '.join(BUILT_IN)}, got {name!r}.")
    return (_MAPS / f"{name}.yaml").read_text()


def read(path: str | Path) -> Mapping:
    """Returns the mapping in a user's file."""
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} has more than the {_MAX_BYTES} bytes allowed for a mapping file.")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CheckpointError(f"the mapping file {file} cannot be read: {reason}.") from error
    return parse(text, str(file))


def parse(text: str, source: str) -> Mapping:
    """Returns the mapping that `text` holds.

    Raises:
        CheckpointError: names the rule and the field that are not as the module says.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{source} is not valid YAML: {error}") from error
    _check_keys(data, {"roots", "ignore", "every_rule_must_match", "rules"}, source)
    must_match = data.get("every_rule_must_match", True)
    if not isinstance(must_match, bool):
        raise CheckpointError(f"{source}: every_rule_must_match must be true or false, got {must_match!r}.")
    rules = data.get("rules")
    if not isinstance(rules, list) or not rules:
        raise CheckpointError(f"{source}: rules must be a list of at least one rule.")
    return Mapping(
        name=source,
        roots=_strings(data, "roots", ("",), source),
        rules=tuple(_rule(rule, f"{source}: rule {number}") for number, rule in enumerate(rules, start=1)),
        ignore=_strings(data, "ignore", (), source),
        every_rule_must_match=must_match,
    )


def _rule(data: Any, where: str) -> Rule:
    _check_keys(data, {"from", "to", "value", "when"}, where)
    pattern, to, value = data.get("from"), data.get("to"), data.get("value")
    if not isinstance(pattern, str) or not pattern:
        raise CheckpointError(f"{where}: from must be a path such as layers_{{layer}}/mlp/kernel, got {pattern!r}.")
    if isinstance(to, str) and to:
        targets: dict[str, tuple[Axes | None, ...]] = {to: (None,)}
    elif isinstance(to, dict) and to and all(isinstance(target, str) for target in to):
        targets = {target: _axes(text, f"{where} ({pattern})") for target, text in to.items()}
    else:
        raise CheckpointError(f"{where} ({pattern}): to must be a path, or paths with their axes, got {to!r}.")
    if value is not None:
        if not isinstance(value, str):
            raise CheckpointError(f"{where} ({pattern}): value must be text such as 'x * sqrt(head_dim)', got {value!r}.")
        arithmetic.names_in(value)
    _check_captures(pattern, targets, f"{where} ({pattern})")
    return Rule(pattern, targets, value, _conditions(data.get("when", {}), f"{where} ({pattern})"))


def _axes(text: Any, where: str) -> tuple[Axes | None, ...]:
    choices = text if isinstance(text, list) else [text]
    if not choices or not all(choice is None or isinstance(choice, str) for choice in choices):
        raise CheckpointError(
            f"{where}: axes must be text such as 'D N H -> D (N H)', null or a list of these, got {text!r}."
        )
    try:
        return tuple(None if choice is None else axes.parse(choice) for choice in choices)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_captures(pattern: str, targets: AbstractMapping[str, tuple[Axes | None, ...]], where: str) -> None:
    captured = set(compiled(pattern).groupindex)
    for target, choices in targets.items():
        for choice in choices:
            bound = set(choice.bound) if choice is not None else set()
            used = {name for match in _CAPTURE.finditer(target) for name in arithmetic.names_in(match[1].removeprefix("+"))}
            if bound & captured:
                raise CheckpointError(f"{where}: {sorted(bound & captured)[0]} is a capture of the path and of the axes.")
            if not bound <= used:
                raise CheckpointError(f"{where}: the target {target} must have {{{sorted(bound - used)[0]}}} in it.")


def _conditions(data: Any, where: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{where}: when must map fields of config.json to values, got {data!r}.")
    return {name: tuple(values) if isinstance(values, list) else (values,) for name, values in data.items()}


def _strings(data: dict[str, Any], name: str, default: tuple[str, ...], source: str) -> tuple[str, ...]:
    values = data.get(name, list(default))
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{source}: {name} must be a list of paths, got {values!r}.")
    return tuple(values)


def _check_keys(data: Any, allowed: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} must be a mapping with the keys {', '.join(sorted(allowed))}.")
    unknown = sorted(str(key) for key in data if key not in allowed)
    if unknown:
        raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}.")
