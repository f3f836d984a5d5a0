"""Finding and reading crew scripts, with errors that say where.

prefect_crew.server.scripts.load_script("travel")       a crew of this package
prefect_crew.server.scripts.load_script("my-crew.yaml")
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from prefect_crew.server.scripted import CrewScript

__all__ = ["ScriptError", "bundled_scripts", "load_script", "parse_script", "schema"]

_CREWS = files("prefect_crew.server") / "crews"


class ScriptError(ValueError):
    """A script that cannot be used. The text names the file, the line, the field and what is wrong."""


def bundled_scripts() -> list[str]:
    """Return the names of the crews that come with this package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _CREWS.iterdir() if entry.name.endswith(".yaml"))


def load_script(path_or_name: str | os.PathLike[str]) -> CrewScript:
    """Read a script from a file, or one of this package's by its name.

    Raises:
        ScriptError: There is no such file or name, or what it holds is not a crew.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    if name in bundled_scripts() and not path.is_file():
        return parse_script((_CREWS / f"{name}.yaml").read_text(encoding="utf-8"), source=f"{name}.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        known = ", ".join(bundled_scripts())
        raise ScriptError(f"Cannot read the crew {name}: {reason}. Give a YAML file, or one of: {known}.") from error
    return parse_script(text, source=name)


def parse_script(text: str, *, source: str = "script") -> CrewScript:
    """Read a script from text. `source` is what errors call it.

    Raises:
        ScriptError: Not YAML, or not a crew.
    """
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ScriptError(f"{source}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise ScriptError(f"{source}:1:1: a crew is a mapping with a name and tasks, not {type(value).__name__}")
    try:
        if twice := _repeated(node):
            line, column = _position(twice)
            raise ScriptError(f"{source}:{line}:{column}: {_plain(twice.value)} is given twice")
        return CrewScript.model_validate(value)
    except ValidationError as error:
        raise ScriptError("\n".join(_lines(error, node, source))) from None
    except RecursionError:
        raise ScriptError(f"{source}:1:1: something in it holds itself, or is nested too deep") from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a crew script, as `crew.schema.json` publishes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CrewScript.model_json_schema()}


def _lines(error: ValidationError, root: yaml.Node | None, source: str) -> list[str]:
    said: dict[tuple[int, int, str], list[str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = [part for part in item["loc"] if part not in _UNION_ARMS]
        mark = _find(root, path)
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in path).lstrip(".")
        message = item["msg"].removeprefix("Value error, ")
        message = "there is no such field" if item["type"] == "extra_forbidden" else message
        said.setdefault((*mark, name), []).append(message)
    return [
        # Several messages about one place are the alternatives of a union.
        f"{source}:{line}:{column}: {f'{name}: ' if name else ''}{' or '.join(dict.fromkeys(messages))}"
        for (line, column, name), messages in sorted(said.items())
    ]


def _plain(key: str) -> str:
    return key if key.isprintable() else ascii(key)


_UNION_ARMS = ("str", "float")
"""What pydantic puts into an error's place for the alternatives of a union; nobody's field has these names."""


def _find(node: yaml.Node | None, path: list[Any]) -> tuple[int, int]:
    """Follow a path into the YAML as far as it goes; return the line and column there, from 1."""
    for part in path:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            child = next((value for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
        if child is None:
            break
        node = child
    return _position(node)


def _position(node: yaml.Node | None) -> tuple[int, int]:
    return (node.start_mark.line + 1, node.start_mark.column + 1) if node is not None else (1, 1)


def _repeated(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """Return a key that stands twice in one mapping: YAML would silently take the last."""
    children: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    return key
                seen.add(key.value)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _repeated(child))), None)


if __name__ == "__main__":
    target = Path(__file__).with_name("crew.schema.json")
    target.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
