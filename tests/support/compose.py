"""The starter project's compose.yaml, read as Compose reads it, as far as it can be held to its word without Docker."""

from __future__ import annotations

import re
from typing import Any

import yaml

from support.deployed import ROOT

FOLDER = ROOT / "deployments" / "starter"
PATH = FOLDER / "compose.yaml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(:[?-][^}]*)?\}")


def read() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


def services() -> dict[str, dict[str, Any]]:
    return read()["services"]


def environment(service: str, **values: str) -> dict[str, str]:
    """Return a service's environment, with `${NAME:?…}` replaced by these values."""
    declared: dict[str, str] = services()[service].get("environment", {})
    return {name: _VARIABLE.sub(lambda found: values[found["name"]], str(value)) for name, value in declared.items()}
