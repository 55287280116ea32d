"""Plots of result CSV files. The columns of a file decide what is plotted."""

import sys
from pathlib import Path

from perf.results.plot import draw


def add_arguments(parser):
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.csv")


def run(out_dir, files):
    """Plot every file into out_dir, or beside the file if that is None."""
    try:
        return [picture for path in files for picture in draw(path, out_dir)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
