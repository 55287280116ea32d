"""Tables on the terminal."""

try:
    from tabulate import tabulate
except ModuleNotFoundError:  # a GPU machine may have torch and little else

    def tabulate(rows, **_):
        """The same rows in columns as wide as they need, without tabulate's formats."""
        lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else []
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def _text(value):
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows):
    """Print dicts with the same keys; floats to four significant digits, None as an empty cell."""
    print(tabulate(rows, headers="keys", floatfmt=".4g", intfmt=",", missingval=""))
