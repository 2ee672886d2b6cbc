"""Counts XLA compilations by jax's own events, so that "no compilation after ready" is a number and not a hope."""

import threading

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts every program that jax compiles in this process, eager helpers included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_s: float, **_: object) -> None:
        del duration_s
        if event == _COMPILE_EVENT:
            with self._lock:
                self._count += 1

    @property
    def count(self) -> int:
        return self._count


_process_counter: CompilationCounter | None = None


def process_counter() -> CompilationCounter:
    """Returns this process's counter; listeners cannot be taken back, so there is one."""
    global _process_counter
    if _process_counter is None:
        _process_counter = CompilationCounter()
    return _process_counter
