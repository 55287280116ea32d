"""What each door to another library supports: its functions, what runs on a CPU, what raises.

The table is read from SUPPORT of every module in triton_attn/interop, and stands in docs/support.md. Tests call the
functions and raise the errors.
"""

from importlib import import_module
from pkgutil import iter_modules

from triton_attn import interop

HEAD = ("door", "functions", "on a CPU", "raises for")


def run(out_dir):
    print("\n".join(table()))


def table():
    """The lines of the table, in Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *(_row(name, support) for name, support in supports().items())]
    return [f"| {' | '.join(row)} |" for row in rows]


def supports():
    """{module: its Support}, of the modules whose library is installed."""
    found = {}
    for module in iter_modules(interop.__path__):
        if module.name.startswith("_"):
            continue
        try:
            support = getattr(import_module(f"{interop.__name__}.{module.name}"), "SUPPORT", None)
        except ModuleNotFoundError as error:
            print(f"interop.{module.name}: not shown, since {error.name} is not installed")
            continue
        if support is not None:
            found[module.name] = support
    return found


def _row(name, support):
    functions = ", ".join(f"`{function}`" for function in support.functions)
    refused = "; ".join(f"`{argument}`: {values}" for argument, values in support.refused.items())
    return f"`interop.{name}`", functions, support.on_cpu, refused
