"""StructuredOutputsParams: vLLM's fields and conditions; plain and hashable whatever was given."""

import dataclasses
import json

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import KINDS, StructuredOutputsParams

VLLM_DEFAULTS = {
    "json": None,
    "regex": None,
    "choice": None,
    "grammar": None,
    "json_object": None,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
}
EXAMPLES = {
    "json": {"type": "object"},
    "regex": "a",
    "choice": ["a"],
    "grammar": "start: A",
    "json_object": True,
    "structural_tag": "{}",
}


def test_fields_and_defaults_are_vllms():
    fields = dataclasses.fields(StructuredOutputsParams)
    assert {field.name: field.default for field in fields} == VLLM_DEFAULTS


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind):
    params = StructuredOutputsParams(**{kind: EXAMPLES[kind]})
    assert params.kind == kind
    assert hash(params) == hash(StructuredOutputsParams(**{kind: EXAMPLES[kind]}))


@pytest.mark.parametrize("fields", [{}, {"json_object": False}, {"disable_any_whitespace": True}])
def test_one_kind_is_needed(fields):
    with pytest.raises(InvalidRequestError, match="^structured_outputs must be exactly one of json, regex, .*, got 'none'"):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_kinds_are_too_many(kind):
    with pytest.raises(InvalidRequestError, match=f"exactly one of .*, got 'json and {kind}'"):
        StructuredOutputsParams(**{"json": {}, kind: EXAMPLES[kind]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("json", value) for value in (5, ["a"], True, "", " ", {"a": object()}, {"a": float("nan")}, "\ud800")],
        *[(name, value) for name in ("regex", "grammar", "structural_tag") for value in ("", 5, b"a", ["a"], "\udfff")],
        *[(name, " ") for name in ("grammar", "structural_tag")],
        *[("choice", value) for value in ([], "ab", 5, [5], ["a", None], {"a": 1}, ["\ud800"])],
        *[("json_object", value) for value in (1, 0, "true")],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_value_names_its_field(name, value):
    with pytest.raises(InvalidRequestError, match=f"^structured_outputs.{name} must be ") as caught:
        StructuredOutputsParams(**{name: value})
    assert caught.value.parameter == f"structured_outputs.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("disable_any_whitespace", "disable_additional_properties")
            for value in (None, 1, "true")
        ],
        *[("whitespace_pattern", value) for value in ("", 5, "[a]{2}", r"\s*", "3", "( |x)")],
    ],
)
def test_a_bad_option_names_its_field(name, value):
    with pytest.raises(InvalidRequestError, match=f"^structured_outputs.{name} must be "):
        StructuredOutputsParams(json_object=True, **{name: value})


@pytest.mark.parametrize("pattern", [" ", " ?", r"[ \n\t]{0,12}", r"( |\r\n)*", "[ \n]"])
def test_white_space_of_json(pattern):
    assert StructuredOutputsParams(json_object=True, whitespace_pattern=pattern).whitespace_pattern == pattern


def test_a_schema_is_kept_as_text_and_a_choice_as_a_tuple():
    schema = {"properties": {"é": {"const": 1}}, "type": "object"}
    params = StructuredOutputsParams(json=schema)
    assert json.loads(params.json) == schema
    assert list(json.loads(params.json)) == ["properties", "type"]  # their order is the order of the answer
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")
    nested: dict = {}
    for _ in range(5_000):
        nested = {"items": nested}
    with pytest.raises(InvalidRequestError, match="^structured_outputs.json must be a JSON schema"):
        StructuredOutputsParams(json=nested)
