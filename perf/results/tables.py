"""Tables on the terminal, and the short names of configs."""

try:
    from tabulate import tabulate
except ModuleNotFoundError:  # a GPU machine may have little besides torch

    def tabulate(rows, **_):
        """Aligned columns without tabulate."""
        lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else []
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def _text(value):
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows):
    """Print dicts with the same keys; floats to four significant digits, None as an empty cell."""
    print(format_table(rows))


def format_table(rows, style="simple"):
    return tabulate(rows, headers="keys", tablefmt=style, floatfmt=".4g", intfmt=",", missingval="")


def tile_name(block_m, block_n, num_warps, num_stages, use_tma=False):
    """128x128 w8 s2: query rows x keys of a tile, warps, stages; tma if the tiles are loaded through descriptors."""
    return f"{block_m}x{block_n} w{num_warps} s{num_stages}{' tma' if use_tma else ''}"
