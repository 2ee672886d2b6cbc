"""What form an answer must have, as clients say it: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Knows the spellings; what they mean is `StructuredOutputsParams`'. Errors name the field as the client spelled it.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import KINDS, PREFIX, StructuredOutputsParams
from serve.errors import relocated

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_whitespace_pattern",
)
"""Names in a body that this module reads."""

_OPTIONS = frozenset(field.name for field in fields(StructuredOutputsParams))
_FORMATS = "an object whose type is text, json_object or json_schema"


def structured_outputs(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The form that was asked for; None where the answer is free text.

    Args:
        given: the body's fields, without those that are null.

    Raises:
        InvalidRequestError: names the field.
    """
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    if (formatted := _response_format(given.get("response_format"))) is not None:
        asked["response_format"] = formatted
    if (options := given.get("structured_outputs")) is not None:
        asked["structured_outputs"] = PREFIX, _options(options)
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := given.get(f"guided_{kind}")) is not None:
            asked[f"guided_{kind}"] = f"guided_{kind}", {kind: value}
    if not asked:
        if "guided_whitespace_pattern" in given:
            value = given["guided_whitespace_pattern"]
            raise InvalidRequestError("guided_whitespace_pattern", value, "absent where guided_json is")
        return None
    if len(asked) > 1:
        first, second, *_ = asked
        raise InvalidRequestError(second, given[second], f"absent beside {first}", "Send one of them.")
    ((name, (path, params)),) = asked.items()
    if "guided_whitespace_pattern" in given:
        params["whitespace_pattern"] = given["guided_whitespace_pattern"]
    try:
        return StructuredOutputsParams(**params)
    except InvalidRequestError as error:
        raise respelled(error, given, path if name != "structured_outputs" else None) from None


def respelled(error: InvalidRequestError, given: Mapping[str, Any], path: str | None = None) -> InvalidRequestError:
    """The same error, its parameter as the client spelled it; also for what the engine says of it later.

    Args:
        error: of any parameter; one that is not about the form is left as it is.
        given: the body's fields.
        path: where the form stood; None finds out.
    """
    if error.parameter.split(".")[0] != PREFIX:
        return error
    if error.parameter.endswith(".whitespace_pattern") and "guided_whitespace_pattern" in given:
        return relocated(error, "guided_whitespace_pattern")
    if path is None:
        if given.get("structured_outputs") is not None:
            return error
        guided = [f"guided_{kind}" for kind in KINDS if given.get(f"guided_{kind}") is not None]
        is_schema = _mapping(given.get("response_format")).get("type") == "json_schema"
        path = guided[0] if guided else "response_format.json_schema.schema" if is_schema else "response_format"
    return relocated(error, path)


def _response_format(value: Any) -> tuple[str, dict[str, Any]] | None:
    """The field's path and the parameters; None for text."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("type") not in ("text", "json_object", "json_schema", "structural_tag"):
        raise InvalidRequestError("response_format", value, _FORMATS)
    kind = value["type"]
    if kind == "text":
        _only("response_format", value, ("type",))
        return None
    if kind == "json_object":
        _only("response_format", value, ("type",))
        return "response_format", {"json_object": True}
    if kind == "structural_tag":
        import json

        return "response_format", {"structural_tag": json.dumps(value)}
    _only("response_format", value, ("type", "json_schema"))
    described = value.get("json_schema")
    path = "response_format.json_schema"
    if not isinstance(described, Mapping):
        raise InvalidRequestError(path, described, "an object with a name and a schema")
    _only(path, described, ("name", "description", "schema", "strict"))
    if not isinstance(described.get("name"), str) or not described["name"]:
        raise InvalidRequestError(f"{path}.name", described.get("name"), "a text that is not empty")
    if not isinstance(described.get("strict", False), bool | None):
        raise InvalidRequestError(f"{path}.strict", described["strict"], "true or false")
    if not isinstance(described.get("schema"), Mapping):
        raise InvalidRequestError(f"{path}.schema", described.get("schema"), "a JSON schema, which is an object")
    return f"{path}.schema", {"json": described["schema"]}


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(PREFIX, value, f"an object with one of {', '.join(KINDS)}")
    _only(PREFIX, value, sorted(_OPTIONS))
    return {name: option for name, option in value.items() if option is not None}


def _only(path: str, value: Mapping[str, Any], known: Any) -> Mapping[str, Any]:
    for name in value:
        if name not in known:
            raise InvalidRequestError(f"{path}.{name}", value[name], "absent: no such field is known")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
