"""What the command line, the environment and a YAML file say, merged: flag > JAXSERVE_* > YAML > default.

Knows the server's own options; the engine's are the fields of `jaxserve.EngineConfig`, under the same names, so that a new one
needs no line here. Importing it is cheap: pydantic is imported when settings are loaded.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    import pydantic
    import yaml

ENV_PREFIX = "JAXSERVE_"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the service behaves.

    Attributes:
        host: address to listen on; the default can be reached from this machine alone.
        grpc_port: 0 takes a free one.
        http: whether the OpenAI-compatible HTTP front door is open.
        http_port: 0 takes a free one.
        chat_template: a file with the Jinja template of /v1/chat/completions; None takes the model's own.
        drain_timeout_s: after SIGTERM, for running requests to finish [s].
        max_queued_requests: most requests that wait beyond max_num_seqs; more are refused with RESOURCE_EXHAUSTED or 429.
        max_queued_tokens: most prompt tokens of all requests that run or wait; None is four times the KV pool.
        max_pending_tokens: most tokens kept for one client that reads slowly; one more, and its request is aborted.
        write_timeout_s: for a client to take a message before its request is aborted [s].
        step_timeout_s: for the engine to finish one step; after half of it /health is 503, after it streams end and the exit
            status is 1 [s].
        reflection: whether grpc.reflection is offered.
        log_level: debug, info, warning or error; info has one line a request, never its text.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http: bool = True
    http_port: int = 8000
    chat_template: str | None = None
    drain_timeout_s: float = 30.0
    max_queued_requests: int = 1024
    max_queued_tokens: int | None = None
    max_pending_tokens: int = 4096
    write_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    reflection: bool = True
    log_level: str = "info"

    def __post_init__(self) -> None:
        _check("host", self.host, bool(self.host), "an address or a host name")
        _check("grpc_port", self.grpc_port, 0 <= self.grpc_port <= 65535, "in [0, 65535]")
        _check("http_port", self.http_port, 0 <= self.http_port <= 65535, "in [0, 65535]")
        _check("drain_timeout_s", self.drain_timeout_s, 0 <= self.drain_timeout_s <= 86400, "in [0, 86400] seconds")
        _check("max_queued_requests", self.max_queued_requests, 0 <= self.max_queued_requests < 2**31, "in [0, 2**31)")
        if self.max_queued_tokens is not None:
            _check("max_queued_tokens", self.max_queued_tokens, self.max_queued_tokens >= 1, "at least 1")
        _check("max_pending_tokens", self.max_pending_tokens, self.max_pending_tokens >= 1, "at least 1")
        _check("write_timeout_s", self.write_timeout_s, 0 < self.write_timeout_s <= 86400, "in (0, 86400] seconds")
        _check("step_timeout_s", self.step_timeout_s, 0 < self.step_timeout_s <= 86400, "in (0, 86400] seconds")
        _check("log_level", self.log_level, self.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}")


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}.")


def load(flags: Mapping[str, Any], config_path: Path | None = None) -> tuple[EngineConfig, ServerConfig]:
    """Merges the sources.

    Args:
        flags: by field name; None is "not given".
        config_path: a YAML file with one mapping, keys spelled as the fields.

    Raises:
        ConfigError: an unknown name, a wrong type or a value out of range; names the field and its source.
    """
    from_yaml = read_yaml(config_path) if config_path is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    for source, values in (("flags", given), (f"{config_path}", from_yaml)):
        _check_names(source, values)
    merged = _merge(given, from_yaml)
    parts = []
    for kind in (EngineConfig, ServerConfig):
        parts.append(kind(**{field.name: merged[field.name] for field in dataclasses.fields(kind)}))
    return parts[0], parts[1]


def field_types() -> dict[str, Any]:
    """Every setting's type, by name: the engine's, then the server's."""
    return {**typing.get_type_hints(EngineConfig), **typing.get_type_hints(ServerConfig)}


def read_yaml(path: Path) -> dict[str, Any]:
    """One mapping of names to values; stricter than YAML: no duplicate keys, no anchors and aliases, no tags.

    Raises:
        ConfigError: says where it is wrong.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ConfigError(f"{path}:{event.start_mark.line + 1}: anchors and aliases are not taken; write it out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _check_unique(path, node)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} must hold one mapping such as `model: toy`.")
    return content


def _check_unique(path: Path, node: "yaml.MappingNode") -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key.value, str):
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: a key must be a name such as `model`.")
        if key.value in seen:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} is there twice; keep one of them.")
        seen.add(key.value)


def _check_names(source: str, values: Mapping[str, Any]) -> None:
    hints = field_types()
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(name.replace("-", "_"), hints, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{source}: {name} is no setting.{hint} Known are {', '.join(sorted(hints))}.")
        if isinstance(value, bool) and hints[name] is not bool:  # pydantic would take true for 1
            raise ConfigError(f"{source}: {name} must be {type_name(hints[name])}, got {str(value).lower()}.")


def _merge(flags: dict[str, Any], from_yaml: dict[str, Any]) -> dict[str, Any]:
    import pydantic
    from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

    def annotated(hint: Any) -> Any:
        return Annotated[hint, NoDecode, pydantic.BeforeValidator(_split)] if is_list(hint) else hint

    class Sources(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, extra="forbid", protected_namespaces=(), env_parse_none_str="none", env_ignore_empty=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_yaml)

    fields: dict[str, Any] = {
        field.name: (annotated(field_types()[field.name]), field.default)
        for kind in (EngineConfig, ServerConfig)
        for field in dataclasses.fields(kind)
    }
    try:
        return pydantic.create_model("Settings", __base__=Sources, **fields)(**flags).model_dump()
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, flags, from_yaml)) from None


def _explain(error: "pydantic.ValidationError", flags: Mapping[str, Any], from_yaml: Mapping[str, Any]) -> str:
    """One line: the first field that is wrong, where it came from, and what it may be."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    variable = f"{ENV_PREFIX}{name.upper()}"
    if name in flags:
        source = f"--{name.replace('_', '-')}"
    elif any(key.upper() == variable for key in os.environ):
        source = variable
    else:
        source = f"{name} in the file" if name in from_yaml else name
    return f"{source} must be {type_name(field_types()[name])}, got {first['input']!r}."


def is_list(hint: Any) -> bool:
    """Whether a setting is several whole numbers: a sequence in the file, `32,128` as a flag and in the environment."""
    return any(typing.get_origin(member) is tuple for member in (hint, *typing.get_args(hint)))


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def type_name(hint: Any) -> str:
    """How a message calls a type: "a whole number", "a text or none"."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "none"}
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join("whole numbers such as 32,128" if is_list(member) else names[member] for member in members)
