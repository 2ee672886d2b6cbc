"""What the scheduler knows of one request: its tokens, how far they are computed, the row and pages it holds."""

from dataclasses import dataclass, field

from jaxserve.request import ALL_LOGPROBS, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        token_ids: prompt and committed output.
        num_computed: positions whose keys and values are, or will be by steps already dispatched, in pages.
        num_in_flight: tokens sampled by dispatched steps and not committed yet; at most one.
        row: the row it holds while running; None otherwise.
        pages: page ids by group, in order of position.
        num_pages_told: entries of the block table that the device has been told, in each group.
        page_keys: keys of its full pages in the prefix cache, as far as they were needed.
        num_pages_cached: pages whose keys the prefix cache has been given, or has given.
        num_cached_tokens: tokens that the prefix cache spared it when it was first admitted; None before.
        arrival: order of arrival.
        num_skips: steps in which others behind it could start and it could not, for want of pages or work items.
        order: sorts by who goes first: lower priority value, then earlier arrival.
    """

    request: Request
    arrival: int
    max_total_len: int
    token_ids: list[int]
    pages: list[list[int]]
    num_pages_told: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    num_pages_cached: int = 0
    num_cached_tokens: int | None = None
    num_computed: int = 0
    num_in_flight: int = 0
    row: int | None = None
    num_skips: int = 0
    num_preemptions: int = 0
    is_new_to_row: bool = False
    request_id: str = field(init=False)
    num_prompt_tokens: int = field(init=False)
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.order = (self.request.priority, self.arrival)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_pages(self) -> int:
        """Pages it holds in each group."""
        return len(self.pages[0])

    @property
    def num_generated(self) -> int:
        return self.num_known - self.num_prompt_tokens

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
        if self.request.sampling.prompt_logprobs != ALL_LOGPROBS or self.num_generated:
            return 0
        return max(0, self.num_prompt_tokens - 1 - self.num_computed)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached pages may stand for the beginning of it; what is said of each position needs each computed."""
        return self.request.sampling.reads_prefix_cache and self.request.pooling != "mean"
