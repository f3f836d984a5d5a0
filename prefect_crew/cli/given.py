"""Inputs on the command line: `-i name=value`, and a file of JSON or YAML."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli.exits import UsageError

__all__ = ["gather_inputs"]


def gather_inputs(pairs: Sequence[str], file: str | None) -> dict[str, Any]:
    """Return the inputs of a run: those of the file, with those of the pairs laid over them.

    Args:
        pairs: `name=value`; the value is text as it is, with all further equals signs.
        file: JSON or YAML holding one object; `-` reads standard input.

    Raises:
        UsageError: A pair is none, or names an input a second time.
        ConfigurationError: The file cannot be read, or holds no object, or a value cannot be sent.
    """
    given = {} if file is None else _read(file)
    named: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"-i {pair!r}: give an input as name=value.")
        if name in named:
            raise UsageError(f"-i {name}: this input is given twice.")
        named[name] = value
    inputs = {**given, **named}
    from prefect_crew.api.inputs import encode_inputs

    try:
        encode_inputs(inputs, as_json=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    return inputs


def _read(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"The inputs in {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"The inputs in {file} cannot be read: it is not text in UTF-8.") from None
    value = _parse(file, text)
    if not isinstance(value, dict):
        raise ConfigurationError(
            f'{file} holds no inputs: expected one object of names and values, such as {{"topic": "Lisbon"}}.'
        )
    return {str(name): item for name, item in cast("dict[Any, Any]", value).items()}


def _parse(file: str, text: str) -> Any:
    import yaml

    try:
        # JSON first: YAML reads most of it, but not tabs, and it takes some numbers for others.
        return json.loads(text)
    except ValueError as error:
        if file.lower().endswith(".json"):
            raise ConfigurationError(f"{file} is not JSON: {error}.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigurationError(f"{file} is neither JSON nor YAML: {problem}.") from None
