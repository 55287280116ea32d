"""Tables on the terminal."""

try:
    from tabulate import tabulate
except ModuleNotFoundError:  # a GPU machine may have torch and little else
    tabulate = None


def print_table(rows):
    """Print dicts with the same keys; floats to four significant digits, None as an empty cell."""
    if tabulate:
        print(tabulate(rows, headers="keys", floatfmt=".4g", intfmt=",", missingval=""))
    else:
        print(_plain(rows))


def _plain(rows):
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _text(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
