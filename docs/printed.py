"""The pages as `prefect-crew docs` prints them: with included files, signatures and docstrings, and names as links.

hatch_build.py writes them into the wheel. In a clone the command and the site (docs/hooks.py) call these functions.
The code is read and not imported, so that a build needs nothing but Python.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"^::: ([\w.]+)\n(?:    .*\n)*", re.MULTILINE)
UNSEEN = re.compile(r"^(<!-- .*? -->|\[\]\(\)\{#.*\}|!\[[^\]]*\]\(\S*\))\n\n?", re.MULTILINE)
"""Comments, anchors and pictures, each a line of its own."""
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def pages() -> dict[str, Path]:
    """Return the files of the pages by their names. internals.md is for developers, who have the repository."""
    docs = ROOT / "docs"
    paths = {path.relative_to(docs).with_suffix("").as_posix(): path for path in docs.rglob("*.md")}
    return {name: path for name, path in paths.items() if name != "internals"}


def printed(name: str) -> str:
    """Return a page as the command prints it."""
    text = with_files((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    text = REFERENCE.sub(lambda match: f"{_reference(match[1])}\n\n", f"{text}\n")
    text = UNSEEN.sub("", text)
    text = re.sub(r"\[([^]]+)\]\[[\w.]+\]", r"\1", text)  # links to names of Python
    text = re.sub(r"(?m)^(#+ .*?) \{ #[\w.]+ \}$", r"\1", text)
    text = without_links_outside(text, name)

    def link(match: re.Match[str]) -> str:
        return f"({posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))}{match[2] or ''})"

    return re.sub(r"(?<=\])\((?![a-z]+:)([^)\s#]+?)\.md(#[^)\s]*)?\)", link, text).strip() + "\n"


def without_links_outside(text: str, name: str) -> str:
    """Return a page with the text in place of each link to a file of the repository that is no page."""
    up = "../" * (name.count("/") + 1)
    return re.sub(rf"\[([^]]+)\]\({re.escape(up)}([^)\s#]+)(?:#[^)\s]*)?\)", r"\1 (`\2`)", text)


def with_files(text: str) -> str:
    """Return a page with the files of the repository that it includes, each without its title."""

    def included(match: re.Match[str]) -> str:
        without_title = (ROOT / match[1]).read_text(encoding="utf-8").partition("\n")[2]
        # A link to a file of its own folder is a link to no page.
        return re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"`\1`", without_title)

    return re.sub(r"^<!-- include: (\S+) -->$", included, text, flags=re.MULTILINE)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown."""
    lines = [list(head), *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---" for _ in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reference(path: str) -> str:
    """Return the signature, the text and the fields of a public name, or the text of a module."""
    if (module := _module(path)) is not None:
        return ast.get_docstring(module) or ""
    definition = _definition(path)
    parts = [f"### {definition.name}", *_described(definition)]
    if isinstance(definition, ast.ClassDef):
        if fields := [*_fields(definition)]:
            parts.append(table(("field", "what it is"), fields))
        for member in definition.body:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and _is_method(member):
                parts += [f"#### {definition.name}.{member.name}", *_described(member)]
    return "\n\n".join(parts)


@cache
def _module(path: str) -> ast.Module | None:
    file = ROOT.joinpath(*path.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.exists() else None


def _definition(path: str) -> Definition:
    """Return the class or the function of a name. A package imports its names from where they are defined."""
    name = path.rpartition(".")[2]
    module = _module(path.rpartition(".")[0]) or ast.Module([], [])
    for node in reversed(module.body):  # overloads come first
        if isinstance(node, Definition) and node.name == name:
            return node
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _definition(f"{node.module}.{name}")
    raise LookupError(f"There is no class and no function {path}, which a page names.")


def _described(definition: Definition) -> list[str]:
    text = [ast.get_docstring(definition) or ""]
    if isinstance(definition, ast.ClassDef):
        return text
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return [f"```python\n{definition.name}({ast.unparse(definition.args)}){returns}\n```", *text]


def _is_method(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    is_property = any("property" in ast.unparse(decorator) for decorator in function.decorator_list)
    return not function.name.startswith("_") and not is_property and bool(ast.get_docstring(function))


def _fields(model: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield each field of a model that has a description."""
    for field in model.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        for call in ast.walk(field):
            if isinstance(call, ast.keyword) and call.arg == "description" and isinstance(call.value, ast.Constant):
                yield f"`{ast.unparse(field.target)}`", cleandoc(str(call.value.value))
