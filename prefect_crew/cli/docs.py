"""The documentation without a network: the pages that came with the package, and the tables that are made from it."""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

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
    """Return a page as this command prints it: tables and reference filled in, and links as names of pages.

    Args:
        name: The page's name.
        path: Its file.
    """
    text = fill_in(path.read_text(encoding="utf-8"), path.parents[name.count("/")])
    text = _REFERENCE.sub(lambda match: f"{_reference(match[1])}\n\n", f"{text}\n")
    text = _UNSEEN.sub("", text)
    text = re.sub(r"\[([^]]+)\]\[[\w.]+\]", r"\1", text)  # links to names of Python

    def link(match: re.Match[str]) -> str:
        return f"({posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))}{match[2] or ''})"

    return re.sub(r"(?<=\])\((?![a-z]+:)([^)\s#]+?)\.md(#[^)\s]*)?\)", link, text).strip()


def fill_in(text: str, folder: Path) -> str:
    """Return a page with the files that it includes and the tables that are made from the package.

    Args:
        text: The page.
        folder: That of the documentation; included files are in it, or next to it in the repository.
    """

    def included(match: re.Match[str]) -> str:
        path = next(path for path in (folder / match[1], folder.parent / match[1]) if path.exists())
        without_title = path.read_text(encoding="utf-8").partition("\n")[2]
        # A link to a file of its own folder is a link to no page.
        return re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"`\1`", without_title)

    text = re.sub(r"^<!-- include: (\S+) -->$", included, text, flags=re.MULTILINE)
    return re.sub(r"^<!-- generate: (\w+) -->$", lambda match: TABLES[match[1]](), text, flags=re.MULTILINE)


def _reference(path: str) -> str:
    """Return the signature, the text and the fields of a public name."""
    if path == "cyclopts":
        from prefect_crew.cli.app import app

        return app.generate_docs(heading_level=3)
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
        parts.append(_table(("field", "what it is"), fields))
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


# Tables made from the package


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---" for _ in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings() -> str:
    """Return the settings of the package."""
    from prefect_crew.settings import CrewSettings

    return _table(
        ("setting", "what it is"),
        (
            (f"`PREFECT_INTEGRATIONS_CREW_{name.upper()}`", field.description or "")
            for name, field in CrewSettings.model_fields.items()
        ),
    )


def block_fields() -> str:
    """Return the fields of the block of a crew."""
    from prefect_crew.blocks import DeployedCrew

    def default(field: FieldInfo) -> str:
        if field.is_required():
            return "required"
        value = field.get_default(call_default_factory=True)
        return "" if isinstance(value, BaseModel) else f"`{value!r}`"

    return _table(
        ("field", "default", "what it is"),
        (
            (f"`{name}`", default(field), field.description or "")
            for name, field in DeployedCrew.model_fields.items()
            if field.description
        ),
    )


def faults() -> str:
    """Return the faults of the dev server, and where each can be."""
    from prefect_crew.devserver._faults import FAULTS, HTTP_PLACES, WEBHOOK_PLACES

    everywhere: dict[tuple[str, ...], str] = {HTTP_PLACES: "every request", WEBHOOK_PLACES: "every webhook"}
    places = f"Places: {', '.join(f'`{place}`' for place in (*HTTP_PLACES, *WEBHOOK_PLACES))}.\n\n"
    return places + _table(
        ("name", "what the server does", "VALUE", "where"),
        (
            (
                f"`{name}`",
                kind.text,
                "" if kind.value is None else f"{kind.value:g}",
                everywhere.get(kind.places) or ", ".join(f"`{place}`" for place in kind.places),
            )
            for name, kind in FAULTS.items()
        ),
    )


def crew_script() -> str:
    """Return the fields of a script: a table for each kind of object in it."""
    from prefect_crew.devserver import CrewScript

    schema = CrewScript.model_json_schema()
    parts = [
        ("The whole", schema),
        ("`inputs`", schema["$defs"]["InputSpec"]),
        ("`tasks`", schema["$defs"]["TaskSpec"]),
        ("`steps` of a task", schema["$defs"]["StepSpec"]),
        ("`usage`", schema["$defs"]["TokenUsage"]),
    ]
    return "\n\n".join(f"### {title}\n\n{_fields(part)}" for title, part in parts)


def _fields(part: Mapping[str, Any]) -> str:
    required = part.get("required", [])
    return _table(
        ("field", "default", "what it is"),
        (
            (
                f"`{name}`",
                "required" if name in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`",
                field.get("description", ""),
            )
            for name, field in part["properties"].items()
        ),
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "block_fields": block_fields,
    "faults": faults,
    "crew_script": crew_script,
}
