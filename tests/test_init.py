"""The one public door."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import prefect_crew
from support.environment import isolated

SOURCE = ast.parse(Path(inspect.getfile(prefect_crew)).read_text(encoding="utf-8"))


def test_all_is_sorted_and_holds_nothing_twice():
    assert prefect_crew.__all__ == sorted(set(prefect_crew.__all__))


@pytest.mark.parametrize("name", prefect_crew.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str):
    value = getattr(prefect_crew, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert value.__module__.startswith("prefect_crew")
        assert value.__doc__


def test_what_type_checkers_see_is_what_there_is():
    (checked,) = [
        node for node in SOURCE.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name: f"{node.module}" for node in imports for alias in node.names}
    assert {*seen} == {*prefect_crew.__all__}
    homes = {name: f"prefect_crew.{home}" for name, home in prefect_crew._HOMES.items()}
    assert homes == seen


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'prefect_crew' has no attribute 'nobody'"):
        _ = prefect_crew.nobody  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]


def test_dir_shows_what_is_not_loaded_yet():
    assert {*prefect_crew.__all__} <= {*dir(prefect_crew)}


LIGHT = """
import sys
import prefect_crew
heavy = {"prefect_crew.flows", "prefect_crew.runs.kickoff", "prefect_crew.devserver.app", "crewai", "polars"}
print(sorted(heavy & set(sys.modules)))
from prefect_crew import CrewFailedError
print("prefect" in sys.modules)
"""


def test_it_loads_nothing_before_its_time(tmp_path: Path):
    told = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, env=isolated(tmp_path), check=True, timeout=60
    )
    assert told.stdout.split() == ["[]", "False"]
