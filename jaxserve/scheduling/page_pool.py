"""The pages of one group: who holds how many references to which, and which are free. Knows nothing of what is in them.

Free pages wait in the order in which they were released; a sequence gives back its last page first, so that the beginning of a
context, which others may share, is taken last.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from jaxserve.errors import IntegrityError


class PagePool:
    """A fixed number of pages, handed out by id.

    Attributes:
        on_reuse: called with each page that is handed out anew: what was in it is lost.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.on_reuse: Callable[[int], None] = lambda page: None
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Returns `count` page ids with one reference each; the caller has checked `num_free`."""
        if count > len(self._free):
            raise IntegrityError(f"asked for {count} pages with {len(self._free)} free; the caller must check num_free")
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self.on_reuse(page)
        return pages

    def is_free(self, page: int) -> bool:
        """Returns whether nobody holds the page."""
        return self._references[page] == 0

    def num_references(self, page: int) -> int:
        """Returns how often the page is held."""
        return self._references[page]

    def share(self, page: int) -> None:
        """Adds a reference to a page, with what is in it; one that was free is so no more."""
        if self._references[page] == 0:
            del self._free[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference to each page, last first; those without any are free again."""
        for page in reversed(list(pages)):
            if self._references[page] < 1:
                raise IntegrityError(f"page {page} was released twice")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raises IntegrityError unless references are exactly `held` (ids, as often as held) and free + used = pool."""
        expected = [0] * self.num_pages
        for page in held:
            expected[page] += 1
        if expected != self._references:
            wrong = [p for p in range(self.num_pages) if expected[p] != self._references[p]]
            raise IntegrityError(
                f"{len(wrong)} pages have wrong reference counts, first page {wrong[0]}: "
                f"held {expected[wrong[0]]} times, counted {self._references[wrong[0]]}"
            )
        num_used = self.num_pages - self._references.count(0)
        if num_used + len(self._free) != self.num_pages or any(map(self._references.__getitem__, self._free)):
            raise IntegrityError(f"{num_used} used + {len(self._free)} free pages are not the pool's {self.num_pages}")
