"""Whether the engine makes progress: it may be alive and still hang, in a kernel or a collective, with requests waiting for it.

Owns when the last progress was seen; somebody has to look now and then.
"""

import time
from collections.abc import Callable

from jaxserve.engine_client import EngineStats


class ProgressProbe:
    """Compares the engine's steps between two looks.

    Args:
        stats: reads the engine.
        stall_timeout_s: longest time with work and without a step [s].
    """

    def __init__(
        self, stats: Callable[[], EngineStats], stall_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ):
        self._stats = stats
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._had_work = False
        self._num_steps = -1
        self._progress_s = clock()

    def stalled_for_s(self) -> float | None:
        """Looks; returns how long there has been work and no step [s], or None while that is no reason to worry."""
        stats, now = self._stats(), self._clock()
        if not (self._had_work and stats.has_work) or stats.num_steps != self._num_steps:
            self._progress_s = now
        self._had_work, self._num_steps = stats.has_work, stats.num_steps
        duration_s = now - self._progress_s
        return duration_s if duration_s > self._stall_timeout_s else None
