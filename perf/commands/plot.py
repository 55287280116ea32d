"""Pictures of CSV files of results. What the columns of a file say decides what is drawn."""

import sys
from pathlib import Path

from perf.results.plot import draw


def add_arguments(parser):
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.csv")


def run(out_dir, files):
    """Draw every file, into out_dir or, if that is None, beside it."""
    try:
        return [picture for path in files for picture in draw(path, out_dir)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
