"""OpenAI's own client, sync and async, over a real socket: what it parses, and the exceptions that it raises."""

import asyncio

import openai
import pytest

CONVERSATION = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
RENDERED = "<system>s<user>hi<assistant>"


def text(num_tokens):
    return "".join(chr(32 + i % 95) for i in range(num_tokens))


async def refusal(kind, call):
    with pytest.raises(kind) as caught:
        await call
    return caught.value


def test_models(with_http):
    async def body(served):
        [model] = (await served.api.models.list()).data
        assert (model.id, model.object, model.owned_by, model.model_extra["max_model_len"]) == (
            "fake",
            "model",
            "jaxserve",
            4096,
        )
        assert await served.api.models.retrieve("fake") == model
        error = await refusal(openai.NotFoundError, served.api.models.retrieve("other"))
        assert error.code == "model_not_found"

    with_http(body)


def test_the_sync_client(with_http):
    def work(base_url):
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as api:
            whole = api.completions.create(model="fake", prompt="a", max_tokens=5).choices[0].text
            chunks = list(api.completions.create(model="fake", prompt="a", max_tokens=5, stream=True))
            answer = api.chat.completions.create(model="fake", messages=CONVERSATION, max_tokens=5)
            return whole, "".join(chunk.choices[0].text for chunk in chunks), answer.choices[0].message.content

    async def body(served):
        return await asyncio.to_thread(work, served.base_url)

    assert with_http(body) == (text(5),) * 3


def test_a_completion_streamed_or_not_is_the_same(with_http, client):
    options = {"model": "fake", "prompt": "hello", "max_tokens": 30, "temperature": 0, "logprobs": 2}

    async def body(served):
        whole = await served.api.completions.create(**options)
        stream = await served.api.completions.create(**options, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_http(body)
    [choice] = whole.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text(30), "length", 0)
    assert (whole.object, whole.model, whole.id[:5]) == ("text_completion", "fake", "cmpl-")
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": 30,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    *deltas, last = chunks
    assert len(deltas) > 3
    assert "".join(chunk.choices[0].text for chunk in deltas) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in deltas)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for chunk in deltas for value in getattr(chunk.choices[0].logprobs, name)]
        assert streamed == getattr(choice.logprobs, name), name
    assert choice.logprobs.tokens == list(text(30))
    assert choice.logprobs.token_logprobs == [-0.5] * 30
    assert choice.logprobs.text_offset == list(range(30))
    assert list(choice.logprobs.top_logprobs[0].items()) == [("A", -0.25), (" ", -0.5), ("B", -3.0)]


