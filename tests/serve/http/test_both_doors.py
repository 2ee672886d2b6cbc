"""gRPC and HTTP on the same running requests: what a scrape and the log say of calls that are known."""

import logging
import math
import re

import grpc
import pytest

LINE = re.compile(
    r"request_id=(\S+) x_request_id=(\S+) endpoint=(\S+) status=(\S+) finish_reason=(\S+) prompt_tokens=(\d+) "
    r"cached_tokens=(\d+) completion_tokens=(\d+) queue_ms=(\S+) first_token_ms=(\S+) total_ms=(\S+)"
)
CANARY = "canary prompt"


def test_both_doors_are_counted(with_both_doors, client, until, samples):
    """Known requests: 3 of 10 tokens, one refused, one left by its client, one that fails."""

    async def body(served):
        complete = served.api.completions.create
        await served.generate("abc", 10)
        await complete(model="fake", prompt="abcd", max_tokens=10)
        stream = await complete(model="fake", prompt=["ab"], max_tokens=10, stream=True)
        assert [chunk async for chunk in stream]
        status, _, _ = await served.request("POST", "/v1/completions", {"prompt": "a", "top_p": 7})
        assert status == 400
        stream = await complete(model="fake", prompt="abcde", max_tokens=4000, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: client.aborted)
        await served.running.wait_idle()
        client.fail_at = 2
        with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
            await served.generate("a", 10)
        status, headers, data = await served.request("GET", "/metrics")
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
        return samples(data.decode())

    found = with_both_doors(body)

    def calls(endpoint, status):
        return found["jaxserve_calls_total", ("endpoint", endpoint), ("status", status)]

    assert (calls("Generate", "OK"), calls("Generate", "INTERNAL")) == (1, 1)
    http = {status: calls("/v1/completions", status) for status in ("200", "400", "499")}
    assert http == {"200": 2, "400": 1, "499": 1}
    ended = {
        reason: found["vllm:request_success_total", ("finished_reason", reason)] for reason in ("length", "abort", "error")
    }
    assert ended == {"length": 3, "abort": 1, "error": 1}
    assert found["vllm:prompt_tokens_total",] == 3 + 4 + 2 + 5 + 1
    assert found["vllm:generation_tokens_total",] >= 3 * 10 + 1 + 2
    assert found["vllm:time_to_first_token_seconds_count",] == 5
    assert found["vllm:inter_token_latency_seconds_count",] >= 3 * 9 + 1
    assert found["vllm:e2e_request_latency_seconds_count",] == 3
    assert found["vllm:request_queue_time_seconds_count",] == 3
    assert math.isclose(found["vllm:request_queue_time_seconds_sum",], 0.3)  # the fake's are 0.1 s each
    assert 0 < found["vllm:time_to_first_token_seconds_sum",] < found["vllm:e2e_request_latency_seconds_sum",] + 20
    assert found["vllm:num_requests_running",] == found["vllm:kv_cache_usage_perc",] == 0
    assert "abc" not in str(found)


def test_each_call_of_either_door_has_one_line_and_no_text(with_both_doors, client, caplog, until):
    caplog.set_level(logging.DEBUG)
    client.text = "canary completion"

    async def body(served):
        await served.generate(CANARY, 3, request_id="mine")
        complete, headers = served.api.completions.create, {"X-Request-Id": "trace-7"}
        await complete(model="fake", prompt=CANARY, max_tokens=4, extra_headers=headers)
        async for _ in await complete(model="fake", prompt=[CANARY, CANARY], max_tokens=5, stream=True):
            pass
        messages = [{"role": "user", "content": CANARY}]
        for asked in (
            {"messages": messages, "max_tokens": 1},
            {"messages": CANARY},
            {"messages": messages, "model": CANARY},
        ):
            await served.request("POST", "/v1/chat/completions", asked)
        await served.request("POST", "/v1/completions", b'{"prompt": "canary prompt",')
        stream = await complete(model="fake", prompt=CANARY, max_tokens=4000, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: client.aborted)
        await served.running.wait_idle()

    with_both_doors(body)
    ours = [record for record in caplog.records if record.name.startswith(("serve", "jaxserve", "uvicorn"))]
    assert [record for record in ours if "canary" in record.getMessage()] == []
    lines = [LINE.fullmatch(record.getMessage()).groups() for record in ours if record.name == "serve.requests"]
    short = [(endpoint, status, reason, *counts) for _, _, endpoint, status, reason, *counts, _, _, _ in lines]
    assert short[:3] == [
        ("Generate", "OK", "length", "13", "3", "3"),
        ("/v1/completions", "200", "length", "13", "3", "4"),
        ("/v1/completions", "200", "length", "26", "6", "10"),
    ]
    chat = [line[:3] for line in short if line[0] == "/v1/chat/completions"]
    assert chat == [(chat[0][0], "200", "length"), (chat[0][0], "400", "-"), (chat[0][0], "404", "-")]
    assert [line[1] for line in short[6:]] == ["400", "499"]
    assert lines[0][:2] == ("mine", "-")
    assert (lines[1][0][:5], lines[1][1]) == ("cmpl-", "trace-7")
    assert all(float(value) >= 0 for value in lines[0][8:])
    assert lines[0][8] == "100.0"  # the fake's
