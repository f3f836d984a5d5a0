"""Fill in the parts of the pages that are made from the code, between `<!-- generated: NAME -->` and its end.

    python docs/tables.py           write them
    python docs/tables.py --check   say which pages are not current, and return 1 if there is one

tests/test_docs.py checks the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from printed import table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).parent
WORDS = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "SecretStr": "secret text",
    "JsonValue": "any JSON",
    "Budget": "budget",
    "PipelineInput": "input",
    "Price": "price",
    "StepDefinition": "step",
    "WaitPolicy": "wait policy",
}
"""Types of fields, in words."""
PART = re.compile(r"^(<!-- generated: (\w+) -->\n).*?^(<!-- end of generated -->)$", re.DOTALL | re.MULTILINE)


def settings() -> str:
    """Return the settings of the package."""
    from prefect_crew.settings import CrewSettings

    fields = CrewSettings.model_fields.items()
    rows = ((f"`PREFECT_INTEGRATIONS_CREW_{name.upper()}`", *_described(field)) for name, field in fields)
    return table(("setting", "type", "default", "meaning"), rows)


def block_fields() -> str:
    """Return the fields of the block of a crew."""
    from prefect_crew.blocks import DeployedCrew

    return _fields_of({name: field for name, field in DeployedCrew.model_fields.items() if field.description})


def pipeline_file() -> str:
    """Return the fields of a pipeline's file: a table for each kind of object in it."""
    from prefect_crew.pipelines.definition import PipelineDefinition, PipelineInput, StepDefinition

    parts = [("The whole file", PipelineDefinition), ("An input", PipelineInput), ("A step", StepDefinition)]
    return "\n\n".join(f"### {title}\n\n{_fields_of(model.model_fields)}" for title, model in parts)


def _fields_of(fields: Mapping[str, FieldInfo]) -> str:
    rows = ((f"`{name}`", *_described(field)) for name, field in fields.items())
    return table(("field", "type", "default", "meaning"), rows)


def _described(field: FieldInfo) -> tuple[str, str, str]:
    """Return the type with its bounds, the default and the description of a field."""
    bounds = [f"{sign} {value:g}" for part in field.metadata for sign, value in _bounds(part)]
    return ", ".join([_type_of(field.annotation), *bounds]), _default_of(field), field.description or ""


def _bounds(part: Any) -> Iterator[tuple[str, float]]:
    for kind, sign, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (MinLen, "length ≥", "min_length")):
        if isinstance(part, kind):
            yield sign, getattr(part, name)


def _type_of(annotation: Any) -> str:
    """Return a type in words that an author of YAML knows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_type_of(part) for part in args if part is not NoneType)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (list, tuple):
        return f"list of {_type_of(args[0])}"
    if origin is dict:
        return f"mapping of name to {_type_of(args[1])}"
    return WORDS[getattr(annotation, "__name__", str(annotation))]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "each field's"
    return "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def faults() -> str:
    """Return the faults of the dev server, and where each can be."""
    from prefect_crew.devserver._faults import FAULTS, HTTP_PLACES, WEBHOOK_PLACES

    everywhere: dict[tuple[str, ...], str] = {HTTP_PLACES: "every request", WEBHOOK_PLACES: "every webhook"}
    places = f"Places: {', '.join(f'`{place}`' for place in (*HTTP_PLACES, *WEBHOOK_PLACES))}.\n\n"
    return places + table(
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
    return table(
        ("field", "default", "meaning"),
        (
            (
                f"`{name}`",
                "required" if name in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`",
                field.get("description", ""),
            )
            for name, field in part["properties"].items()
        ),
    )


def command_line() -> str:
    """Return the help of all commands."""
    from prefect_crew.cli.app import app

    # Without the list of the commands at its beginning.
    text = "### " + app.generate_docs(heading_level=2).partition("\n### ")[2]
    return text.replace("```console", "```text")  # usage, and no command to try


PARTS: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "block_fields": block_fields,
    "pipeline_file": pipeline_file,
    "faults": faults,
    "crew_script": crew_script,
    "command_line": command_line,
}


def filled(text: str) -> str:
    """Return a page with its generated parts as the code has them now."""
    return PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]().strip()}\n\n{match[3]}", text)


def main(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    stale = 0
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        current = filled(text)
        if current == text:
            continue
        if "--check" in arguments:
            sys.stdout.write(f"{path.relative_to(DOCS.parent)} is not current: python docs/tables.py\n")
            stale = 1
        else:
            path.write_text(current, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
