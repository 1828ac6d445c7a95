"""Pages of the key/value cache: who owns which, and how many of each kind there are.

A page has room for ``page_size`` entries in every layer of one kind. There are two kinds, because
the shared layers hold one entry per token and *recursion*, the others one per token. Nothing here
is a tensor: pages are numbers, and the storage in paged_kv.py is indexed by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Kinds of pages. Stream 0 of a sequence lives in pages of prelude and coda; the others, one for
# each recursion, in pages of the shared layers.
OWN, SHARED = 0, 1


def kind_of(stream: int) -> int:
    return OWN if stream == 0 else SHARED


class PagePool:
    """Pages of one kind, with the number of owners of each.

    Running sequences and cached prefixes own pages. A page has several owners when sequences share
    a prefix, and is free again when the last one releases it.
    """

    def __init__(self, num_pages: int) -> None:
        self.owners = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages))[::-1]

    @property
    def num_pages(self) -> int:
        return len(self.owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A page owned by the caller alone. Raises IndexError if none is free: make room first."""
        page = self._free.pop()
        assert self.owners[page] == 0
        self.owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add an owner."""
        assert self.owners[page] > 0, f"page {page} has no owner to share it with"
        self.owners[page] += 1

    def release(self, page: int) -> None:
        """Remove an owner; the page is free when it was the last."""
        assert self.owners[page] > 0, f"page {page} was released before"
        self.owners[page] -= 1
        if self.owners[page] == 0:
            self._free.append(page)


def divide_memory(
    num_bytes: int,
    *,
    page_bytes: Sequence[int],
    entries_per_token: Sequence[float],
    most_pages: Sequence[int],
) -> list[int]:
    """Number of pages of each kind: OWN, SHARED.

    num_bytes: memory for all pages. page_bytes: of one page; 0 for a kind without layers.
    entries_per_token: what a token of mean depth adds to each kind; memory is divided in this
    proportion, so that both kinds run out together. most_pages: more than these could never be
    used. Raises ValueError if the memory does not hold a page of each kind that has layers.
    """
    # Bytes of page_size tokens.
    bytes_together = sum(n * b for n, b in zip(entries_per_token, page_bytes, strict=True))
    pages = [
        min(int(num_bytes / bytes_together * n), most) if b else 0
        for n, b, most in zip(entries_per_token, page_bytes, most_pages, strict=True)
    ]
    if page_bytes[OWN] and pages[OWN] == most_pages[OWN]:  # the rest goes to the other kind
        rest = num_bytes - pages[OWN] * page_bytes[OWN]
        pages[SHARED] = min(most_pages[SHARED], rest // page_bytes[SHARED])
    if any(b and n < 1 for n, b in zip(pages, page_bytes, strict=True)):
        raise ValueError(
            f"kv_cache_memory={num_bytes} is too small for one page of each kind ({page_bytes} "
            f"bytes); give at least {int(bytes_together) + sum(page_bytes)}"
        )
    return pages
