"""What sequences hold: rows, KV pages and host memory. Owns them all, and the prefix cache of the pages.

Knows nothing of whose turn it is; that is `admission`'s and `scheduler`'s.
"""

from collections import Counter
from collections.abc import Iterable

from jaxserve.config import ResolvedConfig
from jaxserve.errors import IntegrityError
from jaxserve.scheduling.page_pool import PagePool
from jaxserve.scheduling.prefix_cache import PrefixCache, page_keys
from jaxserve.scheduling.sequence import NEVER, Sequence

Pages = list[list[int]]
"""Page ids by group."""


class Holdings:
    """See the module docstring.

    Args:
        config: limits of the engine.
        num_groups: block tables a sequence has; each has its own pool of config.num_pages.

    Attributes:
        host_bytes: what each sequence that has been admitted may need of the host's memory until it ends; the sum is at most
            config.max_host_bytes. A preempted sequence keeps it: what was collected for its answer is still there.
        num_cached_tokens: tokens that the prefix cache spared sequences.
    """

    def __init__(self, config: ResolvedConfig, num_groups: int):
        self.pools = tuple(PagePool(config.num_pages) for _ in range(num_groups))
        self.caches = tuple(PrefixCache(pool) for pool in self.pools) if config.max_cached_pages else ()
        self.free_rows = list(range(config.max_num_seqs))[::-1]
        self.host_bytes: dict[Sequence, int] = {}
        self.num_cached_tokens = 0
        self.page_size = config.page_size
        self._config = config
        self._num_host_bytes = 0

    @property
    def num_free_pages(self) -> int:
        return min(pool.num_free for pool in self.pools)

    # --- pages --------------------------------------------------------------------------------------------------------

    def lookup(self, sequence: Sequence) -> Pages:
        """Returns the pages that hold the sequence's first tokens already; at least its last token is computed."""
        if not self.caches or not sequence.reads_prefix_cache:
            return [[] for _ in self.pools]
        keys = self._page_keys(sequence)[: (sequence.num_known - 1) // self.page_size]
        found = [cache.lookup(keys) for cache in self.caches]
        length = min(map(len, found))
        return [pages[:length] for pages in found]

    def _page_keys(self, sequence: Sequence) -> list[bytes]:
        if len(sequence.token_ids) < (len(sequence.page_keys) + 1) * self.page_size:
            return sequence.page_keys
        root = b"%d" % sequence.num_prompt_tokens if self._config.reads_prompt_len else b""
        return page_keys(sequence.token_ids, self.page_size, sequence.page_keys, root)

    def missing_pages(self, sequence: Sequence, cached: Pages) -> list[int]:
        """Returns how many more pages must be free, by group, for the cached ones and new ones for all other known tokens."""
        num_new = -(-sequence.num_known // self.page_size) - len(cached[0])
        return [
            num_new + sum(map(pool.is_free, pages)) - pool.num_free for pool, pages in zip(self.pools, cached, strict=True)
        ]

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes pages for positions [0, num_tokens) the sequence's own; changes nothing and returns False if some lack."""
        lacking = -(-(num_tokens - sequence.num_reserved) // self.page_size)
        if lacking <= 0:
            return True
        if lacking > self.num_free_pages:
            return False
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pages.extend(pool.allocate(lacking))
        sequence.num_reserved += lacking * self.page_size
        return True

    def give_keys(self, sequence: Sequence, num_computed: int) -> None:
        """Gives the prefix cache the sequence's full pages of committed tokens, of its first `num_computed`.

        The last of these may be computed in the step that is being planned: each layer stores all of a step before
        any token attends, so others may read them in that very step.
        """
        num_full = min(num_computed, sequence.num_known) // self.page_size
        keys = self._page_keys(sequence)
        for cache, pages in zip(self.caches, sequence.pages, strict=True):
            for index in range(sequence.num_pages_cached, num_full):
                cache.insert(keys[index], pages[index])
        self._set_cached(sequence, num_full)

    def _set_cached(self, sequence: Sequence, num_pages: int) -> None:
        sequence.num_pages_cached = num_pages
        sequence.next_key_at = (num_pages + 1) * self.page_size if self.caches else NEVER

    def forget_pages(self, sequence: Sequence) -> None:
        """Takes the keys of all its pages away: what is in them must not be found."""
        for cache, pages in zip(self.caches, sequence.pages, strict=False):
            cache.evict(pages)

    def reset_prefix_cache(self) -> None:
        for cache in self.caches:
            cache.reset()

    # --- a sequence comes and goes --------------------------------------------------------------------------------------

    def has_host_bytes(self, sequence: Sequence) -> bool:
        """Returns whether the sequence has its host memory already, or can have it."""
        needed = sequence.request.peak_host_bytes
        return sequence in self.host_bytes or needed <= self._config.max_host_bytes - self._num_host_bytes

    def seat(self, sequence: Sequence, cached: Pages) -> None:
        """Gives a row, host memory, the cached pages and new ones for all other known tokens; the caller knows they are there."""
        for pool, held, pages in zip(self.pools, sequence.pages, cached, strict=True):
            for page in pages:
                pool.share(page)
            held.extend(pages)
        sequence.num_computed = sequence.num_reserved = len(cached[0]) * self.page_size
        if not self.reserve(sequence, sequence.num_known):
            raise IntegrityError(f"{sequence.request_id} was given a row without room for its pages")
        self._set_cached(sequence, len(cached[0]))
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_cached_tokens += sequence.num_computed
        if sequence.request.peak_host_bytes and sequence not in self.host_bytes:
            self.host_bytes[sequence] = sequence.request.peak_host_bytes
            self._num_host_bytes += sequence.request.peak_host_bytes
        sequence.row = self.free_rows.pop()
        sequence.is_new_to_row = True

    def vacate(self, sequence: Sequence) -> None:
        """Takes row and pages away; it will have to be computed again from its tokens."""
        assert sequence.row is not None
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.release(pages)
        sequence.pages = [[] for _ in self.pools]
        sequence.num_computed = sequence.num_reserved = sequence.num_told = sequence.num_pages_cached = 0
        self.free_rows.append(sequence.row)
        sequence.row = None

    def end(self, sequence: Sequence) -> None:
        """Takes everything away."""
        if sequence.row is not None:
            self.vacate(sequence)
        self._num_host_bytes -= self.host_bytes.pop(sequence, 0)

    # --- the books ------------------------------------------------------------------------------------------------------

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Raises IntegrityError unless pages, rows and host memory are exactly what these sequences hold."""
        for group, pool in enumerate(self.pools):
            pool.check_integrity(page for s in running for page in s.pages[group])
        for cache in self.caches:
            cache.check_integrity()
        rows = sorted([*self.free_rows, *(s.row for s in running if s.row is not None)])
        if rows != list(range(self._config.max_num_seqs)):
            raise IntegrityError(f"rows are lost or held twice: {rows}")
        expected = {s: s.request.peak_host_bytes for s in running if s.request.peak_host_bytes}
        expected |= {s: s.request.peak_host_bytes for s in waiting if s.request.peak_host_bytes and s.num_preemptions}
        total, limit = sum(expected.values()), self._config.max_host_bytes
        if self.host_bytes != expected or not self._num_host_bytes == total <= limit:
            raise IntegrityError(
                f"{len(self.host_bytes)} sequences have reserved {self._num_host_bytes} of {limit} bytes of host memory; "
                f"the {len(expected)} that were admitted and have not ended need {total}"
            )


class FreedPages:
    """Which pages would be free if these sequences gave all of theirs back; shared ones are when the last holder does.

    Args:
        kept: pages that do not count.
    """

    def __init__(self, holdings: Holdings, kept: Pages):
        self._pools = holdings.pools
        self._kept = [set(pages) for pages in kept]
        self._held: list[Counter[int]] = [Counter() for _ in kept]
        self.counts = [0] * len(kept)

    def add(self, sequence: Sequence) -> None:
        for group, (pool, held, pages) in enumerate(zip(self._pools, self._held, sequence.pages, strict=True)):
            held.update(pages)
            kept = self._kept[group]
            self.counts[group] += sum(held[page] == pool.num_references(page) for page in pages if page not in kept)
