"""What ends by a grammar is in its language, by judges that know nothing of llguidance: jsonschema, re, a brute force."""

import itertools
import json
import re
import threading

import jsonschema
import numpy as np
import pytest

from jaxserve.errors import ConstraintError
from jaxserve.structured.all_of import AllOf
from jaxserve.structured.bad_words import BadWords
from jaxserve.structured.compiler import GrammarCompiler, GrammarLimits
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.testing.constrained_sampler import PROMPT
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.piece_tokenizer import PieceTokenizer
from jaxserve.tokenization.pieces import Spelling

SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
    },
    "closed": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False},
    "nested": {
        "type": "object",
        "properties": {
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
            }
        },
        "required": ["items"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", 'quo"te', "Zoë 🎉", 17, None, True, ["a", 1]]},
    "const": {"const": {"a": [1, {"b": None}]}},
    "any_of": {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string", "minLength": 2, "maxLength": 3}]},
    "one_of": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
                "required": ["v"],
            }
        },
        "$ref": "#/$defs/tree",
    },
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2}, "maxItems": 3},
    "multiples": {
        "type": "array",
        "items": {"type": "integer", "multipleOf": 7, "minimum": -100, "maximum": 100},
        "minItems": 2,
        "maxItems": 3,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]+$"},
    "prefix": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 2},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "pattern_map": {"type": "object", "patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
    "types": {"type": ["integer", "null", "boolean"]},
    "formats": {
        "type": "object",
        "properties": {
            "u": {"type": "string", "format": "uuid"},
            "i": {"type": "string", "format": "ipv4"},
            "d": {"type": "string", "format": "date"},
        },
        "required": ["u", "i", "d"],
        "additionalProperties": False,
    },
    "many_required": {
        "type": "object",
        "properties": {f"field_{n}": {"type": "integer"} for n in range(12)},
        "required": [f"field_{n}" for n in range(12)],
        "minProperties": 12,
    },
}
NUM_DRAWS = 6


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_by_a_schema_is_valid(sampler, name):
    schema = SCHEMAS[name]
    texts = sampler.texts(sampler.compiler.compile(StructuredOutputsParams(json=schema)), NUM_DRAWS)
    assert len(texts) >= NUM_DRAWS // 2
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_by_a_schema_is_valid_many_times(sampler, name):
    schema = SCHEMAS[name]
    texts = sampler.texts(sampler.compiler.compile(StructuredOutputsParams(json=schema)), 100)
    assert len(texts) >= 50
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


def test_any_json_object(sampler):
    texts = sampler.texts(sampler.compiler.compile(StructuredOutputsParams(json_object=True)), 8)
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-c]{2,4}x?",
        r"\d{3}-\d{2}",
        r"(yes|no|may/be)",
        r"[^\n]{1,5}",
        r"[A-Z][a-z]*( [A-Z][a-z]*){0,2}",
        "é+🎉?",
        r'"\\\[\t"',
        " leading",
    ],
)
def test_a_regular_expression_matches_the_whole_text(sampler, regex):
    texts = sampler.texts(sampler.compiler.compile(StructuredOutputsParams(regex=regex)), 6)
    assert texts
    for text in texts:
        assert re.fullmatch(regex, text)


def test_a_choice_is_one_of_them_and_each_can_come(sampler):
    choices = ["yes", "no", "no way", "é 🎉", 'quo"te\\', "line\nbreak", "</s>", "<|end|>"]
    texts = sampler.texts(sampler.compiler.compile(StructuredOutputsParams(choice=choices)), 80)
    assert set(texts) == set(choices)


ARITHMETIC = {
    "gbnf": 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"  # a sum',
    "lark": 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]+/',
}


@pytest.mark.parametrize("syntax", ARITHMETIC)
def test_a_grammar(ascii_sampler, syntax):
    texts = ascii_sampler.texts(ascii_sampler.compiler.compile(StructuredOutputsParams(grammar=ARITHMETIC[syntax])), 20, 200)
    assert len(set(texts)) > 5
    for text in texts:
        assert re.fullmatch(r"[0-9+()]+", text)
        eval(re.sub(r"\b0+(?=\d)", "", text))


