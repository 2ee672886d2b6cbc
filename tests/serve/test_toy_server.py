"""`jaxserve serve --model toy` as a process of its own, and clients on a real socket that know the .proto and plain grpcio.

The toy model's next token is 32 + (7 * length + sum over positions j of ((j mod 31) + 1) * token_j) mod 95: every answer is
known.
"""

import itertools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import serve
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc

ROOT = Path(serve.__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "serve.cli"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
ENGINE = "--model toy --max-model-len 4096 --max-num-seqs 4 --max-num-batched-tokens 32 --page-size 16 --num-pages 600"
BUCKETS = "--token-buckets 32 --sequence-buckets 1,4"
START_TIMEOUT_S = 100.0

pytestmark = pytest.mark.timeout(180)


def continuation(prompt, num_tokens):
    ids = [ord(c) for c in prompt]
    for _ in range(num_tokens):
        ids.append(32 + (7 * len(ids) + sum((j % 31 + 1) * token for j, token in enumerate(ids))) % 95)
    return "".join(map(chr, ids[len(prompt) :]))


class Server:
    """A server process that is ready; its output lines, a stub, and the base URL of its HTTP API."""

    def __init__(self, template):
        self.process = subprocess.Popen(
            [
                *COMMAND,
                "serve",
                *ENGINE.split(),
                *BUCKETS.split(),
                "--grpc-port",
                "0",
                "--http-port",
                "0",
                "--chat-template",
                str(template),
                "--drain-timeout-s",
                "20",
                "--log-level",
                "warning",
            ],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = []
        lines = queue.Queue()
        self.readers = [
            threading.Thread(target=lambda: self.errors.extend(self.process.stderr)),
            threading.Thread(target=lambda: [lines.put(line) for line in itertools.chain(self.process.stdout, [""])]),
        ]
        for thread in self.readers:
            thread.start()
        self.ready_line, self.command_line = (self._line(lines) for _ in range(2))
        self.endpoint = re.search(r"endpoint (\S+),", self.ready_line)[1]
        self.base_url = re.search(r"OpenAI API (\S+),", self.ready_line)[1]
        self.channel = grpc.insecure_channel(self.endpoint)
        self.stub = jaxserve_pb2_grpc.GenerationServiceStub(self.channel)

    def _line(self, lines):
        try:
            line = lines.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            line = ""
        if not line:  # silent for too long, or gone
            self.process.kill()
            self._close_process()
            pytest.fail("".join(self.errors[-20:]), pytrace=False)
        return line.rstrip("\n")

    def close(self):
        self.channel.close()
        if self.process.poll() is None:
            self.process.terminate()
        self._close_process()

    def _close_process(self):
        self.process.wait(timeout=40)
        for thread in self.readers:
            thread.join(10)
        self.process.stdout.close()
        self.process.stderr.close()


_servers = []
"""At most one runs; a failure to start is remembered as None, so that it is waited for once."""


@pytest.fixture(scope="module", autouse=True)
def _close_servers():
    yield
    for server in filter(None, _servers):
        server.close()
    _servers.clear()


@pytest.fixture
def server(tmp_path_factory):
    """The module's server; a test may stop it, the next one then gets a new one."""
    if None in _servers:
        pytest.fail("the server does not start, see the first failure", pytrace=False)
    if not _servers or _servers[-1].process.poll() is not None:
        _servers.append(None)
        template = tmp_path_factory.mktemp("chat") / "template.jinja"
        template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}")
        _servers[-1] = Server(template)
    return _servers[-1]


def ask(prompt="def fib(n):", **sampling):
    return pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(**{"temperature": 0.0, **sampling}))


def text_of(call):
    return "".join(message.text for message in call)


def test_the_ready_lines_say_where_and_how(server):
    api = r"OpenAI API http://127\.0\.0\.1:\d+/v1"
    assert re.fullmatch(
        rf"jaxserve ready: model toy, endpoint 127\.0\.0\.1:\d+, {api}, started in \d+\.\d s", server.ready_line
    )
    match = re.fullmatch(r"try: (.+) generate \"def fib\(n\):\" --endpoint (\S+)", server.command_line)
    assert match[2] == server.endpoint


