"""Structure of the package: arguments and lines of its device code, missing docstrings, exceptions to the import law.

Exits with an error if one of them is past its limit (perf/model/house.py).
"""

import sys

from perf.model import house
from perf.results.tables import print_table


def run(out_dir):
    functions = house.jit_functions()
    kernels = [function for function in functions if function.is_kernel]
    helpers = [function for function in functions if not function.is_kernel]
    exceptions = house.exceptions_to_the_law()
    print_table([_row(function) for function in sorted(kernels, key=_size, reverse=True)])
    print()
    print_table(summary(kernels, helpers, exceptions))
    wrong = [
        f"{function.file}, {function.name}: expected at most {most} {what}, got {got}"
        for function in functions
        for what, (got, most) in function.excesses().items()
    ]
    wrong += [f"{exception}, which the import law of perf/model/house.py does not allow" for exception in exceptions]
    if wrong:
        sys.exit("\n".join(["", *wrong]))


def summary(kernels, helpers, exceptions):
    """The figures of the whole package, as a table."""
    largest = max(kernels + helpers, key=lambda function: function.lines)
    most, most_of_helpers = max(kernels, key=_size), max(helpers, key=_size)
    without = [function for function in kernels + helpers if not function.has_docstring]
    return [
        {"what": "jit functions", "figure": len(kernels + helpers), "where": f"{len(kernels)} of them are kernels"},
        {"what": "most arguments", "figure": most.arguments, "where": most.name},
        {"what": "most arguments of a helper", "figure": most_of_helpers.arguments, "where": most_of_helpers.name},
        {"what": "lines of the longest body", "figure": largest.lines, "where": largest.name},
        {"what": "jit functions without docstring", "figure": len(without), "where": ""},
        {"what": "exceptions to the import law", "figure": len(exceptions), "where": ""},
    ]


def _row(function):
    return {
        "kernel": function.name,
        "file": function.file,
        "arguments": function.arguments,
        "at most": function.most_arguments,
        "lines": function.lines,
    }


def _size(function):
    return function.arguments, function.lines
