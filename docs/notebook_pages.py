"""Notebooks as pages of the site: they run when the site is built, and their text, code and outputs become Markdown."""

import re
from base64 import b64decode
from functools import cache
from html import unescape
from subprocess import DEVNULL
from textwrap import indent

import nbformat
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from nbclient import NotebookClient

OPTIONS = ["--InlineBackend.figure_formats={'retina'}"]  # twice the pixels, for screens that have them
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def pages_of(paths):
    """{path: (Markdown page of the notebook, {link: bytes} of its pictures)}.

    One runs at a time: two kernels that start at once can choose the same port.
    """
    return {path: _page_of(path, path.read_text()) for path in paths}


@cache  # a server builds the site again whenever any page changes
def _page_of(path, text):
    notebook = nbformat.reads(text, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    # A cell's own errors are raised. The kernel's log, which tells of its port, goes nowhere.
    NotebookClient(notebook, timeout=600, resources=folder, extra_arguments=OPTIONS).execute(stderr=DEVNULL)
    parts, pictures, heading = [], {}, path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            heading = (re.findall(r"^#+ (.*)", cell.source, flags=re.MULTILINE) or [heading])[-1]
            continue
        code = f"```python\n{cell.source}\n```"
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
        parts.append(f'??? example "Show the code"\n\n{indent(code, "    ")}' if hidden else code)
        parts += [_printed(cell)] if _printed(cell) else []
        for i, output in enumerate(cell.outputs):
            if png := output.get("data", {}).get("image/png"):
                link = f"{path.stem}/{cell.id}-{i}.png"
                pictures[link] = b64decode(png)
                width = output.metadata["image/png"]["width"]
                parts.append(f"![Plot: {heading}]({link}){{ width={width} }}")
    return "\n\n".join(parts), pictures


def _printed(cell):
    """What a cell printed, or the value of its last line, as a block of text."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    text = "".join(text for text, output in zip(texts, cell.outputs) if "image/png" not in output.get("data", {}))
    return f"```{{ .text .output }}\n{text.rstrip()}\n```" if text.strip() else ""


def mathml(html):
    """The page with its formulas as MathML, which browsers draw without scripts."""

    def formula(match):
        if match[1] == "span":
            return convert(unescape(match[2]))
        return f'<div class="formula">{convert(unescape(match[2]), display="block")}</div>'

    drawn = MATH.sub(formula, html)
    if 'class="arithmatex"' in drawn:
        raise PluginError("a formula has a form that notebook_pages.py does not know")
    return drawn