def test_an_answer_streamed_or_not_is_the_same(with_http, client):
    options = {"model": "fake", "messages": CONVERSATION, "max_completion_tokens": 30, "logprobs": True, "top_logprobs": 1}

    async def body(served):
        whole = await served.api.chat.completions.create(**options)
        stream = await served.api.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_http(body)
    [choice] = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text(30), "length")
    assert (whole.object, whole.id[:9]) == ("chat.completion", "chatcmpl-")
    first, *deltas, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.role for chunk in deltas] == [None] * len(deltas)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == choice.message.content
    assert deltas[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)
    streamed = [entry for chunk in deltas for entry in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content
    entry = choice.logprobs.content[0]
    assert (entry.token, entry.logprob, entry.bytes) == (" ", -0.5, [32])
    assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [("A", -0.25, [65])]
    assert "".join(map(chr, client.submitted[0].prompt_token_ids)) == RENDERED
    assert client.submitted[0].sampling.max_tokens == 30


def test_every_kind_of_prompt(with_http, client):
    async def body(served):
        for prompt in ("ab", [97, 98], ["ab", "c"], [[97, 98], [99]]):
            answer = await served.api.completions.create(model="fake", prompt=prompt, max_tokens=2, echo=True)
            texts = [choice.text for choice in answer.choices]
            assert texts == (["ab" + text(2)] if len(texts) == 1 else ["ab" + text(2), "c" + text(2)])
            assert [choice.index for choice in answer.choices] == list(range(len(texts)))
            assert answer.usage.completion_tokens == 2 * len(texts)
        assert answer.usage.prompt_tokens == 3
        stream = await served.api.completions.create(model="fake", prompt=["ab", "c"], max_tokens=9, stream=True)
        parts = {0: "", 1: ""}
        async for chunk in stream:
            parts[chunk.choices[0].index] += chunk.choices[0].text
        assert parts == {0: text(9), 1: text(9)}

    with_http(body)
    assert [request.prompt_token_ids for request in client.submitted[:4]] == [(97, 98), (97, 98), (97, 98), (99,)]


def test_vllms_extras_reach_the_engine(with_http, client):
    extra = {
        "top_k": 7,
        "min_p": 0.25,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "priority": -3,
        "return_token_ids": True,
    }

    async def body(served):
        options = {"model": "fake", "seed": 11, "stop": ["zz"], "top_p": 0.5, "temperature": 0.75, "max_tokens": 3}
        completion = await served.api.completions.create(prompt="a", extra_body=extra, **options)
        assert completion.choices[0].model_extra["token_ids"] == [32, 33, 34]
        assert completion.choices[0].model_extra["prompt_token_ids"] == [97]
        kwargs = {"chat_template_kwargs": {"style": "brief"}, "add_generation_prompt": False, "continue_final_message": True}
        await served.api.chat.completions.create(messages=CONVERSATION, extra_body=extra | kwargs, **options)

    with_http(body)
    completion, chat = client.submitted
    for request in client.submitted:
        sampling = request.sampling
        assert (sampling.top_k, sampling.min_p, sampling.min_tokens, sampling.ignore_eos) == (7, 0.25, 2, True)
        assert (sampling.stop_token_ids, sampling.stop, sampling.seed) == ((5,), ("zz",), 11)
        assert (sampling.top_p, sampling.temperature, sampling.max_tokens) == (0.5, 0.75, 3)
        assert (sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (True, False)
        assert request.priority == -3
    assert "".join(map(chr, chat.prompt_token_ids)) == "<system>s<user>hi"


def test_defaults_are_vllms(with_http, client):
    async def body(served):
        await served.api.completions.create(model="fake", prompt="a")
        stream = await served.api.chat.completions.create(model="fake", messages=CONVERSATION, stream=True)
        await stream.close()

    with_http(body)
    completion, chat = [request.sampling for request in client.submitted]
    assert (completion.max_tokens, completion.temperature, completion.logprobs) == (16, 1.0, None)
    assert (chat.max_tokens, chat.temperature, chat.logprobs) == (None, 1.0, None)


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_wrong_raises_the_clients_own_exception(with_http, client, is_stream):
    async def body(served):
        complete, chat = served.api.completions.create, served.api.chat.completions.create
        asked = {"model": "fake", "prompt": "a", "stream": is_stream}
        error = await refusal(openai.BadRequestError, complete(**asked | {"temperature": -1}))
        assert (error.param, error.type) == ("temperature", "invalid_request_error")
        assert "got -1" in error.message
        error = await refusal(openai.BadRequestError, complete(**asked | {"prompt": "x" * 5000}))
        assert error.param == "prompt"
        error = await refusal(openai.BadRequestError, complete(**asked | {"prompt": [[1], [1, 500]]}))
        assert error.param == "prompt[1]"
        asked = {"model": "fake", "messages": CONVERSATION, "stream": is_stream}
        error = await refusal(openai.BadRequestError, chat(**asked | {"max_completion_tokens": 0}))
        assert error.param == "max_completion_tokens"
        error = await refusal(openai.NotFoundError, chat(**asked | {"model": "other"}))
        assert (error.param, error.code) == ("model", "model_not_found")
        client.fail_at = 0
        error = await refusal(openai.InternalServerError, chat(**asked))
        assert error.status_code == 500
        assert "canary" not in str(error)

    with_http(body)


def test_no_room_is_a_rate_limit_with_a_hint(with_http, client):
    client.gate.clear()

    async def body(served):
        held = asyncio.ensure_future(served.api.completions.create(model="fake", prompt="a", max_tokens=1))
        while not client.submitted:
            await asyncio.sleep(0.002)
        error = await refusal(openai.RateLimitError, served.api.completions.create(model="fake", prompt="a"))
        assert error.code == "rate_limit_exceeded"
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert 0 < int(error.response.headers["retry-after-ms"]) <= 60_000
        client.gate.set()
        assert (await held).choices[0].text == text(1)

    with_http(body, max_requests=1)


def test_a_server_that_drains_is_unavailable(with_http):
    async def body(served):
        served.running.refuse_new()
        error = await refusal(openai.APIStatusError, served.api.completions.create(model="fake", prompt="a"))
        assert error.status_code == 503
        assert int(error.response.headers["retry-after"]) >= 1

    with_http(body)


def test_a_fault_after_the_first_token_is_an_error_in_the_stream(with_http, client):
    client.fail_at = 3

    async def body(served):
        stream = await served.api.chat.completions.create(model="fake", messages=CONVERSATION, stream=True)
        with pytest.raises(openai.APIError, match="error_id=") as caught:
            async for _ in stream:
                pass
        assert "canary" not in str(caught.value)
        asked = {"prompt": "a", "stream": True}
        status, _, data = await served.request("POST", "/v1/completions", asked)
        assert (status, data.count(b'"error"')) == (200, 1)
        assert b"[DONE]" not in data

    with_http(body)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(with_http, client, until, is_stream):
    if not is_stream:
        client.step_s = 0.02

    async def body(served):
        call = served.api.chat.completions.create(model="fake", messages=CONVERSATION, max_tokens=4000, stream=is_stream)
        if is_stream:
            stream = await call
            async for _ in stream:
                break
            await stream.close()
        else:
            waiting = asyncio.ensure_future(call)
            await until(lambda: client.running)
            waiting.cancel()
        await until(lambda: client.aborted and not client.running)
        await asyncio.wait_for(served.running.wait_idle(), 5)
        answer = await served.api.completions.create(model="fake", prompt="a", max_tokens=2)
        assert answer.choices[0].text == text(2)

    with_http(body)
    assert len(client.aborted) == 1


# --- several completions, and log-probabilities of prompts -------------------------------------------------------------------


def by_index(chunks):
    """Texts, roles and finish reasons of a stream, by choice."""
    found = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts, reasons = found.setdefault(choice.index, ([], []))
        texts.append(choice.text if hasattr(choice, "text") else choice.delta.content or "")
        reasons.append(choice.finish_reason)
    return {index: ("".join(texts), [r for r in reasons if r]) for index, (texts, reasons) in found.items()}


def test_several_completions_of_several_prompts(with_http, client):
    options = {"model": "fake", "prompt": ["ab", "cde"], "n": 3, "max_tokens": 4, "seed": 7}

    async def body(served):
        whole = await served.api.completions.create(**options)
        stream = await served.api.completions.create(**options, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_http(body)
    assert [(c.index, c.text, c.finish_reason) for c in whole.choices] == [(i, text(4), "length") for i in range(6)]
    assert by_index(chunks) == {i: (text(4), ["length"]) for i in range(6)}
    assert whole.usage == chunks[-1].usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2 + 3, 6 * 4), "a prompt counts once"
    assert whole.usage.prompt_tokens_details.cached_tokens == 2 * 3
    assert [r.sampling.seed for r in client.submitted] == [7, 8, 9] * 4
    assert ["".join(map(chr, r.prompt_token_ids)) for r in client.submitted] == (["ab"] * 3 + ["cde"] * 3) * 2
    assert len({r.request_id for r in client.submitted}) == 12


def test_several_answers_of_one_conversation(with_http, client):
    options = {"model": "fake", "messages": CONVERSATION, "n": 3, "max_tokens": 4, "temperature": 0}

    async def body(served):
        whole = await served.api.chat.completions.create(**options, extra_body={"prompt_logprobs": 1})
        stream = await served.api.chat.completions.create(**options, stream=True)
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_http(body)
    assert [(c.index, c.message.content) for c in whole.choices] == [(i, text(4)) for i in range(3)]
    assert by_index(chunks) == {i: (text(4), ["length"]) for i in range(3)}
    assert whole.usage.prompt_tokens == len(RENDERED)
    assert [r.sampling.prompt_logprobs for r in client.submitted[:3]] == [1, None, None], "computed once, for all"
    places = whole.model_extra["prompt_logprobs"]
    assert places[0] is None
    assert places[1] == {
        str(ord("s")): {"logprob": -1.5, "rank": 4, "decoded_token": "s"},
        "65": {"logprob": -0.25, "rank": 1, "decoded_token": "A"},
    }
    assert len(places) == len(RENDERED)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_an_echo_has_the_log_probabilities_of_the_prompt(with_http, stream, max_tokens):
    """max_tokens=0 is how evaluations score a text: the prompt alone, with its log-probabilities."""
    options = {"model": "fake", "prompt": "abc", "max_tokens": max_tokens, "logprobs": 1, "echo": True, "n": 2}

    async def body(served):
        if not stream:
            return (await served.api.completions.create(**options)).choices
        chunks = [chunk async for chunk in await served.api.completions.create(**options, stream=True)]
        return [choice for chunk in chunks for choice in chunk.choices]

    choices = with_http(body)
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]

        def joined(name, own=own):
            return [value for choice in own for value in getattr(choice.logprobs, name)]

        assert "".join(choice.text for choice in own) == "abc" + text(max_tokens)
        assert joined("tokens") == list("abc" + text(max_tokens))
        assert joined("token_logprobs") == [None, -1.5, -1.5] + [-0.5] * max_tokens
        assert joined("top_logprobs")[:2] == [None, {"A": -0.25, "b": -1.5}]
        assert joined("text_offset") == list(range(3 + max_tokens))


def test_prompt_log_probabilities_are_a_field_of_their_own(with_http):
    async def body(served):
        answer = await served.api.completions.create(model="fake", prompt="ab", extra_body={"prompt_logprobs": 0})
        with pytest.raises(openai.BadRequestError, match="prompt_logprobs must be absent where stream is true"):
            await served.api.completions.create(model="fake", prompt="ab", stream=True, extra_body={"prompt_logprobs": 0})
        return answer.choices[0]

    choice = with_http(body)
    assert choice.model_extra["prompt_logprobs"][0] is None
    assert choice.model_extra["prompt_logprobs"][1]["98"]["logprob"] == -1.5
    assert choice.logprobs is None


def test_tokens_may_be_written_as_their_ids(with_http):
    async def body(served):
        extra = {"return_tokens_as_token_ids": True}
        one = await served.api.completions.create(model="fake", prompt="ab", max_tokens=2, logprobs=1, extra_body=extra)
        other = await served.api.chat.completions.create(
            model="fake", messages=CONVERSATION, max_tokens=2, logprobs=True, top_logprobs=1, extra_body=extra
        )
        return one.choices[0].logprobs, other.choices[0].logprobs.content

    completion, answer = with_http(body)
    assert completion.tokens == ["token_id:32", "token_id:33"]
    assert set(completion.top_logprobs[0]) == {"token_id:32", "token_id:65", "token_id:66"}
    assert [entry.token for entry in answer] == completion.tokens
    assert answer[0].top_logprobs[0].token == "token_id:65"
