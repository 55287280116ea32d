"""Pages that leave a cache for host memory or another cache, and come back."""

from numbers import Integral

import numpy as np
import torch

from .._host.checks import check_last_contiguous, check_length, check_tensor, fail
from .api import copy_kv_pages
from .arrays import NO_LIMIT
from .hashing import page_hashes, root_hash
from .token_ids import as_ids


def export_pages(cache, seq, first_page, to):
    """`export_pages` of a cache."""
    cache._refuse_windows("export_pages")
    row, num_pages = cache._row(seq), cache._pages_of(len(seq))
    first_page = check_length("first_page", first_page)
    if first_page > num_pages:
        fail("first_page", f"at most the sequence's {num_pages} pages", first_page)
    pages = cache._tables[row, first_page:num_pages]
    sources = cache._page_tensors()
    if to is None:
        to = tuple([_host_pages(cache, x, pages.size) for x in sources])
    _check_exported(cache, "to", to, pages.size)
    copy_kv_pages(sources, cache._to_device(pages), cache._to_device(np.arange(pages.size, dtype=np.int32)), to=to)
    return to


def import_pages(cache, pages, token_ids, salt):
    """`import_pages` of a cache; the row of the sequence."""
    cache._refuse_windows("import_pages")
    is_known = not isinstance(token_ids, Integral)
    ids = as_ids(token_ids) if is_known else np.zeros(check_length("token_ids", token_ids), np.int64)
    num_pages = cache._pages_of(ids.size)
    num_given = _check_exported(cache, "pages", pages, None)
    chain = [root_hash(salt)]
    found = cache.pool.lookup(page_hashes(chain, ids, cache.page_size) if is_known else ())
    if not num_pages - found.size <= num_given <= num_pages:
        fail("pages", f"{num_pages - found.size} to {num_pages} pages: {found.size} are found", num_given)
    num_new, num_revived = num_pages - found.size, int((cache.pool._refs[found] == 0).sum())
    cache.pool._check_free(num_new + num_revived)
    cache.pool._share(found)
    new_pages = cache.pool.allocate(num_new)

    # Nothing fails from here on.
    del chain[1 + found.size :]
    row = cache._new_row(chain)
    cache._widen(num_pages)
    cache._tables[row, :num_pages] = np.concatenate([found, new_pages])
    cache._lengths[row], cache._limits[row], cache._known[row] = ids.size, 0, NO_LIMIT if is_known else 0
    cache._named[row], cache._firsts[row] = found.size, 0
    positions = np.arange(found.size * cache.page_size, ids.size)
    cache._tokens[cache._slots_of(row, positions)] = ids[positions]
    given = np.arange(num_given - num_new, num_given, dtype=np.int32)
    destinations = cache._to_device(new_pages.astype(np.int32))
    pages = tuple([x.detach() for x in pages])
    copy_kv_pages(pages, cache._to_device(given), destinations, to=cache._page_tensors())
    cache._name_full_pages([row])
    return row


def _host_pages(cache, tensor, num_pages):
    """Memory for so many pages of one of the cache's tensors, which its device reads and writes."""
    shape = (tensor.shape[0], num_pages, *tensor.shape[2:])
    return torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=not cache._on_host)


def _check_exported(cache, name, tensors, num_pages):
    """Check tensors of pages outside of the cache, before anything changes; their number of pages."""
    own = cache._page_tensors()
    if not isinstance(tensors, (tuple, list)) or len(tensors) != len(own):
        got = f"{len(tensors)} of them" if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        fail(name, f"a tuple of {len(own)} tensors", got, TypeError)
    check_tensor(f"{name}[0]", tensors[0], (own[0].shape[0], "pages", *own[0].shape[2:]), (own[0].dtype,), None)
    num_pages = tensors[0].shape[1] if num_pages is None else num_pages
    for i, (x, like) in enumerate(zip(tensors, own)):
        check_tensor(f"{name}[{i}]", x, (like.shape[0], num_pages, *like.shape[2:]), (like.dtype,), None)
        check_last_contiguous(f"{name}[{i}]", x)
        if x.device != cache.device and not (x.device.type == "cpu" and x.is_pinned()):
            fail(f"{name}[{i}]", f"a tensor on {cache.device} or in pinned host memory", f"one on {x.device}")
    return num_pages
