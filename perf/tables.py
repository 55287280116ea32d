"""Tables on the terminal."""

from tabulate import tabulate


def print_table(rows):
    """Print dicts with the same keys; floats to four significant digits, None as an empty cell."""
    print(tabulate(rows, headers="keys", floatfmt=".4g", intfmt=",", missingval=""))
