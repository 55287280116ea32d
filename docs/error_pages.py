"""The texts of all errors that the package raises, collected from its source, for a page of the site.

A text is a template in which `…` stands for what a call puts in. The name of an argument is followed from a check to
the calls of the check.
"""

import ast
import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent / "triton_attn"
ANY = "…"
WRAPPERS = ("fail", "_fail")  # fail(name, expected, got, error=ValueError)
MOST_TEXTS = 60  # that one f-string stands for


class Error(NamedTuple):
    """A place in the source that raises an error. `names` are those of arguments before the colon, or empty."""

    path: str
    line: int
    kind: str
    names: tuple[str, ...]
    text: str

    @property
    def full_texts(self):
        return [f"{name}: {self.text}" for name in self.names] or [self.text]


class Family(NamedTuple):
    """Errors with the same remedy: what is in these modules and has such a text, and is in no family before."""

    title: str
    modules: str
    texts: str
    advice: str


FAMILIES = [
    Family(
        "Tests and tools",
        "testing|toolchain",
        "",
        "[Test your own kernels without a GPU](../testing-without-a-gpu.md) shows each tool, and what to do about an "
        "error of the tool itself. An error about memory or order is a fault of the kernel. The first line of its "
        "message is the cause, as a rule.",
    ),
    Family(
        "Gradients and transforms",
        "",
        "gradient|derivatives|vmap is",
        "For inference, call the function under `torch.no_grad()` or detach the tensor. `flash_attention`, "
        "`flash_attention_varlen` and `mla_prefill` have gradients, for head dimensions to 256.",
    ),
    Family(
        "Page bookkeeping",
        "cache/(pool|sequences|token_ids|hashing|layers)",
        "",
        "`OutOfPages` means that the cache is full. Nothing has changed: free a sequence and call again. The other "
        "errors mean that a sequence or a page was freed twice or belongs to another cache, or that the token ids do "
        "not fit the sequences.",
    ),
    Family(
        "Values of lengths, positions and page numbers",
        "_host|cache|mla|paged",
        r"^(?!caches)[\w…]+(\[|, sequence )",
        "Such values are checked with `check_values=True` or `TRITON_ATTN_CHECK=1` alone, since reading them costs a "
        "device-to-host sync. The message names the sequence and the entry. Set the variable once if results look "
        "wrong: without the check such a value gives an undefined result.",
    ),
    Family(
        "Configs, tuned tables, environment variables, warm-up",
        "_host/(tuned|config|gpu|device|backend)|_warmup|models",
        "",
        "[Tune for your GPU](tune.md) shows how a table is made and used. A table of another Triton or GPU is refused: "
        "sweep again on this one. [What is supported](../support.md) lists the environment variables.",
    ),
    Family(
        "Many GPUs",
        "parallel",
        "",
        "All ranks make the same call, each with its own rows. [Many GPUs](../many-gpus.md) shows how rows are "
        "sharded. `TRITON_ATTN_CHECK=1` compares the calls of the ranks.",
    ),
    Family(
        "Other libraries' names",
        "interop",
        "",
        "[Call it from vLLM, torch, transformers](call-it.md) leads to the page of each library, which lists what is "
        "supported. Nothing falls back quietly: use the library's own function for a case that is refused.",
    ),
    Family(
        "Devices",
        "",
        "device",
        "All tensors of a call are on the device of the first one, index tensors too. Move `cache_seqlens` and "
        "`block_table` once a step, not once a layer.",
    ),
    Family(
        "Types and dtypes",
        "",
        r"dtype|float\d|torch\.|(expected|with) (a|an|None or) ?(tensor|int|number(?! of)|bool|list|pair|object)\b",
        "Queries are fp16, bf16 or fp32, keys and values have the same dtype, and caches may be fp8. `cu_seqlens`, "
        "`cache_seqlens` and `block_table` are int32, `slot_mapping` is int64. Options are plain numbers.",
    ),
    Family(
        "Strides",
        "",
        "contiguous (last|tensor)|stride|multiples of 4 bytes",
        "Only the last dimension has to be contiguous, and `x.contiguous()` makes it so. A transpose of the other "
        "dimensions needs no copy.",
    ),
    Family(
        "Shapes",
        "",
        "shape|dimension|heads|head_dim|batch size|rows|columns|queries|page size|one for each",
        "Tensors are (batch, seqlen, heads, head_dim), packed ones (total, heads, head_dim). The number of KV heads "
        "divides that of query heads.",
    ),
    Family(
        "Options",
        "",
        "expected |not supported|^mode: ",
        "The message has the values that are allowed. `help()` of the function says what the option means.",
    ),
]


def page_of(errors):
    """The Markdown of all families with their errors, the most general first."""
    return "\n\n".join(_section(family, [x for x in errors if family_of(x) is family]) for family in FAMILIES[::-1])


def family_of(error):
    """The first family that the error is in, or None."""
    for family in FAMILIES:
        if re.match(family.modules, error.path) and all(re.search(family.texts, text) for text in error.full_texts):
            return family
    return None


def _section(family, errors):
    paths = {}  # of the line that shows an error
    for error in errors:
        shown = f"`{error.full_texts[0]}`"
        if len(error.names) > 1:
            shown = f"{', '.join(f'`{name}`' for name in error.names)}: `{error.text}`"
        paths.setdefault(f"- {shown}  \n  {error.kind} in ", {})[f"`{error.path}`"] = None
    lines = [line + ", ".join(paths[line]) for line in sorted(paths)]
    return "\n".join([f"## {family.title}\n\n{family.advice}\n", *lines])


def errors_of_package():
    modules = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
    return [error for module in modules for error in module.errors(modules)]


