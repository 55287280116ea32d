"""Pages that a sequence is about to write, and others hold: the sequence goes on with a copy."""

from .arrays import from_list


def pages_to_copy(cache, entries):
    """Of the pages at these (row, column) of the tables, which are about to be written, those that must be copied:
    (their entries, these pages, the pages that need no copy), three lists.

    A page that nobody but these rows holds is kept by the last of them.
    """
    tables, refs_of, left, copied, originals, kept = cache._tables, cache.pool._refs_of, {}, [], [], []
    for entry in entries:
        page = tables.item(entry)
        references = left.get(page) or refs_of[page]
        left[page] = references - 1
        if references > 1:
            copied.append(entry)
            originals.append(page)
        else:
            kept.append(page)
    return copied, originals, kept


def leave_originals(cache, originals, copies):
    """Give up pages that `pages_to_copy` found, whose copies were made."""
    cache._page_tokens[copies] = cache._page_tokens.take(originals, axis=0)
    if cache._is_plain:  # others hold each
        cache.pool._release_shared(originals)
    else:  # or held it: what is behind their windows may have been given back since `pages_to_copy`
        cache.pool._release(from_list(originals))
