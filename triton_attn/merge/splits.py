"""The number of splits of the keys of a sequence. Splits are computed in parallel and merged."""

from .._host.checks import check_length, fail

MAX_SPLITS = 256


def check_num_splits(num_splits):
    num_splits = check_length("num_splits", num_splits)
    if num_splits > MAX_SPLITS:
        fail("num_splits", f"0 (chosen) to {MAX_SPLITS}", num_splits)
    return num_splits


def choose_num_splits(num_programs, num_key_tiles, num_sms, max_splits=128):
    """The fewest splits within 85 % of the best efficiency: programs fill the SMs.

    efficiency = tiles of all programs / (tiles of the longest split * SMs * waves of splits that have keys)

    num_key_tiles is computed from the capacity of the cache, not from cache_seqlens: no device-to-host sync, and a
    captured graph stays right as sequences grow.
    """
    if num_programs == 0 or num_key_tiles == 0:
        return 1
    counts = range(1, min(max_splits, num_key_tiles, num_sms) + 1)
    costs = {n: _cost(num_programs, num_key_tiles, num_sms, n) for n in counts}
    best = min(costs.values())
    return next(n for n in counts if best >= 0.85 * costs[n])


def _cost(num_programs, num_key_tiles, num_sms, num_splits):
    """Tiles per SM, one after the other. A split has whole tiles, so the last splits may have none."""
    longest = -(-num_key_tiles // num_splits)
    num_splits = -(-num_key_tiles // longest)
    return longest * -(-num_programs * num_splits // num_sms)
