"""From `StructuredOutputsParams` to the one language that is compiled: `llguidance`'s Lark, as text.

Pure functions on text. Refuses what would compile to something else than was asked for, or only after minutes; every other
judgement is the compiler's.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from jaxserve.structured_outputs import StructuredOutputsParams

OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Behind a grammar, so that its own line numbers stay. Without it a text that is forced would be allowed in one
tokenization only, found by calling back into Python with a lock held."""

MAX_SUM_OF_MULTIPLES = 10_000
"""Of all `multipleOf` in a schema, as whole numbers: each makes as many states, whatever the limits of `llguidance` say.
1,000,003 compiles for 5 s and takes 287 MB (llguidance 1.9.1)."""

MAX_RULES = 1_000
"""In GBNF: converting it takes time with the square of them."""

MAX_NESTING = 100
"""Brackets in brackets. JSON text is parsed with a recursion of 128."""

_SUBSCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_SUBSCHEMAS = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "additionalItems", "unevaluatedItems"),
    *("not", "if", "then", "else", "contentSchema", "items", "prefixItems", "allOf", "anyOf", "oneOf"),
)

_NOT_RULES = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*|#[^\n]*')
"""Strings, regular expressions and comments of a Lark grammar."""

_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")


_ANY_OBJECT = '{"type": "object"}'


class GrammarError(Exception):
    """Why something cannot be compiled, as what comes after "must be"; the remedy is the second argument."""

    def __init__(self, allowed: str, remedy: str = ""):
        self.allowed = allowed
        self.remedy = remedy
        super().__init__(allowed)


def lark_text(params: StructuredOutputsParams) -> str:
    """The grammar.

    Raises:
        GrammarError: it is not what its field says, or is one of the forms that are refused.
    """
    match params.kind:
        case "json":
            return f"start: %json {_schema(params.json, params)}{OPTIONS}"
        case "json_object":
            return f"start: %json {_schema(_ANY_OBJECT, params)}{OPTIONS}"
        case "regex":
            return f"start: {_regex(params.regex)}{OPTIONS}"
        case "choice":
            choices = dict.fromkeys(params.choice or ())
            return f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in choices)}{OPTIONS}"
        case "grammar":
            return _grammar(params.grammar or "") + OPTIONS
        case _:
            return _structural_tag(params.structural_tag or "", params) + OPTIONS


def _schema(text: Any, params: StructuredOutputsParams) -> str:
    schema = _json(text, "a JSON schema")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema, which is an object")
    return json.dumps(_prepared(schema, params), ensure_ascii=False)


def _prepared(schema: dict[str, Any], params: StructuredOutputsParams) -> dict[str, Any]:
    """The schema with what the options say; its own `x-guidance` has the last word, as in vLLM."""
    _check_schema(schema)
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    own = schema.get("x-guidance", {})
    return schema | {"x-guidance": options | own if isinstance(own, dict) else own}


def _json(text: Any, what: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} as JSON text ({error})") from None


def _check_schema(schema: Any) -> None:
    total = Decimal(0)
    for part in _objects(schema):
        total += _num_multiples(part.get("multipleOf"))
        least = part.get("minProperties")
        if isinstance(least, (int, float)) and least > 1 and not _requires(part, least):
            # Keys that `properties` does not name may come twice, and count once when read.
            raise GrammarError(
                "a JSON schema without minProperties above 1, unless as many are required",
                "Name the properties in `properties` and `required`.",
            )
    if total > MAX_SUM_OF_MULTIPLES:
        raise GrammarError(
            f"a JSON schema whose multipleOf, without decimal points, are at most {MAX_SUM_OF_MULTIPLES} together",
            "Leave them out of the schema and check the numbers afterwards.",
        )


