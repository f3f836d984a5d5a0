"""The documentation without a network: the pages that came with the package, with the reference of Python."""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import BaseModel

from prefect_crew._text import with_guesses
from prefect_crew.cli import _output
from prefect_crew.exceptions import ConfigurationError

_REFERENCE = re.compile(r"^::: ([\w.]+)\n(?:    .*\n)*", re.MULTILINE)
_UNSEEN = re.compile(r"^(<!-- .*? -->|\[\]\(\)\{#.*\}|!\[[^\]]*\]\(\S*\))\n\n?", re.MULTILINE)
"""Comments, anchors and pictures, each a line of its own."""


def docs(
    page: Annotated[str | None, Parameter(name="PAGE", help="A name from the list, such as tutorial.")] = None, /
) -> None:
    """Print a page of the documentation, or list the pages."""
    every = pages()
    if page is None:
        for name, path in every.items():
            _output.put(f"{name:<28} {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
        _output.note("prefect-crew docs PAGE prints a page, such as: prefect-crew docs tutorial")
        return
    name = page.partition("#")[0].removesuffix(".md")
    matches = [name] if name in every else [each for each in every if each.rpartition("/")[2] == name]
    if not matches:
        names = {part for each in every for part in (each, each.rpartition("/")[2])}
        raise ConfigurationError(f"No page is named {with_guesses([name], names)}. To list them: prefect-crew docs")
    for match in matches:
        _output.put_markdown(page_text(match, every[match]))


def pages() -> dict[str, Path]:
    """Return the pages by their names, the first ones to read first."""
    package = Path(__file__).parents[1]
    folder = package / "docs"
    if not folder.is_dir():  # an editable install: hatch_build.py puts the same files into the wheel
        folder = package.parent / "docs"
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.md")}
    return {name: paths[name] for name in sorted(paths, key=lambda name: (name not in ("index", "tutorial"), name))}


def page_text(name: str, path: Path) -> str:
    """Return a page as this command prints it: with files and reference filled in, and links as names of pages.

    Args:
        name: The page's name.
        path: Its file.
    """
    text = fill_in(path.read_text(encoding="utf-8"), path.parents[name.count("/")])
    text = _REFERENCE.sub(lambda match: f"{_reference(match[1])}\n\n", f"{text}\n")
    text = _UNSEEN.sub("", text)
    text = re.sub(r"\[([^]]+)\]\[[\w.]+\]", r"\1", text)  # links to names of Python
    text = re.sub(r"(?m)^(#+ .*?) \{ #[\w.]+ \}$", r"\1", text)
    text = without_links_outside(text, name)

    def link(match: re.Match[str]) -> str:
        return f"({posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))}{match[2] or ''})"

    return re.sub(r"(?<=\])\((?![a-z]+:)([^)\s#]+?)\.md(#[^)\s]*)?\)", link, text).strip()


def without_links_outside(text: str, name: str) -> str:
    """Return a page with the text in place of each link to a file of the repository that is no page.

    Args:
        text: The page.
        name: The page's name, from which links are relative.
    """
    up = "../" * (name.count("/") + 1)
    return re.sub(rf"\[([^]]+)\]\({re.escape(up)}([^)\s#]+)(?:#[^)\s]*)?\)", r"\1 (`\2`)", text)


def fill_in(text: str, folder: Path) -> str:
    """Return a page with the files that it includes.

    Args:
        text: The page.
        folder: The folder of the documentation; included files are in it, or next to it in the repository.
    """

    def included(match: re.Match[str]) -> str:
        path = next(path for path in (folder / match[1], folder.parent / match[1]) if path.exists())
        without_title = path.read_text(encoding="utf-8").partition("\n")[2]
        # A link to a file of its own folder is a link to no page.
        return re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"`\1`", without_title)

    return re.sub(r"^<!-- include: (\S+) -->$", included, text, flags=re.MULTILINE)


def _reference(path: str) -> str:
    """Return the signature, the text and the fields of a public name."""
    module, _, name = path.rpartition(".")
    if path == "prefect_crew.exceptions":
        return inspect.getdoc(import_module(path)) or ""
    try:
        value = getattr(import_module(module), name)
    except ModuleNotFoundError as error:  # pytest, which `prefect_crew.testing` needs
        return f"### {name}\n\nIts text needs {error.name}, which is not installed here."
    is_class = inspect.isclass(value)
    parts = [f"### {name}", *_signature(name, value), inspect.getdoc(value) or ""]
    if is_class and issubclass(value, BaseModel):
        fields = ((f"`{name}`", field.description or "") for name, field in value.model_fields.items())
        parts.append(table(("field", "what it is"), fields))
    for method, member in dict(vars(value)).items() if is_class else ():
        function = inspect.unwrap(getattr(member, "__func__", member))
        if not method.startswith(("_", "model_")) and inspect.isfunction(function) and function.__doc__:
            parts += [f"#### {name}.{method}", *_signature(method, function), inspect.getdoc(function) or ""]
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, value: Any) -> list[str]:
    function = inspect.unwrap(getattr(value, "fn", value))
    if not inspect.isfunction(function):
        return []
    return [f"```python\n{name}{inspect.signature(function)}\n```"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown."""
    lines = [list(head), *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---" for _ in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
