"""FreeList against a list, under random operations on single pages, runs and any others."""

import random

import numpy as np
import pytest

from triton_attn.cache.free_list import FreeList


def links(free, start):
    """The pages from the end on, by one of the two arrays of links; one too many of links in a circle without it."""
    pages, page = [], start[free._end]
    while page != free._end and len(pages) <= free._end:
        pages.append(int(page))
        page = start[page]
    return pages


@pytest.mark.parametrize("num_pages", [0, 1, 2, 7, 60])
def test_random_operations_as_in_a_list(num_pages):
    rng = random.Random(num_pages)
    free, expected, taken = FreeList(num_pages), list(range(num_pages)), []
    for _ in range(500):
        kind = rng.choice(["pop", "put", "cut", "cut a run"])
        others = set(rng.sample(expected, rng.randint(0, len(expected))))
        left = [page for page in expected if page not in others]
        assert free.first(len(left), others) == left
        n = rng.randint(0, len(taken if kind == "put" else expected))
        if kind == "pop":
            pages, expected = expected[:n], expected[n:]
            assert free.pop(n) == pages
        elif kind == "put":
            pages, at_head = [taken.pop() for _ in range(n)], rng.random() < 0.5
            free.put(np.array(pages, int), at_head)
            expected = pages + expected if at_head else expected + pages
            pages = []
        else:
            start = rng.randint(0, len(expected) - n)
            pages = rng.sample(expected, n) if kind == "cut" else expected[start : start + n][::-1]
            free.cut(np.array(pages, int))
            expected = [page for page in expected if page not in pages]
        taken += pages
        rng.shuffle(taken)
        assert links(free, free._next) == links(free, free._previous)[::-1] == expected
