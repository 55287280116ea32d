"""A digest of the code that a kernel is compiled from: a record of a kernel is one of this code only."""

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
SHARED = "_jit"


@functools.cache
def kernel_digest(kernel, package=PACKAGE):
    """16 hex digits of a kernel's file, a path in the package, and of all modules of `_jit` that it imports, directly
    or not. Comments, docstrings and layout do not change it, nor does the version of Python.
    """
    trees, left = {}, [kernel]
    while left:
        path = left.pop()
        if path not in trees:
            trees[path] = ast.parse((package / path).read_text())
            left += _shared_modules(path, trees[path])
    said = repr([(path, _structure(trees[path])) for path in sorted(trees)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _shared_modules(path, tree):
    """Modules of `_jit` that a file imports: `from .._jit.x import y`, in `_jit` itself `from .x import y`."""
    prefix, level = ("", 1) if path.startswith(f"{SHARED}/") else (f"{SHARED}.", 2)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [node.module for node in imports if node.level == level and (node.module or "").startswith(prefix)]
    return [f"{SHARED}/{module.removeprefix(prefix)}.py" for module in modules]


def _structure(node):
    """A syntax tree without positions, docstrings and empty fields, which differ between versions of Python."""
    if isinstance(node, list):
        return [_structure(x) for x in node if not _is_text(x)]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _structure(x)) for name, x in ast.iter_fields(node) if x is not None and x != []]
    return type(node).__name__, fields


def _is_text(node):
    """Whether it is a statement that is only a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
