"""A step as plain data: what the scheduler decides and the runner executes.

A `StepPlan` holds everything the runner needs, so a recorded stream of plans, replayed in another process over the same
weights, gives the same bits (ADR 0003). Knows nothing of jax, requests' texts, or where pages come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxserve.outputs import TokenScores


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
        repetition_penalty: 1 is off; the other two: 0.
        logit_bias: (token id, number added to its logit).
        allowed_token_ids: no others are sampled; None allows all.
        logprob_token_ids: tokens whose log-probabilities are reported in place of the most likely ones.
        processors: (name, parameters) of logits processors, in the order in which the engine registered them.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: tuple[int, int]
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprob_token_ids: tuple[int, ...] = ()
    processors: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Admission(NamedTuple):
    """A request takes a row.

    Attributes:
        prompt_token_ids, output_token_ids: all that is known of it, where penalties count them; empty elsewhere.
    """

    row: int
    request_id: str
    sampling: RowSampling
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()


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
        num_logprobs: most likely tokens to report besides the sampled one; None for no log-probabilities at all, -1 for those of
            the whole vocabulary.
        is_processed: report them as sampled from, not raw.
        forbidden: token ids that must not be sampled now (stop tokens before min_tokens).
        num_prompt_tokens: of the request, however much of it this step computes: some rotary positions depend on it.
        has_constraint: its allowed tokens follow from the tokens before, so its token is sampled when those are known.
        num_prompt_logprobs: like num_logprobs, of the prompt's tokens at positions [start + 1, ...]; None for none.
        scored_token_ids: those tokens, one a position; shorter than num_tokens where the prompt ends.
        pooling: "mean" or "last": what of the positions' hidden states is given back; None for nothing.
    """

    request_id: str
    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    samples: bool
    num_logprobs: int | None = None
    is_processed: bool = False
    forbidden: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    has_constraint: bool = False
    num_prompt_logprobs: int | None = None
    scored_token_ids: tuple[int, ...] = ()
    pooling: str | None = None


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
    """What the device says of one sampling sequence; scores None when not asked for."""

    token_id: int
    scores: TokenScores | None = None


class PromptScores(NamedTuple):
    """Of the prompt's tokens at positions [start + 1, ...)."""

    start: int
    tokens: tuple[TokenScores, ...]


class StepResult(NamedTuple):
    """What one step made, by request, read back from the device.

    Attributes:
        nonfinite: requests whose logits held NaN or infinity everywhere: their tokens mean nothing.
        prompt_scores: of each of the plan's `scored_token_ids`.
        pooled: float32 [D] of requests whose prompt is complete.
    """

    step: int
    tokens: dict[str, SampledToken]
    nonfinite: frozenset[str] = frozenset()
    prompt_scores: Mapping[str, PromptScores] = {}
    pooled: Mapping[str, Any] = {}
