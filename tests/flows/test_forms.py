"""What Prefect's run form is made of: every parameter of every flow says what it is."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from support.deployed import ROOT


def flows_of(path: Path) -> list[Flow[..., Any]]:
    spec = importlib.util.spec_from_file_location(f"flows_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [one for one in vars(module).values() if isinstance(one, Flow)]


PATHS = [*sorted((ROOT / "flows").glob("*.py")), ROOT / "prefect_crew" / "operations.py"]
FLOWS = [pytest.param(one, id=one.name) for path in PATHS for one in flows_of(path)]


@pytest.mark.parametrize("flow", FLOWS)
def test_its_form_has_plain_values_that_are_described(flow: Flow[..., Any]):
    """A block as a parameter is stored with its secret starred out, and a class not at all."""
    schema = parameter_schema(flow).model_dump()
    assert schema["properties"]
    assert {name for name, field in schema["properties"].items() if not field.get("description")} == set()
    assert not schema.get("definitions"), "a parameter is an object of its own: give its parts, or a block's name"
    first = inspect.getdoc(flow.fn)
    assert first is not None
    assert first.split("\n\n")[0].endswith("."), "the description of the deployment is a sentence"
