"""What is left of one step: tokens, attention work items, and room for pages from the prefix cache."""

from jaxserve.config import ResolvedConfig
from jaxserve.scheduling.sequence import Sequence


class Budget:
    """Starts with all of a step; sequences spend it.

    Attributes:
        tokens: left.
        decode_items: left; a lone token costs some, a chunk does not.
        full_scores: prompt tokens that may still be scored over the whole vocabulary.
        cached_pages: that the prefix cache may still give: each is a row of the step's input.
        was_capped: whether a prompt got less than it could have, because of long_prefill_token_threshold.
    """

    __slots__ = ("_longest_chunk", "_split_size", "cached_pages", "decode_items", "full_scores", "tokens", "was_capped")

    def __init__(self, config: ResolvedConfig):
        self.tokens = config.max_num_batched_tokens
        self.decode_items = config.max_decode_items
        self.full_scores = config.max_full_scores
        self.cached_pages = config.max_cached_pages
        self.was_capped = False
        self._split_size = config.split_size
        self._longest_chunk = config.long_prefill_token_threshold

    def take(self, sequence: Sequence, num_left: int = 0) -> int:
        """Returns how many tokens of a sequence the step computes, and spends them; 0 where nothing is left for it.

        Args:
            num_left: tokens that must stay for others.
        """
        wanted = sequence.num_to_compute
        if wanted == 0:
            return 0
        if wanted > self._longest_chunk:
            wanted = self._longest_chunk
            self.was_capped = True
        take = self.tokens - num_left
        if take > wanted:
            take = wanted
        if sequence.wants_full_scores:
            take = self._take_scores(sequence, take)
        if take == 1:
            items = sequence.num_computed // self._split_size + 1
            if items > self.decode_items:
                self.full_scores += min(take, sequence.num_full_scores)
                return 0
            self.decode_items -= items
        self.tokens -= take
        return take

    def _take_scores(self, sequence: Sequence, take: int) -> int:
        """Returns how many of these tokens there is room for with the scores that they need, and spends that room."""
        needed = sequence.num_full_scores
        if needed == 0:
            return take
        take = min(take, self.full_scores)
        self.full_scores -= min(take, needed)
        return take

    def take_more(self, sequence: Sequence, taken: int) -> int:
        """Returns how many tokens of a sequence it is if it gets all that is left beside those it has taken."""
        take = min(sequence.num_to_compute, taken + self.tokens)
        if sequence.wants_full_scores and sequence.num_full_scores:
            return taken
        if take > taken:
            self.give_back(sequence, taken)
            self.tokens -= take
        return take

    def give_back(self, sequence: Sequence, taken: int) -> None:
        """Undoes `take`; the sequence has not changed since."""
        self.tokens += taken
        self.full_scores += min(taken, sequence.num_full_scores)
        if taken == 1:
            self.decode_items += sequence.num_computed // self._split_size + 1
