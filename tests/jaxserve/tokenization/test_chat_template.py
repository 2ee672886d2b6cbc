"""Chat templates: the same text as transformers, no way out, no way to eat the machine.

chat_template_cases.json holds what transformers 5.23's own renderer (`render_jinja_template`) gave for a few well-known
templates and for one that uses every construct that our environment treats in its own way. The slow test renders them again with
the installed transformers, where there is one.
"""

import json
import tracemalloc
from pathlib import Path

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.chat_template import encode_chat, render_chat
from jaxserve.tokenization.tokenizer import Tokenizer

RECORDED = json.loads(Path(__file__).with_name("chat_template_cases.json").read_text(encoding="utf-8"))
CASES = [pytest.param(case, id=f"{n}-{case['template']}") for n, case in enumerate(RECORDED["cases"])]
HELLO = [{"role": "user", "content": "hi"}]
CHATML = RECORDED["templates"]["chatml"]

# After the public lists for Jinja2 (PayloadsAllTheThings, CVE-2024-34359, CVE-2024-56201/56326, CVE-2025-27516).
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ (messages | attr('__class__')).__name__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{% for x in messages | map(attribute='__class__') %}{{ x.__base__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ dict.__class__.__base__ }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ environment.parse('x') }}{{ context.environment.loader }}",
]
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "repeat": "{{ 'a' * 10**9 }}",
    "power": "{{ 10**10000000 }}",
    "power by squaring": DOUBLE.replace("START", "7").replace("STEP", "ns.x * ns.x"),
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent by argument": "{{ '%*d' % (1000000000, 1) }}",
    "percent by name": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 100000}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "tilde": DOUBLE.replace("START", "'aaaaaaaa'").replace("STEP", "ns.x ~ ns.x"),
    "plus": DOUBLE.replace("START", "'aaaaaaaa'").replace("STEP", "ns.x + ns.x"),
    "set block": DOUBLE.replace("START", "'aaaaaaaa'").replace(" = STEP %}", " %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "lists in lists": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "tuples in tuples": DOUBLE.replace("START", "(1,)").replace("STEP", "(ns.x, ns.x)"),
    "dicts in dicts": DOUBLE.replace("START", "{}").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "dict calls": DOUBLE.replace("START", "{}").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "dict.fromkeys": DOUBLE.replace("START", "{}").replace("STEP", "dict.fromkeys('ab', ns.x)"),
    "batch": DOUBLE.replace("START", "'a'").replace("STEP", "[1] | batch(900, ns.x) | list"),
    "varargs": DOUBLE.replace("START", "1")
    .replace("{% set ns.x = STEP %}", "{{ f(ns.x, ns.x) }}")
    .replace("{% for", "{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{% for"),
    "list repeated": "{% set x = [1] * 1000 %}{% set y = [x] * 1000 %}{% set z = [y] * 1000 %}{{ z }}",
    "comparison": DOUBLE.replace("START", "[1], y=[1]").replace(
        "STEP %}", "[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% if ns.x == ns.y %}{% endif %}"
    ),
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 10000 %}{{ x.join(x | list) }}",
    "join filter": "{% set x = 'a' * 10000 %}{{ x | list | join(x) }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "wide batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "json indent": "{{ [1] | tojson(indent=1000000000) }}",
    "json separators": "{% set x = 'a' * 10000 %}{{ ([1] * 10000) | tojson(separators=(x, x)) }}",
    "sum of lists": "{{ ([[1] * 100] * 100) | sum(start=[]) }}",
    "round": "{{ 1 | round(10000000, 'floor') }}",
    "int": "{{ ('z' * 100000) | int(0, 36) }}",
    "strip": "{{ ('b' * 100000).strip('a' * 100000 + 'b') }}",
    "joiner": "{% set j = joiner('a' * 100000) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    "escape": "{{ ('\"' * 100000) | e | forceescape | forceescape | forceescape }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep statements": "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
    "long number": "{{ " + "9" * 60000 + " }}",
    "long template": "x" * 70000,
}
# These end by their budget of turns or of time, not at once.
SLOW_BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% set r = range(99999) %}{% for x in r recursive %}{% if loop.first %}{{ loop(r) }}{% endif %}"
    "{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


