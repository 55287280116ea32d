"""Site pages and files from outside of docs/. README, CONTRIBUTING, CHANGELOG and the notebooks become pages, and files
of the repository (plots, tables, code) to which pages link become files of the site. The same links work on GitHub.
"""

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from error_pages import errors_of_package, page_of
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from notebook_pages import mathml, pages_of

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDER = "repository"  # folder of the site for files that are not pages
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ERRORS = re.compile(r"<!-- every error of the package -->.*", re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")


def on_files(files, config):
    """Add the pages, and all files to which they link."""
    docs = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
    notebooks = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("notebooks/*.ipynb")}
    pages = pages_of(list(notebooks.values()))
    known, new = {*docs, *notebooks}, [*docs, *notebooks, *PAGES]
    while new:
        path = new.pop()
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to {path}, which is no file of the repository")
        if path in notebooks:
            _add_notebook(path, *pages[notebooks[path]], files, config)
        elif path not in docs:
            files.append(File.generated(config, _site_uri(path), abs_src_path=str(ROOT / path)))
        linked = _linked(path) - known if path.endswith((".md", ".ipynb")) else set()
        known |= linked
        new += linked
    return files


def _add_notebook(path, markdown, pictures, files, config):
    files.append(File.generated(config, _site_uri(path), content=markdown))
    for link, picture in pictures.items():
        files.append(File.generated(config, _site_uri(_linked_path(path, link)), content=picture))


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of the page for the site, and add what is written from the source."""
    uri = page.file.src_uri
    markdown = ERRORS.sub(lambda match: page_of(errors_of_package()), markdown)

    def relink(match):
        path = _linked_path(_repository_path(uri), match[2])
        if path is None:
            return match[0]
        return f"{match[1]}{relpath(_site_uri(path), PurePosixPath(uri).parent)}{match[3]}"

    return "".join(part if CODE.fullmatch(part) else LINK.sub(relink, part) for part in CODE.split(markdown))


def on_page_content(html, page, config, files):
    return mathml(html)


def _linked(path):
    """The files to which a page or the text of a notebook links."""
    text = (ROOT / path).read_text()
    if path.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = CODE.sub("", text)
    return {_linked_path(path, match[2]) for match in LINK.finditer(text)} - {None}


def _linked_path(path, link):
    """Path from the root of the repository. None for an external link."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return normpath((PurePosixPath(path).parent / link).as_posix())


def _site_uri(path):
    if path in PAGES:
        return PAGES[path]
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    is_page = path.startswith("docs/") and path.endswith(".md")
    return path.removeprefix("docs/") if is_page else f"{FOLDER}/{path}"


def _repository_path(uri):
    for path, page in PAGES.items():
        if uri == page:
            return path
    if uri.startswith("notebooks/"):
        return uri.removesuffix(".md") + ".ipynb"
    return uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}"
