"""What is taken, what is refused and how: bodies, fields, routes, ids, health."""

import json

import pytest

from jaxserve.request import RepetitionDetection
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.http.fields import NEUTRAL, WITHOUT_EFFECT

MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def valid(path):
    return {"prompt": "a", "max_tokens": 1} if path == COMPLETIONS else {"messages": MESSAGES, "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "field", "value", "named"),
    [
        (COMPLETIONS, "prompt", None, "prompt"),
        (COMPLETIONS, "prompt", [], "prompt"),
        (COMPLETIONS, "prompt", "", "prompt"),
        (COMPLETIONS, "prompt", {"a": 1}, "prompt"),
        (COMPLETIONS, "prompt", ["a", 1], "prompt"),
        (COMPLETIONS, "prompt", ["a", ""], "prompt[1]"),
        (COMPLETIONS, "prompt", [1.0], "prompt"),
        (COMPLETIONS, "prompt", [True], "prompt"),
        (COMPLETIONS, "prompt", [128], "prompt"),
        (COMPLETIONS, "prompt", "\ud800", "prompt"),
        (COMPLETIONS, "prompt", "a\x00b", "prompt"),
        (COMPLETIONS, "prompt", ["a"] * 65, "prompt"),
        (COMPLETIONS, "max_tokens", 0, "max_tokens"),
        (COMPLETIONS, "max_tokens", 1.0, "max_tokens"),
        (COMPLETIONS, "max_tokens", "1", "max_tokens"),
        (COMPLETIONS, "max_tokens", True, "max_tokens"),
        (COMPLETIONS, "max_tokens", 2**63, "max_tokens"),
        (COMPLETIONS, "n", 129, "n"),
        (COMPLETIONS, "n", 0, "n"),
        (COMPLETIONS, "presence_penalty", 2.5, "presence_penalty"),
        (COMPLETIONS, "frequency_penalty", "1", "frequency_penalty"),
        (COMPLETIONS, "repetition_penalty", 0, "repetition_penalty"),
        (COMPLETIONS, "logit_bias", {"x": 1}, "logit_bias"),
        (COMPLETIONS, "logit_bias", {"128": 1}, "logit_bias"),
        (COMPLETIONS, "logit_bias", {"5": "1"}, "logit_bias['5']"),
        (COMPLETIONS, "logit_bias", [5], "logit_bias"),
        (COMPLETIONS, "allowed_token_ids", [128], "allowed_token_ids"),
        (COMPLETIONS, "allowed_token_ids", {"5": 1}, "allowed_token_ids"),
        (COMPLETIONS, "bad_words", [f"w{i}" for i in range(129)], "bad_words"),
        (COMPLETIONS, "bad_words", ["a" * 257], "bad_words"),
        (COMPLETIONS, "bad_words", ["ö"], "bad_words"),
        (COMPLETIONS, "bad_words", "a", "bad_words"),
        (COMPLETIONS, "prompt_logprobs", -1, "prompt_logprobs"),
        (COMPLETIONS, "prompt_logprobs", 6, "prompt_logprobs"),
        (COMPLETIONS, "logprobs", -1, "logprobs"),
        (COMPLETIONS, "truncate_prompt_tokens", 0, "truncate_prompt_tokens"),
        (COMPLETIONS, "truncate_prompt_tokens", 4096, "truncate_prompt_tokens"),
        (COMPLETIONS, "thinking_token_budget", 5, "thinking_token_budget"),
        (COMPLETIONS, "repetition_detection", {"max_patern_size": 5}, "repetition_detection.max_patern_size"),
        (COMPLETIONS, "repetition_detection", {"max_pattern_size": 5, "min_count": 1}, "repetition_detection.min_count"),
        (COMPLETIONS, "repetition_detection", 5, "repetition_detection"),
        (COMPLETIONS, "vllm_xargs", {"shift": [1]}, "vllm_xargs.shift"),
        (COMPLETIONS, "vllm_xargs", {"shift": "1"}, "vllm_xargs.shift"),
        (COMPLETIONS, "vllm_xargs", [1], "vllm_xargs"),
        (COMPLETIONS, "guided_regex", "a+", "guided_regex"),
        (COMPLETIONS, "return_tokens_as_token_ids", 1, "return_tokens_as_token_ids"),
        (COMPLETIONS, "top_p", 0, "top_p"),
        (COMPLETIONS, "seed", 2**64, "seed"),
        (COMPLETIONS, "stop", [""], "stop"),
        (COMPLETIONS, "stop", {"a": 1}, "stop"),
        (COMPLETIONS, "stop", ["x"] * 17, "stop"),
        (COMPLETIONS, "stop", ["x" * 257], "stop"),
        (COMPLETIONS, "stop_token_ids", list(range(129)), "stop_token_ids"),
        (COMPLETIONS, "stop_token_ids", [128], "stop_token_ids"),
        (COMPLETIONS, "logprobs", 6, "logprobs"),
        (COMPLETIONS, "logprobs", True, "logprobs"),
        (COMPLETIONS, "echo", "yes", "echo"),
        (COMPLETIONS, "stream", 1, "stream"),
        (COMPLETIONS, "stream_options", {"include_usage": True}, "stream_options"),
        (COMPLETIONS, "model", 7, "model"),
        (COMPLETIONS, "priority", 2**31, "priority"),
        (COMPLETIONS, "add_special_tokens", 1, "add_special_tokens"),
        (COMPLETIONS, "messages", MESSAGES, "messages"),
        (COMPLETIONS, "temprature", 1, "temprature"),
        (CHAT, "messages", None, "messages"),
        (CHAT, "messages", [], "messages"),
        (CHAT, "messages", "hi", "messages"),
        (CHAT, "messages", MESSAGES * 1025, "messages"),
        (CHAT, "messages", [{"role": "user"}], "messages"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        (CHAT, "messages", [{"role": "user", "content": "x" * 5000}], "messages"),
        (CHAT, "messages", [{"role": "user", "content": "ö"}], "messages"),
        (CHAT, "prompt", "a", "prompt"),
        (CHAT, "logprobs", 1, "logprobs"),
        (CHAT, "top_logprobs", 1, "top_logprobs"),
        (CHAT, "max_completion_tokens", 2, "max_tokens"),
        (CHAT, "chat_template_kwargs", {"messages": "x"}, "chat_template_kwargs.messages"),
        (CHAT, "chat_template_kwargs", {"a b": "x"}, "chat_template_kwargs.a b"),
        (CHAT, "chat_template_kwargs", {"style": []}, "chat_template_kwargs.style"),
        (CHAT, "chat_template_kwargs", [], "chat_template_kwargs"),
        (CHAT, "continue_final_message", True, "continue_final_message"),
        (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
        (CHAT, "response_format", {"type": "json_object"}, "response_format"),
        (CHAT, "presence_penalty", False, "presence_penalty"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(ask, client, path, field, value, named):
    status, error = ask(path, valid(path) | {field: value})
    assert (status, error["param"], error["type"]) == (400, named, "invalid_request_error")
    assert error["message"].startswith(named)
    assert client.submitted == []


def test_a_name_that_nobody_knows_gets_a_suggestion(ask):
    _, error = ask(COMPLETIONS, valid(COMPLETIONS) | {"max_token": 1})
    assert "Did you mean max_tokens?" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_asks_for_nothing_is_taken(ask, path):
    """Every field that is not served has values that clients send all the same, and null is always one."""
    own = {"suffix", "echo"} if path == CHAT else {"tools"}
    gone = {
        "allowed_token_ids": [],
        "bad_words": [],
        "logit_bias": {},
        "vllm_xargs": {},
        "response_format": {"type": "text"},
    }
    neutral = gone | {name: values[0] if values and name not in own else None for name, values in NEUTRAL.items()}
    body = valid(path) | dict.fromkeys(WITHOUT_EFFECT, "x") | neutral | {"presence_penalty": 0.0}
    status, answer = ask(path, body)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON: Expecting value: line 1 column 1"),
        (b'{"prompt": "a",\n "max_tokens": }', "line 2 column 16"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 12 is 0xff"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "1e999"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "more than 64 deep"),
        (b'{"a": ' + b"[" * 100_000, "more than 64 deep"),
    ],
    ids=range(12),
)
def test_a_body_that_is_no_json_object_says_where(ask, body, message):
    status, error = ask(COMPLETIONS, body)
    assert (status, error["code"]) == (400, "invalid_json")
    assert message in error["message"]


@pytest.mark.parametrize(("value", "field"), [("NaN", "temperature"), ("1e999", "top_p"), ("[1, [-Infinity]]", "stop")])
def test_a_number_that_is_not_finite_names_its_field(ask, value, field):
    status, error = ask(COMPLETIONS, b'{"prompt": "a", "%s": %s}' % (field.encode(), value.encode()))
    assert (status, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field} has ")


def test_64_levels_are_taken(ask):
    _, error = ask(COMPLETIONS, b'{"a": ' + b"[" * 62 + b"]" * 62 + b"}")
    assert error["param"] == "a"


def test_a_model_without_a_chat_template_says_what_else_there_is(ask):
    status, error = ask(CHAT, valid(CHAT), tokenizer=AsciiTokenizer())
    assert (status, error["code"]) == (400, "no_chat_template")
    assert "/v1/completions" in error["message"]
    assert "--chat-template" in error["message"]


def test_without_a_tokenizer_token_ids_alone_are_taken(ask):
    assert ask(COMPLETIONS, {"prompt": [1], "max_tokens": 1}, tokenizer=None)[0] == 200
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, valid(CHAT)), (COMPLETIONS, {"prompt": [1], "echo": True})):
        status, error = ask(path, body, tokenizer=None)
        assert (status, "no tokenizer" in error["message"]) == (400, True)


def test_special_tokens_in_a_message_stay_text(ask, client):
    ask(CHAT, {"messages": [{"role": "user", "content": "a<eos>b"}], "max_tokens": 1})
    assert 0 not in client.submitted[0].prompt_token_ids


def test_routes_that_are_not_there(with_http):
    async def body(served):
        status, _, data = await served.request("GET", "/v1/nothing")
        assert (status, json.loads(data)["error"]["message"]) == (404, "GET /v1/nothing is not served here (Not Found).")
        status, headers, _ = await served.request("GET", COMPLETIONS)
        assert (status, headers["allow"]) == (405, "POST")
        status, _, data = await served.request("GET", "/version")
        assert (status, set(json.loads(data))) == (200, {"version"})

    with_http(body)


def test_the_request_id_comes_back_and_never_clashes(with_http, client):
    async def body(served):
        ids = []
        for _ in range(2):
            _, headers, data = await served.request("POST", COMPLETIONS, valid(COMPLETIONS), ["X-Request-Id: trace-7"])
            assert headers["x-request-id"] == "trace-7"
            ids.append(json.loads(data)["id"])
        assert len(set(ids)) == 2
        _, headers, data = await served.request("POST", COMPLETIONS, valid(COMPLETIONS))
        assert json.loads(data)["id"] == "cmpl-" + headers["x-request-id"]
        for wrong in ("a b", "x" * 129, "\x9b31m"):
            status, _, data = await served.request("GET", "/health", None, [f"X-Request-Id: {wrong}"])
            assert (status, json.loads(data)["error"]["param"]) == (400, "X-Request-Id")

    with_http(body)


def test_health_is_about_life_progress_and_room_for_more(with_http, client):
    async def body(served):
        async def health():
            status, headers, data = await served.request("GET", "/health")
            assert ("retry-after" in headers) == (status == 503)
            assert (await served.request("POST", "/ping"))[0] == status
            return status, json.loads(data)

        assert await health() == (200, {"status": "ok"})
        stream = await served.api.completions.create(model="fake", prompt="a", max_tokens=4000, stream=True)
        await anext(aiter(stream))
        assert (await health())[0] == 200
        client.stalled_s = 29.0
        assert (await health())[0] == 200
        client.stalled_s = 31.0  # as if a kernel hung: alive, with work, and without a step
        status, answer = await health()
        assert (status, answer["error"]["message"]) == (503, "The engine has work and has made no step for 31 s.")
        client.stalled_s = 0.0
        assert (await health())[0] == 200
        await stream.close()
        client.is_alive = False
        assert (await health())[0] == 503
        client.is_alive = True
        served.running.refuse_new()
        assert (await health())[0] == 503

    with_http(body)


def test_before_the_model_is_loaded_everything_is_unavailable(with_http):
    async def body(served):
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", COMPLETIONS)):
            status, headers, _ = await served.request(method, path, valid(COMPLETIONS))
            assert (status, "retry-after" in headers) == (503, True), path

    with_http(body, is_ready=False)


def test_sampling_fields_reach_the_engine(ask, client):
    fields = {
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 200, "6": -1},
        "allowed_token_ids": (5, 6),
        "min_p": 0.25,
        "top_k": 3,
    }
    for path in (COMPLETIONS, CHAT):
        own = {
            "truncate_prompt_tokens": 1,
            "repetition_detection": {"max_pattern_size": 3, "min_count": 4},
            "bad_words": ["x"],
        }
        status, answer = ask(path, valid(path) | fields | own)
        assert status == 200, answer
        request = client.submitted.pop()
        assert {name: getattr(request.sampling, name) for name in fields} == fields | {"logit_bias": {5: 100, 6: -1}}
        assert request.sampling.repetition_detection == RepetitionDetection(max_pattern_size=3, min_count=4)
        assert request.constraint is not None
        assert len(request.prompt_token_ids) == 1


@pytest.mark.parametrize(("path", "limit"), [(COMPLETIONS, 16), (CHAT, 20)])
def test_the_models_defaults_stand_for_fields_that_are_absent(ask, client, path, limit):
    defaults = {"temperature": 0.5, "top_k": 7, "repetition_penalty": 1.25, "max_tokens": 20}
    body = valid(path)
    del body["max_tokens"]
    assert ask(path, body | {"top_k": 2}, defaults=defaults)[0] == 200
    sampling = client.submitted.pop().sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.5, 2, 1.25)
    assert sampling.max_tokens == limit
    assert ask(path, body | {"max_tokens": 30}, defaults=defaults)[0] == 200
    assert client.submitted.pop().sampling.max_tokens == 30


def test_choices_are_limited_over_all_prompts(ask):
    status, error = ask(COMPLETIONS, {"prompt": ["a"] * 3, "n": 43, "max_tokens": 1})
    assert (status, error["param"]) == (400, "n")
    assert "at most 128 / 3 prompts" in error["message"]
