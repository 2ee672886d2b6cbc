"""The one thread that owns an engine, and the `EngineClient` through which everybody else talks to it (ADR 0002)."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxserve.engine import Engine
from jaxserve.engine_client import EngineStats, Listener
from jaxserve.errors import DrainingError, EngineDeadError, InvalidRequestError
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request


class _Submit(NamedTuple):
    request: Request
    listener: Listener


class _Abort(NamedTuple):
    """request_ids None: all."""

    request_ids: tuple[str, ...] | None


class _ResetPrefixCache:
    """Has nothing to say."""


_Command = _Submit | _Abort | _ResetPrefixCache


class EngineThread:
    """Runs an engine until closed; implements `EngineClient`.

    Args:
        engine: never touched by another thread from now on.
        num_compilations: says how many programs a thread has had compiled; from now on there must be none.
    """

    def __init__(self, engine: Engine, num_compilations: Callable[[threading.Thread], int] = lambda thread: 0):
        self._engine = engine
        self._num_compilations = num_compilations
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._stats = engine.stats()
        self._is_draining = False
        self._is_closed = False
        self._error: BaseException | None = None
        self._gate = threading.Lock()  # between submit's check and the thread's end
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()
        self._num_compilations_at_ready = num_compilations(self._thread)  # a thread's ident may have been another's before

    # --- any thread -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener) -> None:
        with self._gate:
            if self._error is not None:
                raise EngineDeadError("The engine has stopped after an error; start a new one.") from self._error
            if self._is_draining or self._is_closed:
                raise DrainingError("The engine is shutting down and takes no new requests.")
            self._idle.clear()
            self._inbox.put(_Submit(request, listener))

    def abort(self, request_ids: Iterable[str]) -> None:
        self._inbox.put(_Abort(tuple(request_ids)))

    def reset_prefix_cache(self) -> None:
        self._inbox.put(_ResetPrefixCache())

    def stats(self) -> EngineStats:
        return dataclasses.replace(
            self._stats,
            num_compilations_since_ready=self._num_compilations(self._thread) - self._num_compilations_at_ready,
            is_alive=self._error is None and not self._is_closed,
            is_draining=self._is_draining,
        )

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._gate:
            self._is_draining = True
        return self._idle.wait(timeout_s)

    def close(self) -> None:
        with self._gate:
            self._is_draining = self._is_closed = True
        self._inbox.put(_Abort(None))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the engine thread ------------------------------------------------------------------------------------------

    def _add(self, request: Request, listener: Listener) -> None:
        try:
            self._engine.add(request)
        except InvalidRequestError as error:
            listener([TokenDelta(request.request_id, "", [], finish_reason="error", error=error)])
        else:
            self._listeners[request.request_id] = listener

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except BaseException as error:  # every waiting caller must hear of it, whatever it is
            self._die(error)
        finally:
            self._idle.set()

    def _take_commands(self) -> bool:
        """Runs what is in the inbox; sleeps on it when there is nothing else to do. Returns False at the end."""
        if not self._engine.has_work and self._inbox.empty():
            if self._become_idle():
                return False
            self._obey(self._inbox.get())
        while not self._inbox.empty():
            self._obey(self._inbox.get())
        return True

    def _obey(self, command: _Command) -> None:
        if isinstance(command, _Submit):
            self._add(*command)
        elif isinstance(command, _ResetPrefixCache):
            self._engine.reset_prefix_cache()
        else:
            ids = self._engine.request_ids() if command.request_ids is None else command.request_ids
            self._deliver(self._engine.abort(ids))

    def _become_idle(self) -> bool:
        """Checks the books; returns whether the engine is closed and nothing can come any more."""
        self._engine.check_integrity()
        self._stats = self._engine.stats()
        with self._gate:  # what was submitted before close() stands in the inbox by now
            if not self._inbox.empty():
                return False
            self._idle.set()
            return self._is_closed

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        """Tells each listener of its requests' deltas, in one call."""
        self._stats = self._engine.stats()
        batches: dict[Listener, list[TokenDelta]] = {}
        for delta in deltas:
            batches.setdefault(self._listeners[delta.request_id], []).append(delta)
        for listener, batch in batches.items():
            listener(batch)
            for delta in batch:  # not before: if a listener raises, the others' requests must still be known to _die
                if delta.finish_reason is not None:
                    del self._listeners[delta.request_id]

    def _die(self, error: BaseException) -> None:
        """Tells every waiting caller, those whose request was not even taken in included."""
        with self._gate:
            self._error = error
        waiting = list(self._listeners.items())
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, _Submit):
                waiting.append((command.request.request_id, command.listener))
        self._listeners.clear()
        for request_id, listener in waiting:
            dead = EngineDeadError("The engine has stopped after an error; start a new one.")
            dead.__cause__ = error
            with contextlib.suppress(Exception):  # one that raises must not keep the rest from hearing
                listener([TokenDelta(request_id, "", [], finish_reason="error", error=dead)])
