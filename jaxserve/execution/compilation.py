"""Counts XLA compilations by jax's own events, so that "no compilation after ready" is a number and not a hope."""

import threading
from collections import Counter

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompilationCounter:
    """Counts every program that jax compiles in this process, eager helpers included, by the thread that asked for it."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._cache_hits: Counter[int] = Counter()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILE_EVENT:
            self._counts[threading.get_ident()] += 1

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _CACHE_HIT_EVENT:
            self._cache_hits[threading.get_ident()] += 1

    def count_of(self, thread: threading.Thread) -> int:
        """Returns how many programs this thread has had compiled."""
        return self._counts[thread.ident or 0]

    def num_cache_hits(self) -> int:
        """Returns how many of this thread's programs, counted above too, came from jax's persistent cache."""
        return self._cache_hits[threading.get_ident()]


_process_counter: CompilationCounter | None = None


def process_counter() -> CompilationCounter:
    """Returns this process's counter; listeners cannot be taken back, so there is one."""
    global _process_counter
    if _process_counter is None:
        _process_counter = CompilationCounter()
    return _process_counter