def test_a_structural_tag_holds_where_it_is_triggered(ascii_sampler):
    tag = {
        "begin": "<f=x>",
        "schema": {
            "type": "object",
            "properties": {"q": {"type": "integer"}},
            "required": ["q"],
            "additionalProperties": False,
        },
        "end": "</f>",
    }
    params = StructuredOutputsParams(
        structural_tag=json.dumps({"structures": [tag], "triggers": ["<f"]}), disable_any_whitespace=True
    )
    state = ascii_sampler.compiler.compile(params).start(PROMPT)
    for byte in b"free text, {whatever} <f":
        state.accept(byte)
    assert list(ascii_sampler.allowed(state)) == [ord("=")]
    for byte in b'=x>{"q":12}</f':
        state.accept(byte)
    assert list(ascii_sampler.allowed(state)) == [ord(">")]
    state.accept(ord(">"))
    assert ascii_sampler.eos in ascii_sampler.allowed(state)
    assert ord("w") in ascii_sampler.allowed(state)


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({}, ['{"a":1}', '{ "a" :\n1 }'], []),
        ({"disable_any_whitespace": True}, ['{"a":1}'], ['{ "a":1}', '{"a": 1}']),
        ({"whitespace_pattern": " ?"}, ['{"a":1}', '{ "a": 1}'], ['{  "a":1}', '{\n"a":1}']),
        ({}, ['{"a":1,"b":2}'], []),
        ({"disable_additional_properties": True}, ['{"a":1}'], ['{"a":1,"b":2}']),
    ],
)
def test_options_of_json(ascii_sampler, options, allowed, refused):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    compiled = ascii_sampler.compiler.compile(StructuredOutputsParams(json=schema, **options))
    for text in allowed:
        assert compiled.start(PROMPT, text.encode()).is_complete
    for text in refused:
        with pytest.raises(ConstraintError, match="cannot follow"):
            compiled.start(PROMPT, text.encode())


BRUTE_FORCE = {
    r"(ab|abc|b)+": {"".join(p) for n in range(1, 7) for p in itertools.product(["ab", "abc", "b"], repeat=n)},
    r"[a-c]{0,3}d": {"".join(p) + "d" for n in range(4) for p in itertools.product("abc", repeat=n)},
    r"(é|ë|aé)b?": {a + b for a in ("é", "ë", "aé") for b in ("b", "")},
}


class SmallTokenizer(AsciiTokenizer):
    """Multi-byte tokens that overlap, two with the same text, parts of characters, a hole, a special token named like text."""

    TOKENS = (
        b"",
        b"a",
        b"b",
        b"c",
        b"d",
        b"ab",
        b"bc",
        b"abc",
        b"bab",
        b"ab",
        b"\xc3",
        b"\xa9",
        "é".encode(),
        b"\xc3\xabb",
        b"a\xc3",
    )

    def __init__(self):
        PieceTokenizer.__init__(
            self, Spelling(lambda i: self.TOKENS[i] or b"ab"), len(self.TOKENS), {"ab": 0}, eos_token_ids=(0,)
        )


@pytest.fixture(scope="module")
def small(make_sampler):
    return make_sampler(SmallTokenizer())


@pytest.mark.parametrize("regex", BRUTE_FORCE)
def test_a_mask_is_what_a_brute_force_allows(small, regex):
    """Along every path of tokens through the language's beginnings: a token is allowed iff some word goes on with it."""
    language = {word.encode() for word in BRUTE_FORCE[regex]}
    beginnings = {word[:n] for word in language for n in range(len(word) + 1)}
    compiled = small.compiler.compile(StructuredOutputsParams(regex=regex))
    waiting, seen = [((), b"")], 0
    while waiting and seen < 200:
        ids, text = waiting.pop()
        seen += 1
        following = {i for i, token in enumerate(small.tokenizer.TOKENS) if token and text + token in beginnings}
        expected = following | ({0} if text in language else set())
        assert set(small.allowed(compiled.start(PROMPT, ids))) == expected, (ids, text)
        waiting += [
            ((*ids, i), text + small.tokenizer.TOKENS[i]) for i in following if len(text + small.tokenizer.TOKENS[i]) <= 3
        ]
    assert seen > 10


def test_after_completion_the_end_alone_is_allowed(sampler):
    state = sampler.compiler.compile(StructuredOutputsParams(choice=["ok"])).start(PROMPT)
    while not state.is_complete:
        assert sampler.eos not in sampler.allowed(state)
        state.accept(int(sampler.allowed(state)[0]))
    for _ in range(3):  # ignore_eos goes on asking
        assert list(sampler.allowed(state)) == [sampler.eos]
        state.accept(sampler.eos)


def test_a_request_resumes_where_it_was(sampler):
    compiled = sampler.compiler.compile(StructuredOutputsParams(json=SCHEMAS["nested"]))
    drawn, _ = sampler.draw(compiled, seed=3)
    state = compiled.start(PROMPT)
    for n, token_id in enumerate(drawn[:60]):
        resumed = compiled.start(PROMPT, drawn[:n])
        np.testing.assert_array_equal(sampler.allowed(resumed), sampler.allowed(state))
        state.accept(token_id)


