"""A step as plain data: what the scheduler decides and the runner executes.

A `StepPlan` holds everything the runner needs, so a recorded stream of plans, replayed in another process over the same
weights, gives the same bits (ADR 0003). Knows nothing of jax, requests' texts, or where pages come from.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of each token it has seen; layers with equal specs form a group that shares a block table.

    Attributes:
        kind: "full", or "window" when only the last `window` tokens are ever read.
        num_kv_heads: over all devices.
        head_dim: of keys and of values.
        window: for kind "window" [tokens].
    """

    kind: str
    num_kv_heads: int
    head_dim: int
    window: int | None = None


def kv_groups(specs: tuple[KVSpec, ...]) -> tuple[KVSpec, ...]:
    """Returns the distinct specs in order of appearance: index in it = group of a layer."""
    return tuple(dict.fromkeys(specs))


class RowSampling(NamedTuple):
    """How a row samples; stays with the row from admission on.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        key: the request's own random key, two 32-bit words.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: tuple[int, int]


class Admission(NamedTuple):
    """A request takes a row."""

    row: int
    request_id: str
    sampling: RowSampling


class PageUpdate(NamedTuple):
    """One entry of a block table: `tables[group][row, place] = page_id`."""

    group: int
    row: int
    place: int
    page_id: int


class SequencePlan(NamedTuple):
    """One request's share of a step: its positions [start, start + num_tokens).

    Attributes:
        token_ids: the tokens at these positions, as far as the host knows them; one shorter than num_tokens when the last
            one was sampled by the step before and is still on the device.
        samples: whether the token at position start + num_tokens is sampled in this step.
        num_logprobs: most likely tokens to report besides the sampled one; -1 for no log-probabilities at all.
        forbidden: token ids that must not be sampled now (stop tokens before min_tokens).
        num_prompt_tokens: of the request, however much of it this step computes: some rotary positions depend on it.
    """

    request_id: str
    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    samples: bool
    num_logprobs: int = -1
    forbidden: tuple[int, ...] = ()
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All of one step.

    Attributes:
        step: counts up by one; the runner refuses any other order.
        admissions: rows that changed hands since the last plan.
        page_updates: block table entries written before anything is computed.
        sequences: those with one token first, so that decode rows lie together.
    """

    step: int
    admissions: tuple[Admission, ...]
    page_updates: tuple[PageUpdate, ...]
    sequences: tuple[SequencePlan, ...]

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)


class SampledToken(NamedTuple):
    """What the device says of one sampling sequence.

    Attributes:
        logprob: of the token, raw; None when not asked for, like the following two.
        rank: 1 for the most likely.
        top: the most likely tokens as (token id, logprob), best first.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


class StepResult(NamedTuple):
    """The tokens of one step, by request, read back from the device.

    Attributes:
        nonfinite: requests whose logits held NaN or infinity everywhere: their tokens mean nothing.
    """

    step: int
    tokens: dict[str, SampledToken]
    nonfinite: frozenset[str] = frozenset()
