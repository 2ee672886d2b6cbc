"""Fields of a Hugging Face config.json, checked: somebody else wrote that file."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxserve.errors import ConfigError

MAX_COUNT = 2**31 - 1
MAX_LAYERS = 4096

Number = TypeVar("Number", int, float)


def _present(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json lacks {name!r}.")
    return value


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns a whole number of at least 1; `default` where the field is absent or null and there is one.

    Raises:
        ConfigError: names the field and what was there.
    """
    value = _present(config, name, default)
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise ConfigError(f"config.json: {name} must be a whole number of at least 1, got {value!r}.")
    return value


def count_layers(config: Mapping[str, Any]) -> int:
    """Returns num_hidden_layers, before anything is made for each of them.

    Raises:
        ConfigError: there are more than any model has.
    """
    num_layers = count(config, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers must be at most {MAX_LAYERS}, got {num_layers}.")
    return num_layers


def positive(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a finite number above 0; `default` where the field is absent or null and there is one.

    Raises:
        ConfigError: names the field and what was there.
    """
    value = _present(config, name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} must be a finite number above 0, got {value!r}.")
    return float(value)


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Returns true or false; `default` where the field is absent or null.

    Raises:
        ConfigError: names the field and what was there.
    """
    value = _present(config, name, default)
    if type(value) is not bool:
        raise ConfigError(f"config.json: {name} must be true or false, got {value!r}.")
    return value


def one_of(config: Mapping[str, Any], name: str, allowed: tuple[str, ...], default: str) -> str:
    """Returns one of the words allowed; `default` where the field is absent or null.

    Raises:
        ConfigError: names the field, the words allowed and what was there.
    """
    value = _present(config, name, default)
    if value not in allowed:
        raise ConfigError(f"config.json: {name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def refuse(config: Mapping[str, Any], *names: str) -> None:
    """Raises ConfigError where a field is set that would change the numbers: better no tokens than wrong ones."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"config.json: {name} must be absent or false for this family, got {config[name]!r}.")


def optional(read: Callable[..., Number], config: Mapping[str, Any], name: str, default: Number | None) -> Number | None:
    """Returns what `count` or `positive` reads; None where the field is null, `default` where it is absent."""
    if config.get(name) is not None:
        return read(config, name)
    return None if name in config else default


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns an object inside the object; an empty one where it is absent or null.

    Raises:
        ConfigError: names the field and what was there.
    """
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} must be an object, got {value!r}.")
    return value
