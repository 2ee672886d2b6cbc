"""What a peer gives back. Standard library alone: every peer's environment imports it."""

from typing import NamedTuple, Protocol

from benchmarks.workloads import Request


class Result(NamedTuple):
    """One request's outcome.

    Attributes:
        token_ids: what was generated.
        first_s, last_s: seconds from the submission of the whole workload to its first and its last token.
    """

    token_ids: list[int]
    first_s: float
    last_s: float


class Peer(Protocol):
    """An engine with a model in float32; `close` ends it."""

    def run(self, requests: list[Request]) -> list[Result]: ...

    def close(self) -> None: ...
