"""From start to exit: take the ports, build the engine, serve on both doors, drain on a signal, leave.

    SIGTERM or SIGINT   health NOT_SERVING (503) at once, new requests UNAVAILABLE (503), running ones finish within
                        drain_timeout_s, what is left then ends UNAVAILABLE; exit status 0
    a second one        the same without waiting
    engine dead         as a signal, without waiting; exit status 1

Owns the order of these things, and nothing else.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxserve.async_engine import AsyncEngine
from serve.admission import Admission
from serve.doors import Endpoints, open_doors
from serve.metrics import ServiceMetrics
from serve.progress import ProgressProbe
from serve.running import RunningRequests
from serve.settings import ServerConfig

if TYPE_CHECKING:
    from jaxserve.build import BuiltEngine

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
"""Between two looks at whether the engine lives [s]."""

STOP_TIMEOUT_S = 5.0
"""For streams to end once they are aborted, and again for the engine to end [s]."""


class StopRequests:
    """How often somebody has asked the server to stop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def add(self, reason: str) -> None:
        log.info("%s: %s", reason, "stopping now" if self.first.is_set() else "draining")
        (self.second if self.first.is_set() else self.first).set()

    def listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.add, number.name)


async def run(
    build: Callable[[], "BuiltEngine"],
    config: ServerConfig,
    on_ready: Callable[[str, Endpoints, float], None],
    stops: StopRequests | None = None,
) -> int:
    """Serves until stopped.

    Args:
        build: makes the engine; runs in a thread of its own.
        on_ready: called with model name, endpoints and start-up seconds.
        stops: None listens to SIGTERM and SIGINT.

    Returns:
        The exit status: 0 after a drain, 1 after the engine's death.

    Raises:
        ConfigError: a port cannot be bound.
        Exception: what build raised.
    """
    started_s = time.monotonic()
    if stops is None:
        stops = StopRequests()
        stops.listen_to_signals()
    doors = await open_doors(config)
    try:
        built = await _in_daemon_thread(build, stops.first)
        if built is None:
            return 0
        running = _running(built, config)
        progress = ProgressProbe(built.client.stats, config.stall_timeout_s)
        await doors.start(running, progress)
        on_ready(built.config.model_name, doors.endpoints, time.monotonic() - started_s)
        is_alive = await _until_stop_or_death(built, progress, stops)
        running.refuse_new()
        await doors.set_draining()
        if is_alive:
            await _drain(running, stops, config.drain_timeout_s)
        await _end_streams(running)
    finally:
        await doors.stop()
    if not await _in_daemon_thread(lambda: built.close() or True, deadline_s=STOP_TIMEOUT_S):
        log.error("the engine has not ended within %g s", STOP_TIMEOUT_S)
    return 0 if is_alive else 1


def leave(status: int) -> None:
    """Ends the process, whatever its threads do.

    A thread in the middle of an XLA compilation cannot be told to stop, and an interpreter that shuts down under it crashes.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _running(built: "BuiltEngine", config: ServerConfig) -> RunningRequests:
    resolved = built.config
    max_tokens = config.max_queued_tokens or 4 * resolved.num_pages * resolved.page_size
    return RunningRequests(
        AsyncEngine(built.client, max_pending_tokens=config.max_pending_tokens),
        built.requests,
        built.tokenizer,
        resolved,
        Admission(resolved.max_num_seqs + config.max_queued_requests, max_tokens),
        ServiceMetrics(resolved.model_name, built.client.stats),
        write_timeout_s=config.write_timeout_s,
    )


async def _in_daemon_thread(work: Callable, stop: asyncio.Event | None = None, deadline_s: float | None = None):
    """Returns what work returns, or None when it is stopped or too late: the thread is then left alone."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future = loop.create_future()

    def report(result: object, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    def body() -> None:
        try:
            result, error = work(), None
        except BaseException as caught:
            result, error = None, caught
        try:
            loop.call_soon_threadsafe(report, result, error)
        except RuntimeError:
            log.debug("nobody waits for %s any more", work)

    threading.Thread(target=body, name="jaxserve-lifecycle", daemon=True).start()
    stopped = asyncio.ensure_future(stop.wait()) if stop is not None else None
    try:
        await asyncio.wait([f for f in (future, stopped) if f], timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        return future.result() if future.done() else None
    finally:
        if stopped is not None:
            stopped.cancel()
        future.cancel()


async def _until_stop_or_death(built: "BuiltEngine", progress: ProgressProbe, stops: StopRequests) -> bool:
    """Returns whether the engine lives."""
    is_stalled = False
    while not stops.first.is_set():
        if not built.client.stats().is_alive:
            log.error("the engine is dead")
            return False
        stalled_s = progress.stalled_for_s()
        if stalled_s is not None and not is_stalled:
            log.error("the engine has work and has made no step for %.0f s; health says so", stalled_s)
        is_stalled = stalled_s is not None
        try:
            async with asyncio.timeout(WATCH_INTERVAL_S):
                await stops.first.wait()
        except TimeoutError:
            continue
    return True


async def _drain(running: RunningRequests, stops: StopRequests, timeout_s: float) -> None:
    """Returns when no stream is open, the time is over, or somebody asks again."""
    waits = [asyncio.ensure_future(running.wait_idle()), asyncio.ensure_future(stops.second.wait())]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _end_streams(running: RunningRequests) -> None:
    num_ended = running.stop()
    if num_ended:
        log.warning("%d requests were ended before they were finished", num_ended)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await running.wait_idle()
        except TimeoutError:
            log.warning("some clients do not read; their streams are cut off")
