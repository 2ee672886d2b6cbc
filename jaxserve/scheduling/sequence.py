"""What the scheduler knows of one request: its tokens, how far they are computed, the row and pages it holds."""

from array import array
from dataclasses import dataclass, field
from operator import attrgetter

from jaxserve.request import ALL_LOGPROBS, Request

NEVER = 2**62
"""More tokens than any context has."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. What a step looks at for each sequence is an attribute, not computed from others.

    Attributes:
        token_ids: prompt and committed output; an array, because the garbage collector walks lists, and pages are hashed from it.
        max_total_len: tokens at which it is certain to end.
        min_total_len: tokens before which no stop token may end it.
        num_computed: positions whose keys and values are, or will be by steps already dispatched, in pages.
        num_in_flight: tokens sampled by dispatched steps and not committed yet; at most one.
        row: the row it holds while running; None otherwise.
        pages: page ids by group, in order of position.
        num_reserved: tokens that its pages hold.
        num_told: tokens in those of its pages that the device has been told of.
        page_keys: keys of its full pages in the prefix cache, as far as they were needed.
        num_pages_cached: pages whose keys the prefix cache has been given, or has given.
        next_key_at: tokens at which the next page has a key; NEVER without a prefix cache.
        num_cached_tokens: tokens that the prefix cache spared it when it was first admitted; None before.
        arrival: order of arrival.
        num_skips: steps in which others behind it could start and it could not, for want of room.
        order: sorts by who goes first: lower priority value, then earlier arrival.
        is_ended: it has finished, or was finished from outside.
        is_processed: its log-probabilities are those that were sampled from.
        has_constraint: its allowed tokens follow from the tokens before.
        reads_hidden: its prompt's hidden states are read, to be scored or pooled.
        wants_full_scores: its prompt is scored over the whole vocabulary.
    """

    request: Request
    arrival: int
    max_total_len: int
    token_ids: "array[int]"
    pages: list[list[int]]
    num_reserved: int = 0
    num_told: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    num_pages_cached: int = 0
    next_key_at: int = NEVER
    num_cached_tokens: int | None = None
    num_computed: int = 0
    num_in_flight: int = 0
    row: int | None = None
    num_skips: int = 0
    num_preemptions: int = 0
    is_new_to_row: bool = False
    is_ended: bool = False
    is_processed: bool = False
    request_id: str = field(init=False)
    num_prompt_tokens: int = field(init=False)
    min_total_len: int = field(init=False)
    num_logprobs: int | None = field(init=False)
    has_constraint: bool = field(init=False)
    reads_hidden: bool = field(init=False)
    wants_full_scores: bool = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)
    detects_repetition: bool = field(init=False)
    priority: int = field(init=False)
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.min_total_len = self.num_prompt_tokens + request.sampling.min_tokens
        self.num_logprobs = request.sampling.logprobs
        self.has_constraint = request.constraint is not None
        self.reads_hidden = request.sampling.prompt_logprobs is not None or request.pooling is not None
        self.wants_full_scores = request.sampling.prompt_logprobs == ALL_LOGPROBS
        self.stop_token_ids = request.stop_token_ids
        self.detects_repetition = request.sampling.repetition_detection is not None
        self.priority = request.priority
        self.order = (request.priority, self.arrival)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens that the next step could compute: all that exist but for those computed.

        Zero when the tokens in flight are certain to be the last.
        """
        total = len(self.token_ids) + self.num_in_flight
        return 0 if total >= self.max_total_len else total - self.num_computed

    @property
    def num_full_scores(self) -> int:
        """Prompt tokens that are still to be scored over the whole vocabulary."""
        if not self.wants_full_scores or self.num_known > self.num_prompt_tokens:
            return 0
        return max(0, self.num_prompt_tokens - 1 - self.num_computed)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached pages may stand for the beginning of it; what is said of each position needs each computed."""
        return self.request.sampling.reads_prefix_cache and self.request.pooling != "mean"


in_order = attrgetter("order")
"""Key that sorts sequences by who goes first."""
