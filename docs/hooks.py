"""What MkDocs does with a page of docs/ before it renders it.

<!-- file: x.yaml -->        of the tests: the name of the file becomes the title of the code block
<!-- include: README.md -->  a file of the repository, without its title
<!-- generate: faults -->    a table made from the code, by the function of that name below
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Link the repository, where pyproject.toml names one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config.repo_url = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["url"] or None
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text as MkDocs renders it."""
    markdown = re.sub(r"^<!-- include: (\S+) -->$", _included, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- generate: (\w+) -->$", lambda match: TABLES[match[1]](), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- file: (\S+) -->\n```(\w+)$", r'```\2 title="\1"', markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- (?:page|run|output|not run)\b.*?-->\n", "", markdown, flags=re.MULTILINE)


def _included(match: re.Match[str]) -> str:
    text = (ROOT / match[1]).read_text(encoding="utf-8").partition("\n")[2]  # without its title
    # What it links in its own folder is no page: its name will do.
    return re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"`\1`", text)


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

    everywhere = {HTTP_PLACES: "every request", WEBHOOK_PLACES: "every webhook"}
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
