"""A server process to be beaten, with its books in view: pages, memory, threads, exit status, port.

The toy model's tokens can be computed by hand, and each is computed from its whole context through the pages: a page that was
lost, swapped or freed too early gives a wrong text.
"""

import asyncio
import contextlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

import serve
from jaxserve.models import toy
from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc

ROOT = Path(serve.__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}

ENGINE = {"model": "toy", "max_model_len": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 64, "page_size": 16}
POOL = {"num_pages": 160, "token_buckets": 64, "sequence_buckets": "4,16"}
"""Far fewer pages than 16 streams of 400 tokens want: they preempt one another, and 48 of 64 wait."""

START_TIMEOUT_S = 100.0
PAGES_BACK_S = 2.0
"""From a client's end, in whatever way, to its pages' return: the service's promise [s]."""

SLOW_READER = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
"""A client whose transport takes no more than it must: the server's writes wait after some 64 KB that nobody reads."""

MEMORY_SLACK_MB = 100.0
"""How far resident memory may rise above what it was: the allocator keeps what it had, and each stream has its buffers [MB]."""


def continuation(prompt, num_tokens):
    return "".join(map(chr, toy.continuation([ord(c) for c in prompt], num_tokens)))


def ask(prompt, max_tokens=16, request_id="", **sampling):
    fields = {"temperature": 0.0, "max_tokens": max_tokens} | sampling
    return pb.GenerateRequest(text=prompt, request_id=request_id, sampling=pb.SamplingParams(**fields))


class Lines:
    """A child's output, line by line, by a thread that never lets the pipe fill."""

    def __init__(self, stream):
        self._lines = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream):
        for line in itertools.chain(stream, [""]):
            self._lines.put(line)

    def next(self, timeout_s=START_TIMEOUT_S):
        """The next line, or "" at the end."""
        return self._lines.get(timeout=timeout_s)

    def rest(self):
        self._thread.join(10)
        return [self._lines.get() for _ in range(self._lines.qsize())]


class Server:
    """A server process that is ready."""

    def __init__(self, **settings):
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in (ENGINE | POOL | {"grpc_port": 0, "http_port": 0, "log_level": "warning"} | settings).items()
        ]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "watched_server.py"), "serve", *flags],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lines, self._errors = Lines(self.process.stdout), Lines(self.process.stderr)
        ready = self._lines.next()
        if not ready:
            self.close()
            pytest.fail("".join(self._errors.rest()[-20:]), pytrace=False)
        self._lines.next()
        self.endpoint = re.search(r"endpoint (\S+),", ready)[1]

    ask = staticmethod(ask)

    def _command(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._lines.next(20))

    def stats(self):
        return self._command(ask="stats")

    def pace(self, seconds):
        self._command(ask="pace", s=seconds)

    def break_step(self, how):
        self._command(ask="break", how=how)

    def memory_mb(self, field="VmRSS"):
        """Resident memory now, or at its highest since `forget_peak` (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024

    def forget_peak(self):
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def num_threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def assert_idle_within(self, seconds=PAGES_BACK_S):
        """Every page is back, and nobody runs or waits, before so much time has passed."""
        deadline_s = time.monotonic() + seconds
        while True:
            stats = self.stats()
            is_idle = (stats["num_free_pages"], stats["num_running"], stats["num_waiting"]) == (stats["num_pages"], 0, 0)
            if is_idle:
                return stats
            assert time.monotonic() < deadline_s, f"pages or requests are still held after {seconds} s: {stats}"
            time.sleep(0.01)

    @contextlib.asynccontextmanager
    async def stub(self, *options):
        async with grpc.aio.insecure_channel(self.endpoint, options=options) as channel:
            yield jaxserve_pb2_grpc.GenerationServiceStub(channel)

    @contextlib.contextmanager
    def client(self, requests):
        """A process that streams all of them, and the lines that it says; see client.py."""
        process = subprocess.Popen(
            [sys.executable, str(HERE / "client.py"), self.endpoint],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdin.write(json.dumps(requests) + "\n")
        process.stdin.close()
        try:
            yield process, Lines(process.stdout)
        finally:
            process.kill()
            process.wait(20)
            process.stdout.close()

    def exit_status(self, timeout_s):
        """The status, once it has ended by itself; nothing of it may be left: no process, and nobody on its port."""
        status = self.process.wait(timeout_s)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        return status

    def wait_for_log(self, *words, timeout_s):
        """Returns when a line with all these words has been logged; lines before it are gone."""
        deadline_s = time.monotonic() + timeout_s
        line = ""
        while not all(word in line for word in words):
            line = self._errors.next(deadline_s - time.monotonic())

    def errors(self):
        """What an operator would have to look at; only after the end."""
        return [line for line in self._errors.rest() if "Traceback" in line or " ERROR " in line]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


@pytest.fixture(scope="session")
def beaten():
    """One server for every test that leaves it running; stalls are cut short: 512 tokens, or 5 s, as a busy machine may take."""
    server = Server(write_timeout_s=5, max_pending_tokens=512)
    yield server
    server.close()


@pytest.fixture
def server(beaten):
    """The same, idle, and afterwards idle again: alive, without an error, nothing held, no program compiled since ready."""
    beaten.pace(0.0)
    before = beaten.assert_idle_within(20)
    yield beaten
    beaten.pace(0.0)
    stats = beaten.assert_idle_within(PAGES_BACK_S)
    assert stats["is_alive"]
    assert stats["num_compilations_since_ready"] == before["num_compilations_since_ready"] == 0


@pytest.fixture
def start_server():
    """Starts servers of a test's own."""
    servers = []

    def start(**settings):
        servers.append(Server(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


async def stream(call):
    """Everything that a stream had: its text, its messages, its status; checks that it has one terminal message, the last."""
    messages = []
    code = grpc.StatusCode.OK
    try:
        async for message in call:
            messages.append(message)
    except grpc.aio.AioRpcError as error:
        code = error.code()
    ends = [m for m in messages if m.finish_reason or m.HasField("usage")]
    if code is grpc.StatusCode.OK:
        assert ends == messages[-1:], "exactly one terminal message, and it is the last"
        assert messages[-1].usage.completion_tokens == sum(len(m.token_ids) for m in messages)
    else:
        assert ends == [], "a stream that failed has no terminal message"
    return "".join(m.text for m in messages), code


async def streams(stub, requests):
    """Streams all of them at once and returns their texts; each must end well."""
    results = await asyncio.gather(*(stream(stub.Generate(ask(*request))) for request in requests))
    assert {code for _, code in results} <= {grpc.StatusCode.OK}
    return [text for text, _ in results]


@pytest.fixture(scope="session")
def beating():
    """The names of this file, for the tests beside it."""
    return SimpleNamespace(
        ask=ask,
        continuation=continuation,
        stream=stream,
        streams=streams,
        ROOT=ROOT,
        ENVIRONMENT=ENVIRONMENT,
        SLOW_READER=SLOW_READER,
        PAGES_BACK_S=PAGES_BACK_S,
        MEMORY_SLACK_MB=MEMORY_SLACK_MB,
    )
