"""An engine without a model: a thread that makes tokens which can be predicted, behind `EngineClient`.

And the service on a real socket around it, for tests that speak gRPC from this process.
"""

import asyncio
import contextlib
import functools
import queue
import threading
import time
from types import SimpleNamespace

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.async_engine import AsyncEngine
from jaxserve.config import ResolvedConfig
from jaxserve.engine_client import EngineStats
from jaxserve.errors import DrainingError, EngineDeadError
from jaxserve.outputs import Logprob, RequestTimings, TokenDelta
from jaxserve.request_factory import RequestFactory
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from serve.admission import Admission
from serve.metrics import ServiceMetrics
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc
from serve.rpc.server import RpcServer
from serve.rpc.service import GenerationService
from serve.running import RunningRequests


class FakeClient:
    """Token i of every request is 32 + i mod 95, its text that character (or `text`); ends by max_tokens.

    Attributes:
        step_s: between two tokens.
        gate: cleared, no token is made.
        fail_at: the token at which a request ends with `error`.
        aborted, finished: ids, in the order of their ends.
    """

    def __init__(self):
        self.step_s = 0.001
        self.text = None
        self.fail_at = None
        self.error = RuntimeError("canary-secret")
        self.gate = threading.Event()
        self.gate.set()
        self.aborted, self.finished = [], []
        self.submitted = []
        self.num_steps = self.num_prompt_tokens = self.num_generated_tokens = 0
        self.is_alive = True
        self.stalled_s = 0.0
        self.is_closed = False
        self._inbox = queue.SimpleQueue()
        self._running = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request, listener):
        if not self.is_alive:
            raise EngineDeadError("dead")
        if self.is_closed:
            raise DrainingError("closed")
        self.submitted.append(request)
        self._inbox.put(("submit", request, listener))

    def abort(self, request_ids):
        self._inbox.put(("abort", tuple(request_ids), None))

    def stats(self):
        return EngineStats(
            num_running=len(self._running),
            num_pages=64,
            num_free_pages=64 - len(self._running),
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            stalled_s=self.stalled_s,
            is_alive=self.is_alive,
        )

    def drain(self, timeout_s=None):
        return True

    def close(self):
        self.is_closed = True
        self._thread.join()

    @property
    def running(self):
        return sorted(self._running)

    def _run(self):
        while not self.is_closed or not self._inbox.empty():
            while not self._inbox.empty():
                verb, what, listener = self._inbox.get()
                if verb == "submit":
                    self.num_prompt_tokens += len(what.prompt_token_ids)
                    self._running[what.request_id] = (what, listener, 0)
                else:
                    for request_id in what:
                        if request_id in self._running:
                            request, its_listener, num = self._running.pop(request_id)
                            self.aborted.append(request_id)
                            its_listener([self._delta(request, [], num, "abort")])
            if self.gate.is_set():
                self._step()
            time.sleep(self.step_s)

    def _step(self):
        self.num_steps += bool(self._running)
        for request_id, (request, listener, num) in list(self._running.items()):
            if num == self.fail_at:
                del self._running[request_id]
                listener([TokenDelta(request_id, "", [], finish_reason="error", error=self.error)])
                continue
            is_last = num + 1 == request.sampling.max_tokens
            self.num_generated_tokens += 1
            delta = self._delta(request, [32 + num % 95], num, "length" if is_last else None)
            if is_last:
                del self._running[request_id]
                self.finished.append(request_id)
            else:
                self._running[request_id] = (request, listener, num + 1)
            listener([delta])

    def _delta(self, request, token_ids, num, finish_reason):
        now = time.monotonic()
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = [
                {t: Logprob(-0.5, 2, chr(t)), 65: Logprob(-0.25, 1, "A"), 66: Logprob(-3.0, 3, "B")} for t in token_ids
            ]
        return TokenDelta(
            request.request_id,
            self.text or "".join(chr(t) for t in token_ids),
            token_ids,
            logprobs,
            finish_reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=3,
            timings=None if finish_reason is None else RequestTimings(now - 0.4, now - 0.3, now - 0.2, now),
            made_s=now if token_ids else None,
        )


def resolved_config():
    return ResolvedConfig(
        model_name="fake",
        platform="cpu",
        vocab_size=128,
        tensor_parallel_size=1,
        dtype="float32",
        kv_dtype="float32",
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=64,
        page_size=16,
        num_pages=64,
        max_pages_per_seq=256,
        token_buckets=(64,),
        sequence_buckets=(4,),
        split_size=256,
        query_tile=16,
        max_decode_items=64,
        max_cached_pages=0,
        max_full_scores=64,
        logprobs_mode="raw",
        logits_processors=(),
        reads_prompt_len=False,
        max_host_bytes=1 << 30,
        seed=0,
        max_logprobs=5,
        attention_backend="auto",
    )


def built_engine(client, tokenizer):
    config = resolved_config()
    return SimpleNamespace(
        client=client,
        tokenizer=tokenizer,
        config=config,
        requests=RequestFactory(config, tokenizer),
        close=client.close,
    )


def running_requests(client, tokenizer, *, max_requests=8, max_tokens=None, max_pending_tokens=4096, write_timeout_s=30.0):
    built = built_engine(client, tokenizer)
    return RunningRequests(
        AsyncEngine(client, max_pending_tokens=max_pending_tokens),
        built.requests,
        tokenizer,
        built.config,
        Admission(max_requests, max_tokens),
        ServiceMetrics(built.config.model_name, client.stats),
        write_timeout_s=write_timeout_s,
    )


@contextlib.asynccontextmanager
async def serving(client, *, tokenizer, **limits):
    """Yields service, stub and channel; nothing may be left open or running afterwards."""
    running = running_requests(client, tokenizer, **limits)
    server = RpcServer("127.0.0.1", 0)
    await server.start(GenerationService(running), with_reflection=True)
    try:
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            yield SimpleNamespace(
                service=running,
                channel=channel,
                server=server,
                stub=jaxserve_pb2_grpc.GenerationServiceStub(channel),
            )
    finally:
        await server.stop(0.5)


@pytest.fixture
def client():
    client = FakeClient()
    yield client
    client.gate.set()
    client.close()


@pytest.fixture
def built(client):
    """What `jaxserve.build.build` would return, around the fake."""
    return built_engine(client, AsciiTokenizer())


@pytest.fixture
def new_running(client):
    """Makes what the doors share, around the fake; for a running event loop."""
    return functools.partial(running_requests, client)


@pytest.fixture
def with_service(client):
    """Runs `async def body(service_namespace)` against the service; keyword arguments are `serving`'s."""

    def run(body, *, tokenizer=AsciiTokenizer(), **limits):  # noqa: B008
        async def main():
            async with asyncio.timeout(20), serving(client, tokenizer=tokenizer, **limits) as served:
                return await body(served)

        return asyncio.run(main())

    return run


async def _until(condition, timeout_s=5.0):
    """Waits for what another thread will make true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
def until():
    return _until


@pytest.fixture(scope="session")
def samples():
    """Reads a text of metrics as Prometheus does."""

    def samples(text):
        """{(name, other labels): value}; every sample has the model's name."""
        found = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "fake"
                found[sample.name, *sorted(labels.items())] = sample.value
        return found

    return samples
