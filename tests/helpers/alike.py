"""Launches that say they are alike: whether they are."""

import contextlib
from unittest import mock

from triton_attn._host import device


@contextlib.contextmanager
def checked_alike():
    """A launch that is alike to an earlier one, addresses too, must have its key by kinds. Yields these keys by what
    launches that are alike do not share."""
    seen, find = {}, device._key_of_launch

    def key_of_launch(kernel, args, constants, alike=None):
        key, whole = find(kernel, args, constants, alike), find(kernel, args, constants)
        if alike is not None and key is None:  # the first one
            key = find(kernel, args, constants, alike)
        if alike is not None and seen.setdefault(key, whole) != whole:
            differ = [pair for pair in zip(seen[key], whole) if pair[0] != pair[1]]
            raise AssertionError(f"{kernel.__name__}: launches that say they are alike differ: {differ}")
        return key

    with mock.patch.object(device, "_key_of_launch", key_of_launch):
        yield seen
