"""The figures of docs/performance.md and the status line of the README, written from the results.

Plots that are missing or older than their CSV are drawn first.
"""

import sys
from pathlib import Path

from perf.results.report import PAGE, README, draw, replace_section, replace_status, section, status


def add_arguments(parser):
    parser.add_argument("--page", type=Path, default=PAGE, help="page for the figures (default: docs/performance.md)")
    parser.add_argument("--readme", type=Path, default=README, help="file whose third line is the status")
    parser.add_argument("--redraw", action="store_true", help="redraw every plot")


def run(root, page=PAGE, readme=README, redraw=False):
    """Draw missing plots, then replace the figures and the status. Exits with an error if a table is broken or a file
    has no place for them. Both files are then unchanged.
    """
    try:
        drawn = draw(root, redraw)
        figures = replace_section(page.read_text(), section(root, page.parent))
        said = replace_status(readme.read_text(), status(root))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    page.write_text(figures)
    readme.write_text(said)
    return [*drawn, page, readme]
