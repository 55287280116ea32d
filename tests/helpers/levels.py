"""The test level of this process, from its environment: see tests/conftest.py."""

import os
from collections import Counter

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEVEL = os.environ.get("TRITON_ATTN_TESTS", "quick")
DRAWS = {"quick": 4, "ci": 7, "full": 500}
FULL = LEVEL == "full"
if LEVEL not in DRAWS:
    raise pytest.UsageError(f"TRITON_ATTN_TESTS: expected one of {', '.join(DRAWS)}, got {LEVEL!r}")


def without(name, items):
    """Remove the tests with this mark, except every `but_each`-th case."""
    seen, kept = Counter(), []
    for item in items:
        each = [marker.kwargs.get("but_each") for marker in item.iter_markers(name)]  # of the test and of the case
        if None in each:
            continue
        test, _, _ = item.nodeid.partition("[")
        if all(seen[test] % n == 0 for n in each):
            kept.append(item)
        seen[test] += 1
    return kept