def test_the_printed_command_streams_the_completion(server):
    command = server.command_line.removeprefix("try: ")
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, continuation("def fib(n):", 128))
    assert done.stderr.startswith("[length: 11 prompt tokens")


def test_concurrent_streams_each_get_their_own_answer(server):
    prompts = [f"request {i} " + "x" * (7 * i) for i in range(12)]

    def one(prompt):
        with grpc.insecure_channel(server.endpoint) as channel:
            return text_of(jaxserve_pb2_grpc.GenerationServiceStub(channel).Generate(ask(prompt, max_tokens=60)))

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, prompts))
    assert answers == [continuation(prompt, 60) for prompt in prompts]


def test_usage_counts_what_was_streamed(server):
    messages = list(server.stub.Generate(ask("usage", max_tokens=30, logprobs=1)))
    assert [len(m.logprobs) for m in messages] == [len(m.token_ids) for m in messages]
    assert sum(len(m.token_ids) for m in messages) == messages[-1].usage.completion_tokens == 30
    assert messages[-1].usage.prompt_tokens == 5
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_a_stop_string_ends_the_text_before_it(server):
    text = continuation("stop", 20)
    stop = text[3:5]
    call = list(server.stub.Generate(ask("stop", max_tokens=20, stop=[stop])))
    assert "".join(m.text for m in call) == text[: text.index(stop)]
    assert (call[-1].finish_reason, call[-1].stop_string) == (pb.FINISH_REASON_STOP, stop)


def test_cancelled_and_expired_streams_free_their_pages(server):
    """Ten streams that would fill the pool of 600 pages if they kept theirs, each stopped after its first token."""
    for i in range(10):
        is_cancelled = i % 2 == 0
        call = server.stub.Generate(ask(f"{i} " + "y" * 1500, max_tokens=2500), timeout=None if is_cancelled else 1.0)
        if is_cancelled:
            assert next(call).token_ids
            call.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            text_of(call)
        expected = grpc.StatusCode.CANCELLED if is_cancelled else grpc.StatusCode.DEADLINE_EXCEEDED
        assert caught.value.code() is expected
    assert text_of(server.stub.Generate(ask("z" * 1900, max_tokens=20), timeout=30)) == continuation("z" * 1900, 20)


def test_a_client_that_is_killed_does_no_harm(server):
    client = subprocess.Popen(
        [*COMMAND, "generate", "killed", "--endpoint", server.endpoint, "--max-tokens", "4000"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert client.stdout.read(5) == continuation("killed", 5).encode()
    client.kill()
    client.wait(10)
    client.stdout.close()
    assert text_of(server.stub.Generate(ask("after", max_tokens=9), timeout=30)) == continuation("after", 9)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_command_with_130(server):
    client = subprocess.Popen(
        [*COMMAND, "generate", "interrupted", "--endpoint", server.endpoint, "--max-tokens", "4000"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdout.read(5) == continuation("interrupted", 5).encode()
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=20)
    assert (client.returncode, errors) == (130, b"")


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (pb.GenerateRequest(), b"prompt"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(top_p=float("nan"))), b"sampling.top_p"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=-1)), b"sampling.max_tokens"),
        (pb.GenerateRequest(text="x" * 4096), b"text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[128])), b"token_ids.ids"),
    ],
)
def test_bad_requests_are_invalid_arguments_that_name_the_field(server, request_, path):
    with pytest.raises(grpc.RpcError) as caught:
        next(server.stub.Generate(request_))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [details] = [value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin"]
    assert b"google.rpc.BadRequest" in details
    assert path in details


def test_abort_by_id(server):
    call = server.stub.Generate(ask("abort", max_tokens=4000), metadata=(("x-request-id", "abort-me"),))
    next(call)
    assert list(server.stub.Abort(pb.AbortRequest(request_ids=["abort-me", "?"])).aborted_request_ids) == ["abort-me"]
    assert list(call)[-1].finish_reason == pb.FINISH_REASON_ABORT


def test_tokenizer_and_model_are_those_of_the_engine(server):
    ids = list(server.stub.Tokenize(pb.TokenizeRequest(text="ab")).token_ids)
    assert ids == [97, 98]
    assert server.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == "ab"
    model = server.stub.GetModel(pb.GetModelRequest())
    assert (model.model, model.vocab_size, model.max_model_len, model.max_num_seqs) == ("toy", 128, 4096, 4)


def test_openais_client_gets_the_same_tokens(server):
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as api:
        completion = api.completions.create(model="toy", prompt="http", max_tokens=40, temperature=0, logprobs=1)
        assert completion.choices[0].text == continuation("http", 40)
        assert all(logprob <= 0 for logprob in completion.choices[0].logprobs.token_logprobs)
        chunks = api.completions.create(model="toy", prompt="http", max_tokens=40, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == continuation("http", 40)
        answer = api.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "hi"}], max_tokens=20, temperature=0
        )
        assert answer.choices[0].message.content == continuation("user: hi ", 20)
        assert answer.usage.prompt_tokens == len("user: hi ")
        with pytest.raises(openai.BadRequestError) as caught:
            api.completions.create(model="toy", prompt="x" * 4096)
        assert caught.value.param == "prompt"


