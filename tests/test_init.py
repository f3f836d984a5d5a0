"""The public packages: what they export is there, typed, documented, and loaded when it is first used."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import prefect_crew
from support.environment import isolated

LAZY = ["prefect_crew", "prefect_crew.client", "prefect_crew.receiver"]


@pytest.mark.parametrize("package", LAZY)
def test_every_name_is_there_and_is_what_type_checkers_see(package: str):
    module = import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    assert {*module.__all__} <= {*dir(module)}
    seen: dict[str, str] = {}
    for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("prefect_crew."):
            names = [alias.name for alias in node.names]
            names = import_module(f"{node.module}").__all__ if names == ["*"] else names
            seen |= dict.fromkeys(names, f"{node.module}")
    del seen["lazy_names"]
    assert {*seen} == {*module.__all__}
    for name, home in seen.items():
        value = getattr(module, name)
        assert value is getattr(import_module(home), name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__name__ == name
            assert value.__doc__


LIGHT = """
import sys
import prefect_crew
before = set(sys.modules)
heavy = {"prefect_crew.flows", "prefect_crew.runs.start", "prefect_crew.devserver._server", "crewai", "polars"}
import prefect_crew.testing  # which pytest loads at every start
new = {name for name in set(sys.modules) - before if name.startswith(("prefect", "uvicorn"))}
print(sorted(heavy & set(sys.modules)), *new)
from prefect_crew import CrewClient, CrewFailedError, Webhooks
print("prefect" in sys.modules)
"""


def test_it_loads_nothing_before_its_time_and_has_no_other_names(tmp_path: Path):
    with pytest.raises(AttributeError, match="module 'prefect_crew' has no attribute 'nobody'"):
        getattr(prefect_crew, "nobody")  # noqa: B009 - a name that type checkers know is not there
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, env=isolated(tmp_path), check=True, timeout=60
    )
    assert done.stdout.split() == ["[]", "prefect_crew.testing", "False"]
