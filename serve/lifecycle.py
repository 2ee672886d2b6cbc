"""From start to exit: take the ports, build the engine, serve on both doors, drain on a signal, leave.

    SIGTERM or SIGINT   health NOT_SERVING (503) at once, new requests UNAVAILABLE (503), running ones finish within
                        drain_timeout_s, what is left then ends UNAVAILABLE; exit status 0
    a second one        the same without waiting
    engine dead         as a signal, without waiting; exit status 1
    engine hanging      (no step finished within step_timeout_s) is dead

Owns the order of these things, and nothing else.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from jaxserve.async_engine import AsyncEngine
from jaxserve.engine_client import EngineClient
from serve.admission import Admission
from serve.doors import Endpoints, open_doors
from serve.metrics import ServiceMetrics
from serve.running import RunningRequests
from serve.settings import ServerConfig

if TYPE_CHECKING:
    from jaxserve.build import BuiltEngine

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
"""Between two looks at whether the engine lives [s]."""

STOP_TIMEOUT_S = 5.0
"""For streams to end once they are aborted, and again for the engine to end [s]."""

ABANDON_TIMEOUT_S = 0.5
"""For streams to end once an engine that does not obey is given up [s]."""


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
        await doors.start(running)
        on_ready(built.config.model_name, doors.endpoints, time.monotonic() - started_s)
        death = asyncio.ensure_future(_until_death(built.client, config.step_timeout_s))
        await _first_of(death, stops.first.wait())
        running.refuse_new()
        await doors.set_draining()
        await _first_of(death, running.wait_idle(), stops.second.wait(), timeout_s=config.drain_timeout_s)
        death.cancel()
        await _end_streams(running, built.client)
        status = 0 if built.client.stats().is_alive else 1
    finally:
        await doors.stop()
    if not await _in_daemon_thread(lambda: built.close() or True, deadline_s=STOP_TIMEOUT_S):
        log.error("the engine has not ended within %g s", STOP_TIMEOUT_S)
    return status


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


async def _until_death(engine: EngineClient, step_timeout_s: float) -> None:
    """Returns when the engine is dead; one that hangs is given up first, and its streams end."""
    while (stats := engine.stats()).is_alive:
        if stats.stalled_s > step_timeout_s:
            log.error("no step has finished for %.1f s, and there is work (--step-timeout-s)", stats.stalled_s)
            engine.abandon("The engine hangs; start a new one.")
        else:
            await asyncio.sleep(WATCH_INTERVAL_S)
    log.error("the engine is dead")


async def _first_of(death: asyncio.Future, *events: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Returns when one of them has come, or the time is over; goes on watching for death."""
    waits = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait([death, *waits], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _end_streams(running: RunningRequests, engine: EngineClient) -> None:
    num_ended = running.stop()
    if not num_ended:
        return
    log.warning("%d requests were ended before they were finished", num_ended)
    if not await _is_idle_within(running, STOP_TIMEOUT_S) and engine.stats().stalled_s >= STOP_TIMEOUT_S:
        engine.abandon("The engine hangs; start a new one.")
    if not await _is_idle_within(running, ABANDON_TIMEOUT_S):
        log.warning("some clients do not read; their streams are cut off")


async def _is_idle_within(running: RunningRequests, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await running.wait_idle()
    except TimeoutError:
        return False
    return True