def test_http_streams_that_are_left_free_their_pages(server):
    """Ten streams that would fill the pool of 600 pages if they kept theirs."""
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60) as api:
        for i in range(10):
            prompt = f"{i} " + "y" * 1500
            with api.completions.create(model="toy", prompt=prompt, max_tokens=2500, temperature=0, stream=True) as stream:
                assert next(iter(stream)).choices[0].text
        completion = api.completions.create(model="toy", prompt="z" * 1900, max_tokens=20, temperature=0)
        assert completion.choices[0].text == continuation("z" * 1900, 20)
        metrics = {}
        deadline_s = time.monotonic() + 10  # the last to leave is noticed within a step
        while metrics.get("vllm:kv_cache_usage_perc") != 0:
            assert time.monotonic() < deadline_s, metrics
            metrics = scrape(server)
        assert metrics["jaxserve_compilations_since_ready"] == 0
        assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0


def scrape(server):
    with urllib.request.urlopen(server.base_url.removesuffix("v1") + "metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_sigterm_lets_open_streams_finish_then_exits_0_and_frees_the_port(server):
    calls = [server.stub.Generate(ask(f"drain {i}", max_tokens=1000)) for i in range(3)]
    for call in calls:
        next(call)  # they are running now; the texts' first tokens are checked with the rest of the tokens below
    api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    chunks = iter(api.completions.create(model="toy", prompt="drain", max_tokens=1000, temperature=0, stream=True))
    text = next(chunks).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    health = health_pb2_grpc.HealthStub(server.channel)
    deadline_s = time.monotonic() + 10
    while health.Check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
        assert time.monotonic() < deadline_s
    with pytest.raises(grpc.RpcError) as caught:
        next(server.stub.Generate(ask("new")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(openai.APIStatusError) as refused:
        api.completions.create(model="toy", prompt="new")
    assert refused.value.status_code == 503
    for call in calls:
        last = list(call)[-1]
        assert (last.finish_reason, last.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 1000)
    assert text + "".join(chunk.choices[0].text for chunk in chunks) == continuation("drain", 1000)
    api.close()
    assert server.process.wait(timeout=30) == 0
    with socket.socket() as again:  # the HTTP port is free
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(re.search(r":(\d+)/", server.base_url)[1])))
    with grpc.insecure_channel(server.endpoint) as channel, pytest.raises(grpc.RpcError) as caught:
        jaxserve_pb2_grpc.GenerationServiceStub(channel).GetModel(pb.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert [line for line in server.errors if "Traceback" in line or " ERROR " in line] == []
