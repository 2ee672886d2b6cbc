"""The one interface through which everybody talks to the engine (ADR 0002).

Knows no jax. `jaxserve.engine_thread.EngineThread` implements it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.outputs import TokenDelta
from jaxserve.request import Request

Listener = Callable[[Sequence[TokenDelta]], None]
"""Called on the engine thread, once a step, with what the step made for this listener's requests. It must not block."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine.

    Attributes:
        num_free_pages: of num_pages; free ones may still hold what the prefix cache knows.
        num_cached_tokens: prompt tokens that the prefix cache spared requests, of num_prompt_tokens.
        num_compilations_since_ready: by jax's own events; anything but 0 is a bug.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_compilations_since_ready: int = 0
    is_alive: bool = True
    is_draining: bool = False


class EngineClient(Protocol):
    """See ADR 0002; every method may be called from any thread and returns at once, but for drain and close."""

    def submit(self, request: Request, listener: Listener) -> None:
        """Takes a request in.

        Raises:
            DrainingError: the engine takes no new requests.
            EngineDeadError: the engine thread has ended.
        """
        ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; each gets a last delta with finish_reason "abort". Unknown ids are ignored."""
        ...

    def reset_prefix_cache(self) -> None:
        """Makes the engine compute prompts anew that come from now on; running requests go on."""
        ...

    def stats(self) -> EngineStats: ...

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests and waits until the running ones are done; returns whether they are."""
        ...

    def close(self) -> None:
        """Aborts what runs and ends the thread."""
        ...
