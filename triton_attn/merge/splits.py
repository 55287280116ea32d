"""How many parts the keys of a sequence are cut in, to be attended side by side and merged."""

from .._host.checks import check_length, fail

MAX_SPLITS = 256


def check_num_splits(num_splits):
    num_splits = check_length("num_splits", num_splits)
    if num_splits > MAX_SPLITS:
        fail("num_splits", f"0 (chosen) to {MAX_SPLITS}", num_splits)
    return num_splits


def choose_num_splits(num_programs, num_key_tiles, num_processors, max_splits=128):
    """Parts to cut the keys in, so that programs fill the processors: the fewest within 85 % of the best efficiency.

    efficiency = tiles of all programs / (tiles of the longest split * processors * waves of splits that have keys)

    Everything is known on the host, the most keys that a cache holds in place of those it does, so that nothing is read
    back and a captured graph stays right as sequences grow.
    """
    if num_programs == 0 or num_key_tiles == 0:
        return 1
    counts = range(1, min(max_splits, num_key_tiles, num_processors) + 1)
    costs = {n: _cost(num_programs, num_key_tiles, num_processors, n) for n in counts}
    best = min(costs.values())
    return next(n for n in counts if best >= 0.85 * costs[n])


def _cost(num_programs, num_key_tiles, num_processors, num_splits):
    """Tiles that a processor takes one after the other. A split has whole tiles: some may be left with none."""
    longest = -(-num_key_tiles // num_splits)
    num_splits = -(-num_key_tiles // longest)
    return longest * -(-num_programs * num_splits // num_processors)