def _num_multiples(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Decimal(0)
    try:
        _, digits, _ = Decimal(str(value)).normalize().as_tuple()
        number = Decimal((0, digits, 0))
        return max(number, abs(Decimal(value))) if isinstance(value, int) else number
    except (InvalidOperation, ValueError):
        return Decimal(0)


def _requires(part: dict[str, Any], least: float) -> bool:
    required = part.get("required")
    return isinstance(required, list) and len({str(name) for name in required}) >= least


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a JSON value, itself included. Without recursion, as nobody has said yet how deep it is."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _closed(schema: Any) -> Any:
    """A copy in which objects have no other properties than those they name (vLLM's disable_additional_properties)."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in _SUBSCHEMAS_BY_NAME:
        if isinstance(closed.get(name), dict):
            closed[name] = {key: _closed(part) if isinstance(part, dict) else part for key, part in closed[name].items()}
    for name in _SUBSCHEMAS:
        if isinstance(closed.get(name), (dict, list)):
            closed[name] = _closed(closed[name])
    if "additionalProperties" not in closed and any(
        isinstance(closed.get(name), dict) for name in ("properties", "patternProperties")
    ):
        closed["additionalProperties"] = False
    return closed


def _regex(regex: Any) -> str:
    import llguidance

    return f"/{llguidance.regex_to_lark(regex, '')}/"


def _grammar(text: str) -> str:
    _check_nesting(text)
    if any("::=" in re.sub(r"(#|//).*", "", line) for line in text.splitlines()):
        return _from_gbnf(text)
    for body in re.finditer(r"%json\b", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, re.compile(r"\s*").match(text, body.end()).end())  # pyright: ignore[reportOptionalMemberAccess]
        except (ValueError, RecursionError):  # in a comment, or the compiler will say what is wrong
            continue
        _check_schema(schema)
    special = _SPECIAL_TOKEN.search(_NOT_RULES.sub(" ", text))
    if special is not None:
        raise GrammarError(
            f"a grammar of text, without special tokens such as {special.group()[:40]}",
            'Write it as a string, "<...>", if the text is meant.',
        )
    return text


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if text.count("::=") > MAX_RULES:
        raise GrammarError(f"a GBNF grammar of at most {MAX_RULES} rules", "Merge rules, or write it in Lark.")
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise GrammarError(f"a GBNF grammar nested at most {MAX_NESTING} deep") from None
    except Exception as error:  # the library raises a bare Exception
        raise GrammarError(f"a GBNF grammar ({_shortened(str(error))})", "See llama.cpp's grammars/README.md.") from None


def _check_nesting(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"\\.|[(\[{)\]}]", _NOT_RULES.sub(" ", text)):
        depth = max(0, depth + (bracket in "([{") - (bracket in ")]}"))
        if depth > MAX_NESTING:
            raise GrammarError(f"a grammar with brackets nested at most {MAX_NESTING} deep")


def _structural_tag(text: str, params: StructuredOutputsParams) -> str:
    import llguidance

    shape = 'of the form {"structures": [{"begin": "...", "schema": {...}, "end": "..."}], "triggers": ["..."]}'
    spec = _json(text, "a structural tag")
    structures = spec.get("structures") if isinstance(spec, dict) else None
    triggers = spec.get("triggers") if isinstance(spec, dict) else None
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise GrammarError(shape)
    tags = []
    for part in structures:
        begin, schema, end = (
            (part.get(name) for name in ("begin", "schema", "end")) if isinstance(part, dict) else (None,) * 3
        )
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
            raise GrammarError(shape)
        trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structural tags that each begin with one of the triggers; {begin[:40]!r} does not")
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=_prepared(schema, params), end=end))
    return llguidance.StructTag.to_grammar(tags, assume_special=False)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + "…"


def reason_of(message: str) -> str:
    """What is wrong, out of one of `llguidance`'s error texts: one line, without its wrapping and its stack."""
    if message.startswith("panic"):
        return "the grammar library gave up on it"
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    if lines[0].endswith("regex parse error:"):  # Rust's regex draws an arrow first
        lines = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    first = re.sub(r"^at 1\(\d+\): ", "", lines[0]).removeprefix("failed to compile JSON schema: ")
    return _shortened(first)
