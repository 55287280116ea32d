"""What a router of requests needs to know of a cache: which prefixes can be found in it."""

from typing import NamedTuple, TypeAlias

HASH_BYTES = 32


class PagesStored(NamedTuple):
    """Pages of one sequence, one after the other, can be found from now on.

    Attributes:
        hashes: of each page and all before it, as `triton_attn.cache.hashing` defines them.
        parent: hash of the page before the first of them; None if there is none.
        root: hash of the salt, with which the hash of a sequence's first page begins.
        token_ids: of all these pages, page_size each.
        page_size: tokens on a page.
        group: of layers, 0 without `layer_windows`. Each group stores pages of its own under the same hashes.
    """

    hashes: list[bytes]
    parent: bytes | None
    root: bytes
    token_ids: list[int]
    page_size: int
    group: int


class PagesRemoved(NamedTuple):
    """Pages can no longer be found: they are reused, or overwritten after a truncation."""

    hashes: list[bytes]
    group: int


class PagesCleared(NamedTuple):
    """No page that was stored before can be found: `reset_prefix_cache`."""


PageEvent: TypeAlias = PagesStored | PagesRemoved | PagesCleared


class EventLog:
    """Events since the last `take`, in order; names of pages are hashes with a suffix for the group.

    Two pages with one name are stored once, and removed when the last of them is.
    """

    def __init__(self, page_size):
        self._page_size = page_size
        self._events: list[PageEvent] = []
        self._described = {}

    def describe(self, names, root, parents, token_ids):
        """What pages of a sequence that are about to be named hold.

        Args:
            names: of the pages, with the suffix.
            root: of the sequence.
            parents: hashes of the pages before; of the first page the root.
            token_ids: (pages, page_size).
        """
        for name, parent, ids in zip(names, parents, token_ids.tolist()):
            self._described[name] = root, parent, ids

    def forget_descriptions(self):
        self._described.clear()

    def stored(self, name):
        root, parent, ids = self._described[name]
        digest, group = name[:HASH_BYTES], group_of(name)
        last = self._events[-1] if self._events else None
        if isinstance(last, PagesStored) and last.group == group and last.hashes[-1] == parent:
            last.hashes.append(digest)
            last.token_ids.extend(ids)
        else:
            parent = None if parent == root else parent
            self._events.append(PagesStored([digest], parent, root, list(ids), self._page_size, group))

    def removed(self, name):
        last = self._events[-1] if self._events else None
        if isinstance(last, PagesRemoved) and last.group == group_of(name):
            last.hashes.append(name[:HASH_BYTES])
        else:
            self._events.append(PagesRemoved([name[:HASH_BYTES]], group_of(name)))

    def cleared(self):
        self._events = [PagesCleared()]

    def take(self):
        events, self._events = self._events, []
        return events


def group_suffix(group):
    """What a name of a page has after the hash: none in the first group."""
    return group.to_bytes(2, "little") if group else b""


def group_of(name):
    return int.from_bytes(name[HASH_BYTES:], "little")
