"""What a scrape says, parsed by Prometheus' own parser, against requests that are known."""

import pytest
from prometheus_client import generate_latest

from jaxserve.engine_client import EngineStats
from jaxserve.outputs import RequestTimings
from serve.metrics import ServiceMetrics


@pytest.fixture
def rendered(samples):
    return lambda metrics: samples(generate_latest(metrics.registry).decode())


def test_gauges_and_counters_are_the_engines_own(rendered):
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_pages=50,
        num_free_pages=20,
        num_steps=7,
        num_preemptions=4,
        num_prompt_tokens=1000,
        num_cached_tokens=256,
        num_generated_tokens=90,
        num_compilations_since_ready=1,
    )
    found = rendered(ServiceMetrics("fake", lambda: stats))
    assert {name: found[name,] for name in ("vllm:num_requests_running", "vllm:num_requests_waiting")} == {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
    }
    assert found["vllm:kv_cache_usage_perc",] == 0.6
    assert found["vllm:prompt_tokens_total",] == 1000
    assert found["vllm:prompt_tokens_cached_total",] == 256
    assert found["vllm:generation_tokens_total",] == 90
    assert found["vllm:num_preemptions_total",] == 4
    assert found["jaxserve_steps_total",] == 7
    assert found["jaxserve_compilations_since_ready",] == 1


def test_times_are_the_requests_own(rendered):
    metrics = ServiceMetrics("fake", EngineStats)
    metrics.observe_first_token(0.0015)
    metrics.observe_inter_token(0.0008)
    metrics.observe_end("stop", 10.0, RequestTimings(arrived=10.5, scheduled=11.75, first_token=12.0, finished=13.0))
    metrics.observe_end("repetition", 10.0, None)
    metrics.observe_end("abort", 10.0, RequestTimings(arrived=10.5, finished=99.0))
    found = rendered(metrics)
    for name, seconds in (
        ("vllm:time_to_first_token_seconds", 0.0015),
        ("vllm:inter_token_latency_seconds", 0.0008),
        ("vllm:e2e_request_latency_seconds", 3.0),
        ("vllm:request_queue_time_seconds", 1.25),
    ):
        assert (found[f"{name}_count",], found[f"{name}_sum",]) == (1, seconds), name
    assert found["vllm:time_to_first_token_seconds_bucket", ("le", "0.001")] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", ("le", "0.002")] == 1
    assert found["vllm:inter_token_latency_seconds_bucket", ("le", "0.001")] == 1
    assert found["vllm:request_success_total", ("finished_reason", "stop")] == 1
    assert found["vllm:request_success_total", ("finished_reason", "abort")] == 1
    assert found["vllm:request_success_total", ("finished_reason", "error")] == 0
