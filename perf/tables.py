"""Tables on the terminal, and how a config is written in them."""

from tabulate import tabulate


def print_table(rows):
    """Print dicts with the same keys; floats to four significant digits, None as an empty cell."""
    print(format_table(rows))


def format_table(rows):
    return tabulate(rows, headers="keys", floatfmt=".4g", intfmt=",", missingval="")


def tile_name(block_m, block_n, num_warps, num_stages, use_tma=False):
    """128x128 w8 s2: query rows x keys of a tile, warps, stages; tma if descriptors load the tiles."""
    return f"{block_m}x{block_n} w{num_warps} s{num_stages}{' tma' if use_tma else ''}"
