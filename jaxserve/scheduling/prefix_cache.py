"""Which full pages hold which tokens, so that a context that begins like an earlier one need not be computed again.

A page's key is a digest of the key before it and of the page's tokens: equal keys mean equal contexts from position 0 on. Only
full pages of committed tokens have one. A page that nobody holds keeps its key until the pool hands it out again, in the order in
which pages were released. Who holds a page is `page_pool`'s to know.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256

from jaxserve.errors import IntegrityError
from jaxserve.scheduling.page_pool import PagePool


def page_keys(token_ids: Sequence[int], page_size: int, keys: list[bytes], root: bytes = b"") -> list[bytes]:
    """Extends `keys`, those of the first pages, by the keys of all further full pages of `token_ids`, and returns it.

    Args:
        root: what beside the tokens makes contexts equal; stands before the first page.
    """
    for start in range(len(keys) * page_size, len(token_ids) - page_size + 1, page_size):
        parent = keys[-1] if keys else root
        keys.append(sha256(parent + array("i", token_ids[start : start + page_size]).tobytes()).digest())
    return keys


class PrefixCache:
    """The keys of one pool's pages."""

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_reuse = self._forget

    @property
    def num_pages(self) -> int:
        """Pages that have a key, held or free."""
        return len(self._key_of)

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the pages of the longest known beginning of a chain of keys; takes none of them."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> None:
        """Gives a page its key; where another page has it already, or the page has one, that stays."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def evict(self, pages: Iterable[int]) -> None:
        """Forgets these pages' keys: what is in them must not be found again."""
        for page in pages:
            self._forget(page)

    def reset(self) -> None:
        """Forgets every key; who holds pages goes on."""
        self._page_of.clear()
        self._key_of.clear()

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def check_integrity(self) -> None:
        """Raises IntegrityError unless each key has one page and each page one key."""
        if {page: key for key, page in self._page_of.items()} != self._key_of:
            raise IntegrityError(f"{len(self._page_of)} keys and {len(self._key_of)} pages of the prefix cache do not match")