class Module:
    """A source file: its constants, its calls, and the exceptions that it makes, each with the functions around it."""

    def __init__(self, path):
        self.path = path.relative_to(PACKAGE).as_posix()
        self.constants, self.calls, self.exceptions = {}, {}, []
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
        self._visit(tree, ())

    def _visit(self, node, around):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                self.calls.setdefault(_called(child), []).append((child, around))
                if _makes_exception(node, child, around):
                    self.exceptions.append((child, around))
            scope = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            self._visit(child, (*around, child) if scope else around)

    def errors(self, modules):
        """The errors whose text stands here. An exception that is only passed on has none."""
        for call, around in self.exceptions:
            kind = ast.unparse(call.func) if _called(call) != "__init__" else around[-2].name
            texts = _texts(call.args[0], self, around, modules)
            yield from self._errors(call, around, kind, texts)
        for wrapper in WRAPPERS:
            for call, around in self.calls.get(wrapper, ()):
                if not isinstance(call.func, ast.Name):  # pytest.fail
                    continue
                name, expected, _, *error = call.args
                pairs = product(*(_texts(x, self, around, modules) for x in (name, expected)))
                kind = ast.unparse(error[0]) if error else "ValueError"
                yield from self._errors(call, around, kind, [f"{x}: expected {y}, got {ANY}" for x, y in pairs])

    def _errors(self, call, around, kind, texts):
        names = {}  # of arguments, by the text behind the colon
        for text in texts:
            name, colon, rest = text.partition(": ")
            if colon and " expected" not in name and len(name) < 60:
                names.setdefault(rest, {})[name] = None
            elif re.search(r"\w", text):
                names.setdefault(text, {})
        for text in names:
            yield Error(self.path, call.lineno, kind, tuple(names[text]), text)


def _called(call):
    return getattr(call.func, "id", getattr(call.func, "attr", None))


def _makes_exception(parent, call, around):
    """Whether the call is raised, or returned to be raised, or gives a class of exceptions its text."""
    name = _called(call) or ""
    if name == "__init__":
        return len(around) > 1 and around[-2].name.endswith("Error")
    if not call.args or name.lstrip("_")[:1].islower():
        return False
    return isinstance(parent, ast.Raise) or (isinstance(parent, ast.Return) and name.endswith("Error"))


def _texts(node, module, around, modules, seen=frozenset()):
    """The texts that an expression may be. `seen` are the names on the way to it, which a check may give to itself."""

    def texts(part):
        return _texts(part, module, around, modules, seen)

    if isinstance(node, ast.Constant):
        return [str(node.value) if isinstance(node.value, str) or not around else ANY]
    if isinstance(node, ast.FormattedValue):
        return texts(node.value)
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.JoinedStr):
        joined = [""]
        for part in node.values:
            is_given = any(re.search(r"\bgot $|, got", text) for text in joined)  # by the caller
            ends = [ANY] if is_given and not isinstance(part, ast.Constant) else texts(part)
            if len(joined) * len(ends) > MOST_TEXTS:
                ends = [ANY]
            joined = [a + b for a, b in product(joined, ends)]
        return joined
    if isinstance(node, ast.Name) and (around, node.id) not in seen:
        values = list(_values(node.id, module, around, modules))
        seen = seen | {(around, node.id)}
        found = [text for value, *place in values for text in _texts(value, *place, modules, seen)]
        return list(dict.fromkeys(found)) or [ANY]
    return [ANY]


def _values(name, module, around, modules):
    """(expression, module, functions around it) of what a name may be bound to."""
    functions = [x for x in around if isinstance(x, ast.FunctionDef)]
    for function in functions[-1:]:
        yield from _arguments(name, function, module, around, modules)
        for node in ast.walk(function):
            if isinstance(node, (ast.For, ast.comprehension)):
                yield from ((value, module, around) for value in _elements(name, node.target, node.iter))
            if isinstance(node, ast.Assign):
                yield from ((value, module, around) for value in _elements(name, node.targets[0], None, node.value))
    for other in modules if name.isupper() else ():
        if isinstance(other.constants.get(name), ast.Constant):
            yield other.constants[name], other, ()
            return


def _arguments(name, function, module, around, modules):
    """What a parameter is by default, and in the calls of its function: in its module, or if not private in all."""
    parameters = [x.arg for x in function.args.posonlyargs + function.args.args]
    defaults = dict(zip(parameters[::-1], function.args.defaults[::-1]))
    is_method = parameters[:1] == ["self"]
    if name not in parameters or function.name == "__init__":
        return
    if name in defaults:
        yield defaults[name], module, around
    index = parameters.index(name) - is_method
    for other in [module] if function.name.startswith("_") else modules:
        for call, around_call in other.calls.get(function.name, ()):
            keywords = [x.value for x in call.keywords if x.arg == name]
            given = keywords or call.args[index : index + 1]
            if given and not any(isinstance(x, ast.Starred) for x in call.args[: index + 1]):
                yield given[0], other, around_call


def _elements(name, target, iterable, value=None):
    """What a name is bound to by a loop over literals, or by an assignment."""
    if isinstance(target, ast.Name):
        if target.id == name:
            yield from [value] if value is not None else getattr(iterable, "elts", ())
        return
    for i, part in enumerate(getattr(target, "elts", ())):
        if not isinstance(part, ast.Name) or part.id != name:
            continue
        rows = [value] if value is not None else getattr(iterable, "elts", ())
        if isinstance(iterable, ast.Call) and _called(iterable) == "zip" and i < len(iterable.args):
            yield from getattr(iterable.args[i], "elts", ())
        for row in rows:
            if i < len(getattr(row, "elts", ())):
                yield row.elts[i]
