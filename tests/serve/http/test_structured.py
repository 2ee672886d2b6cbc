"""The form of an answer as OpenAI's and vLLM's clients spell it; what is wrong is named as it was spelled."""

import json

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import StructuredOutputsParams
from serve.http.structured import FIELDS, respelled, structured_outputs

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("given", [{}, {"response_format": {"type": "text"}}, {"temperature": 1}])
def test_free_text(given):
    assert structured_outputs(given) is None


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, {"json": SCHEMA}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "description": "d", "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        (
            {
                "structured_outputs": {
                    "json": SCHEMA,
                    "regex": None,
                    "whitespace_pattern": " ?",
                    "disable_additional_properties": True,
                }
            },
            {"json": SCHEMA, "whitespace_pattern": " ?", "disable_additional_properties": True},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        (
            {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
            {"json": json.dumps(SCHEMA), "whitespace_pattern": " ?"},
        ),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"response_format": {"type": "text"}, "guided_regex": "a+"}, {"regex": "a+"}),
    ],
)
def test_each_spelling(given, fields):
    assert set(given) <= set(FIELDS)
    assert structured_outputs(given) == StructuredOutputsParams(**fields)


def test_a_structural_tag_keeps_its_parts():
    given = {"type": "structural_tag", "structures": [], "triggers": []}
    assert json.loads(structured_outputs({"response_format": given}).structural_tag) == given


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": ["text"]}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": 1}}},
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "y": 1}}},
            "response_format.json_schema.y",
        ),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": []}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": {}, "guided_whitespace_pattern": 5}, "guided_whitespace_pattern"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_spelled(given, parameter):
    with pytest.raises(InvalidRequestError) as caught:
        structured_outputs(given)
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(f"{parameter} must be ")


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
        ({"guided_json": {}}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_the_engine_finds_later_is_respelled(given, parameter):
    error = InvalidRequestError("structured_outputs.json", {}, "a JSON schema that can be compiled", "Do that.")
    assert respelled(error, given).parameter == parameter
    assert str(error) == f"{parameter} must be a JSON schema that can be compiled, got {{}}. Do that."
    other = InvalidRequestError("top_p", 2, "in (0, 1]")
    assert respelled(other, given).parameter == "top_p"
