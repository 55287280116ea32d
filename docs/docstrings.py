"""Docstrings for the API pages: argument names as lists, formulas as code.

A docstring has sections. `Args`, `Attributes` and `Raises` contain entries, `name, name: text`, which continue on
indented lines. `Returns` and `Source` contain text. Text after a section name and colon on the same line is text too.
`Example` contains a session of Python.
"""

import re

import griffe

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Source[\w ]*):(?: (.+))?$")
ENTRY = re.compile(r"([\w*][\w*, .]*): (.*)", re.DOTALL)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text):
    lines, shown = text.expandtabs().splitlines(), []
    in_list = False
    while lines:
        section = SECTION.match(lines[0])
        if not section:
            line = lines.pop(0)
            if line and not line.startswith(" "):
                in_list = line.startswith("- ")
            # Code inside a list item is indented deeper than the item's text.
            shown.append(f"    {line}" if in_list and line.startswith("    ") else _escaped(line))
            continue
        lines.pop(0)
        title, rest = section.groups()
        if rest:
            shown.append(f"**{title}:** {_escaped(rest)}")
            continue
        body = []
        while lines and (not lines[0].strip() or lines[0].startswith("    ")):
            body.append(lines.pop(0)[4:])
        shown += ["", f"**{title}**", "", *_body(title, body), ""]
    return "\n".join(shown)


def _body(title, lines):
    """Text unchanged; entries as a list, one per line; a session as a block of code."""
    if title == "Example":
        return ["```pycon", *"\n".join(lines).strip("\n").split("\n"), "```"]
    if title not in ("Args", "Attributes", "Raises"):
        return [_escaped(line) for line in lines]
    entries = []
    for line in filter(str.strip, lines):
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    return [f"- {_entry(entry)}" for entry in entries]


def _entry(text):
    entry = ENTRY.fullmatch(text)
    if not entry:
        return _escaped(text)
    names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
    return f"{names}: {_escaped(entry[2])}"


def _escaped(line):
    """Escape Markdown: brackets and stars are mathematics here. Code is unchanged."""
    if line.startswith("    "):
        return line
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