def test_restrict_only_clears(ascii_sampler):
    state = ascii_sampler.compiler.compile(StructuredOutputsParams(regex="[a-z]")).start(PROMPT)
    words = ascii_sampler.all_words()
    words[ord("q") // 32] ^= np.uint32(1 << ord("q") % 32)
    state.restrict(words)
    left = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert set(left) == set(range(ord("a"), ord("z") + 1)) - {ord("q")}


def test_what_is_not_allowed_is_not_taken(embedded_sampler):
    sampler = embedded_sampler
    compiled = sampler.compiler.compile(StructuredOutputsParams(choice=["ab"]))
    unknown, bos = sampler.tokenizer.special_tokens["<unk>"], sampler.tokenizer.special_tokens["<s>"]
    wrong = sampler.tokenizer.encode("zz", add_special_tokens=False)[0]
    for token_id in (sampler.eos, unknown, bos, wrong, sampler.tokenizer.vocab_size + 1, 10**6, -1):
        with pytest.raises(ConstraintError, match=f"^structured_outputs: token {token_id} cannot follow"):
            compiled.start(PROMPT).accept(token_id)


@pytest.mark.parametrize("grammar", ["start: A\nA: ~/abc/", "start: A\nA: /(?s:.*)/"])
def test_special_tokens_and_padding_are_no_text(sampler, grammar):
    allowed = set(sampler.allowed(sampler.compiler.compile(StructuredOutputsParams(grammar=grammar)).start(PROMPT)))
    assert not allowed & (sampler.tokenizer.special_token_ids - {sampler.eos})
    assert max(allowed) < sampler.tokenizer.vocab_size
    assert len(allowed) > 200


def test_a_text_that_the_tokens_cannot_spell_is_an_error_and_no_end(ascii_sampler):
    state = ascii_sampler.compiler.compile(StructuredOutputsParams(choice=["aé"])).start(PROMPT, b"a")
    with pytest.raises(ConstraintError, match="cannot be continued with this model's tokens|cannot be continued"):
        state.restrict(ascii_sampler.all_words())


def test_an_ambiguous_grammar_stops_its_own_request(ascii_sampler):
    """Without limits a step of it takes longer with every token: 240 ms after 80."""
    compiled = ascii_sampler.compiler.compile(StructuredOutputsParams(grammar='start: s\ns: s s | s s s | "a" | ""'))
    state = compiled.start(PROMPT)
    with pytest.raises(ConstraintError, match="^structured_outputs: .*items"):
        for _ in range(500):
            state.restrict(ascii_sampler.all_words())
            state.accept(ord("a"))
    with pytest.raises(ConstraintError):  # and stays so
        state.restrict(ascii_sampler.all_words())
    assert compiled.is_spent


def test_a_grammar_at_its_limit_is_compiled_anew(tokenizers_by_name):
    tokenizer = tokenizers_by_name["embedded"]
    tight = GrammarCompiler(
        tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, GrammarLimits(deadline_s=60, max_lexer_states=300)
    )
    params = StructuredOutputsParams(regex="(.*a.{20}b.*|.*c.{25}d.*)")
    first = tight.compile(params)
    assert tight.compile(params) is first
    state, words = first.start(PROMPT), np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    (token_id,) = tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(ConstraintError, match="too many states"):
        for _ in range(100):
            state.restrict(words)
            state.accept(token_id)
    assert tight.compile(params) is not first


def test_threads_share_a_compiled_grammar(embedded_sampler):
    compiled = embedded_sampler.compiler.compile(StructuredOutputsParams(json=SCHEMAS["flat"]))
    expected = [embedded_sampler.draw(compiled, seed, 60) for seed in range(8)]
    drawn: dict[int, tuple] = {}

    def run(seed):
        drawn[seed] = embedded_sampler.draw(compiled, seed, 60)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [drawn[seed] for seed in range(8)] == expected


def test_a_grammar_without_bad_words(ascii_sampler):
    compiled = ascii_sampler.compiler.compile(StructuredOutputsParams(regex="[ab]{2}"))
    both = AllOf((compiled, BadWords(((ord("a"), ord("b")), (ord("b"),)))))
    state = both.start(PROMPT)
    assert list(ascii_sampler.allowed(state)) == [ord("a")]
    state.accept(ord("a"))
    assert list(ascii_sampler.allowed(state)) == [ord("a")]
    dead = AllOf((compiled, BadWords(((ord("a"),), (ord("b"),))))).start(PROMPT)
    with pytest.raises(ConstraintError, match="no token is left"):
        dead.restrict(ascii_sampler.all_words())
