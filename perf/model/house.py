"""The structure of triton_attn, from its source: imports between its parts, and the size of its device code."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "triton_attn"

FAMILIES = ("flash", "paged", "mla", "merge", "cache")
# What each part may import from the package, besides itself. "" is the face, `triton_attn` itself: nothing imports it.
ALLOWED = {
    "_jit": set(),
    "_host": {"toolchain"},  # to repair the interpreter in an interpreting process
    "testing": set(),
    "toolchain": {"_host"},  # the table of GPUs
    "reference": set(FAMILIES),
    "interop": {*FAMILIES, "reference"},  # public names only
    "": {*FAMILIES, "reference", "_host", "_warmup"},
    "models": {"_host"},
    "parallel": {"_host", "flash", "paged", "mla", "merge"},
    "_warmup": {*FAMILIES, "_host", "models", "toolchain"},  # it compiles for GPUs that are not present
    "__main__": {"_warmup", "models"},
    **{family: {"_jit", "_host", "merge"} for family in FAMILIES},
    "dense": {"_jit", "_host"},
    "flash": {"_jit", "_host", "dense"},
    "mla": {"_jit", "_host", "dense", "merge"},
}

# Limits of these kernels' arguments. All other kernels have the largest of these limits.
MOST_ARGUMENTS = {
    "_flash_fwd_kernel": 24,
    "_flash_bwd_dq_kernel": 24,
    "_flash_bwd_dkdv_kernel": 24,
    "_paged_fwd_kernel": 28,
    "_mla_prefill_kernel": 28,
    "_mla_absorbed_kernel": 28,
}
MOST_ARGUMENTS_OF_A_HELPER = 7
MOST_LINES = 110  # of a body, with its docstring


@dataclass(frozen=True)
class JitFunction:
    """A function that Triton or Gluon compiles. `lines` is the length of its body; `is_kernel` says whether it is
    launched.
    """

    name: str
    file: str
    arguments: int
    lines: int
    has_docstring: bool
    is_kernel: bool

    @property
    def most_arguments(self):
        if not self.is_kernel:
            return MOST_ARGUMENTS_OF_A_HELPER
        return MOST_ARGUMENTS.get(self.name, max(MOST_ARGUMENTS.values()))

    def excesses(self):
        """The figures past their limits: {name: (found, limit)}."""
        found = {"arguments": (self.arguments, self.most_arguments), "lines": (self.lines, MOST_LINES)}
        return {what: pair for what, pair in found.items() if pair[0] > pair[1]}


def jit_functions(package=PACKAGE):
    """The jit functions of a package, by file and line. A kernel is a jit function that no other one names."""
    found, named = [], set()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(_compiles(decorator) for decorator in node.decorator_list):
                found.append((path.relative_to(package), node))
                named |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                named |= {name.attr for name in ast.walk(node) if isinstance(name, ast.Attribute)}
    return [
        JitFunction(
            name=node.name,
            file=str(file),
            arguments=len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs),
            lines=node.end_lineno - node.body[0].lineno + 1,
            has_docstring=ast.get_docstring(node) is not None,
            is_kernel=node.name not in named,
        )
        for file, node in found
    ]


def _compiles(decorator):
    """@triton.jit, @triton.jit(...), @gluon.jit."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function) in ("triton.jit", "gluon.jit")


def modules_of(package=PACKAGE):
    """{name: path} of a package's modules."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def imports_of(module, modules):
    """(imported module, name or None) for every import in a module, also inside functions."""
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inside = f"{source}.{alias.name}"
                yield (inside, None) if inside in modules else (source, alias.name)


def part_of(module):
    """The first folder or module under triton_attn; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def exceptions_to_the_law(package=PACKAGE):
    """The imports that break the import law, as "module imports module"."""
    modules = modules_of(package)
    return sorted(
        {
            f"{module} imports {imported}"
            for module in modules
            for imported, name in imports_of(module, modules)
            if imported.split(".")[0] == package.name and not _may_import(module, imported, name)
        }
    )


def _may_import(module, imported, name):
    part, other = part_of(module), part_of(imported)
    if part == "interop" and other in FAMILIES:
        return imported.count(".") == 1 and not (name or "").startswith("_")
    return other == part or other in ALLOWED.get(part, ())
