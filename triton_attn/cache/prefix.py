"""The longest cached prefix of a sequence where groups of layers keep different parts of it."""

from .arrays import from_list


def find_in_groups(find, hashes, windows, no_window, page_size, usable):
    """(number of cached tokens, an array of pages for each group).

    A prefix is cached if all its pages are found in the groups without a window, and in the others those that the
    first token after the prefix sees, whatever became of the pages before. The pages of each group go up to the last
    cached token.

    Args:
        find: find(group, hash) is a page, or None.
        hashes: of the prompt's full pages, computed as far as they are read.
        windows: for each group, keys before a token that it sees; `no_window` where it sees all.
        usable: usable(num_pages) tokens are cached if so many pages are found.
    """
    whole = [group for group, window in enumerate(windows) if window == no_window]
    read = []
    for digest in hashes:
        if any(find(group, digest) is None for group in whole):
            break
        read.append(digest)

    # From the right: a page that is missing in a window leaves the pages before it. No page is looked up twice.
    num_pages, looked_up = len(read), dict.fromkeys(range(len(windows)), len(read))
    is_whole = False
    while not is_whole:
        is_whole, seen_from = True, usable(num_pages)
        for group, window in enumerate(windows):
            if window == no_window:
                continue
            first = max(0, seen_from - window) // page_size
            found_from = min(looked_up[group], num_pages)
            while found_from > first and find(group, read[found_from - 1]) is not None:
                found_from -= 1
            looked_up[group] = found_from
            if found_from > first:
                num_pages = looked_up[group] = found_from - 1
                is_whole = False
                break
    num_tokens = usable(num_pages)
    last = -(-num_tokens // page_size)
    firsts = [0 if window == no_window else max(0, num_tokens - window) // page_size for window in windows]
    pages = [from_list([find(group, digest) for digest in read[first:last]]) for group, first in enumerate(firsts)]
    return num_tokens, pages