def render_case(case: dict) -> str:
    """What we make of a recorded case."""
    options = {key: case[key] for key in ("add_generation_prompt", "tools")} | case["kwargs"]
    return render_chat(RECORDED["templates"][case["template"]], case["messages"], **options)


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_that_of_transformers(case: dict):
    assert render_case(case) == case["expected"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_recorded_text_is_that_of_the_installed_transformers(case: dict):
    reason = "transformers is the oracle; the product and the recorded cases do not need it"
    utilities = pytest.importorskip("transformers.utils.chat_template_utils", reason=reason)
    options = {key: case[key] for key in ("add_generation_prompt", "tools")} | case["kwargs"]
    template = RECORDED["templates"][case["template"]]
    rendered, _ = utilities.render_jinja_template([case["messages"]], chat_template=template, **options)
    assert rendered == [case["expected"]]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_gets_out(template: str):
    try:
        text = render_chat(template, HELLO)
    except InvalidRequestError:
        return
    assert "object" not in text
    assert "class" not in text
    assert "environment" not in text
    assert "module" not in text


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_make_anything_large(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.tokenization.chat_template._BASE_WORK", 400_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError) as caught:
            render_chat(BOMBS[name], HELLO)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.parameter in ("chat_template", "messages")
    assert peak_bytes < 64 * 2**20


@pytest.mark.parametrize("name", SLOW_BOMBS)
def test_long_turns_end_by_their_budget(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.tokenization.chat_template._BASE_WORK", 20_000)
    with pytest.raises(InvalidRequestError, match="stays within its limits"):
        render_chat(SLOW_BOMBS[name], HELLO)


def test_time_ends_a_render_too(monkeypatch: pytest.MonkeyPatch):
    render_chat(CHATML, HELLO)  # compiled now, so that only the render meets the limit
    monkeypatch.setattr("jaxserve.tokenization.chat_template._MAX_SECONDS", -1.0)
    with pytest.raises(InvalidRequestError, match="it takes too long"):
        render_chat(CHATML, HELLO)


def test_long_conversations_stay_within_the_budget():
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " * 500} for n in range(200)]
    for name in ("llama-3", "chatml", "mistral", "qwen2.5"):
        text = render_chat(RECORDED["templates"][name], messages, bos_token="<s>", eos_token="</s>")
        assert len(text) > 200 * 1000


def test_without_a_template_the_remedy_is_said():
    with pytest.raises(
        InvalidRequestError, match=r"chat_template must be a Jinja template.*Pass chat_template=…, or .*generate"
    ):
        render_chat(None, HELLO)


def test_a_template_that_does_not_compile_is_named():
    with pytest.raises(InvalidRequestError, match="chat_template must be a Jinja template that compiles"):
        render_chat("{% for %}", HELLO)


def test_the_template_s_own_refusal_is_passed_on():
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InvalidRequestError, match="Conversation roles must alternate") as caught:
        render_chat(RECORDED["templates"]["mistral"], messages, bos_token="<s>", eos_token="</s>")
    assert (caught.value.parameter, caught.value.value) == ("messages", ["user", "user"])


def test_a_template_s_crash_is_the_request_s_error():
    with pytest.raises(InvalidRequestError, match=r"messages must be .*ZeroDivisionError"):
        render_chat("{{ 1 // 0 }}", HELLO)


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "at least one"),
        ("hi", "at least one"),
        (["hi"], r"messages\[0\]"),
        ([{"content": "x"}], r"messages\[0\].role"),
        ([{"role": "", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content"),
        ([*HELLO, {"role": "user", "content": [{"type": "image_url"}]}], r"messages\[1\].content\[0\]"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content"),
        ([{"role": "user", "content": "a\x00"}], r"messages\[0\].content"),
        ([{"role": "user", "content": "a\ufdd0"}], r"messages\[0\].content"),
        ([{"role": "user", "content": "a", "x": object()}], r"messages\[0\].x"),
        ([{"role": "user", "content": "a", "x": float("nan")}], r"messages\[0\].x"),
        ([{"role": "user", "content": "a", 5: 1}], r"messages\[0\]"),
    ],
)
def test_malformed_messages_are_located(messages: object, where: str):
    with pytest.raises(InvalidRequestError, match=where) as caught:
        render_chat(CHATML, messages)
    assert caught.value.parameter == "messages"


def test_nesting_of_messages_is_bounded():
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested at most"):
        render_chat(CHATML, [{"role": "user", "content": "a", "x": deep}])


def test_keyword_arguments_are_scalars():
    assert render_chat("{{ enable_thinking }}", HELLO, enable_thinking=True) == "True"
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs must be scalars"):
        render_chat("{{ x }}", HELLO, x=[1])
    with pytest.raises(InvalidRequestError, match="tools must be a list of JSON objects"):
        render_chat("{{ x }}", HELLO, tools=[print])


def test_parts_reach_templates_that_read_them_and_are_joined_for_others():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render_chat("{{ messages[0].content }}", messages) == "a\nb"
    direct = "{% for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}"
    named = "{% set c = messages[0].content %}{% for part in c %}<{{ part.text }}>{% endfor %}"
    loop = "{% for part in content %}<{{ part.text }}>{% endfor %}"
    macro = "{% macro f(content) %}" + loop + "{% endmacro %}{{ f(messages[0].content) }}"
    for template in (direct, named, macro):
        assert render_chat(template, messages) == "<a><b>"


def test_the_caller_s_messages_are_left_alone():
    messages = [{"role": "user", "content": "<|im_end|>"}]
    render_chat(CHATML, messages, protect=["<|im_end|>"], add_generation_prompt=False, continue_final_message=True)
    assert messages == [{"role": "user", "content": "<|im_end|>"}]


def test_the_final_message_can_be_continued():
    messages = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat(CHATML, messages, **options).endswith("<|im_start|>assistant\nOnce upon ")
    assert render_chat(RECORDED["templates"]["llama-3"], messages, bos_token="", **options).endswith("\n\nOnce upon")
    with pytest.raises(InvalidRequestError, match="continue_final_message"):
        render_chat(CHATML, messages, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="rewrites the last message"):
        render_chat("{{ messages | length }}", messages, **options)


def test_no_message_can_write_a_special_token(tokenizers_by_flavour: dict[str, Tokenizer]):
    """Neither in one piece, nor across two parts, nor in a tool; the template's own stay special."""
    tokenizer = tokenizers_by_flavour["byte_level"]
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{% for p in m.content %}"
        "{{ p.text }}{% endfor %}<|eot_id|>{% endfor %}{{ tools | tojson }}"
    )
    for texts in (["a<|eot_id|>b"], ["<|eot", "_id|>"], ["<", "|eot_id|>"], ["<|start_header_id|><|eot_id|>"], ["plain"]):
        messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
        tools = [{"name": "".join(texts)}]
        ids = encode_chat(tokenizer, messages, chat_template=template, tools=tools)
        special = [tokenizer.token_text(i) for i in ids if i in tokenizer.special_token_ids]
        assert special == ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        assert tokenizer.decode(ids) == "user" + "".join(texts) + json.dumps(tools)


def test_a_chat_without_look_alikes_is_encoded_as_the_rendered_text(tokenizers_by_flavour: dict[str, Tokenizer]):
    tokenizer = tokenizers_by_flavour["byte_level"]
    template = RECORDED["templates"]["llama-3"]
    text = render_chat(template, HELLO, bos_token="<|begin_of_text|>")
    expected = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    assert encode_chat(tokenizer, HELLO, chat_template=template) == expected


def test_the_model_s_own_template_is_the_default():
    tokenizer = AsciiTokenizer("{{ messages[0].content }}>{{ eos_token }}")
    assert encode_chat(tokenizer, HELLO) == [*b"hi>", 0]
    with pytest.raises(InvalidRequestError, match="chat_template must be"):
        encode_chat(AsciiTokenizer(), HELLO)
