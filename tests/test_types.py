"""What type checkers know of the package, and that it is so when it runs."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import DeployedCrew, blocks, tasks
from prefect_crew.batches.options import BatchArguments, BatchOptions
from prefect_crew.batches.run import arun_batch

HERE = Path(__file__).parent
PROGRAMS = [HERE / "typed" / "right.py", HERE / "typed" / "wrong.py"]
Found = set[tuple[str, int]]


def checker(name: str) -> str:
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"needs {name} (make lint installs it)")
    return str(program)


def by_mypy(folder: Path) -> Found:
    command = [checker("mypy"), "--strict", "--python-executable", sys.executable, "--cache-dir", str(folder / "cache")]
    ran = subprocess.run([*command, *map(str, PROGRAMS)], cwd=folder, capture_output=True, text=True)
    places = re.findall(r"^(.*?\.py):(\d+): error", ran.stdout, re.MULTILINE)
    return {(Path(file).name, int(line)) for file, line in places}


def by_pyright(folder: Path) -> Found:
    (folder / "pyrightconfig.json").write_text(json.dumps({"include": ["*.py"], "typeCheckingMode": "strict"}))
    for program in PROGRAMS:
        (folder / program.name).write_text(program.read_text())
    command = [checker("pyright"), "--pythonpath", sys.executable, "--project", str(folder), "--outputjson"]
    ran = subprocess.run(command, capture_output=True, text=True)
    problems = json.loads(ran.stdout)["generalDiagnostics"]
    return {(Path(problem["file"]).name, problem["range"]["start"]["line"] + 1) for problem in problems}


@pytest.mark.programs
@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_a_strict_checker_refuses_each_mistake(check: Callable[[Path], Found], tmp_path: Path):
    marks = ("# wrong", "# pyright") if check is by_pyright else ("# wrong",)
    lines = PROGRAMS[1].read_text().splitlines()
    wrong = {("wrong.py", number) for number, line in enumerate(lines, 1) if line.endswith(marks)}
    assert len(wrong) >= 10
    assert check(tmp_path) == wrong


def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Return for each parameter of a function whether a call has to give it."""
    is_required = dict[str, bool]()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = getattr(tasks, parameter.annotation.removeprefix("Unpack[").removesuffix("]"))
            is_required |= {name: name in options.__required_keys__ for name in options.__annotations__}
        else:
            is_required[name] = parameter.default is parameter.empty
    return is_required


@pytest.mark.parametrize("like", ["_inputs", "_kickoff", "_resume", "_stop"])
def test_submit_and_map_have_the_parameters_of_their_task(like: str):
    own = parameters(getattr(tasks, "discover_inputs" if like == "_inputs" else f"{like[1:]}_crew").fn)
    assert parameters(getattr(tasks, like)) == {**own, "wait_for": False}
    assert parameters(getattr(tasks, f"{like}_waiting")) == {**own, "wait_for": True}
    assert parameters(getattr(tasks, f"{like}_state")) == {**own, "wait_for": False, "return_state": True}


@pytest.mark.parametrize("options", [tasks._WaitOptions, tasks._WaitNames])
def test_the_wait_has_the_options_of_its_function(options: Any):
    own = {"crew", "kickoff_id", "output_type"}
    assert {*options.__annotations__} - {"wait_for"} == {*inspect.signature(tasks.wait_for_crew.fn).parameters} - own


def test_options_of_a_batch_are_equal_in_three_places():
    signature = inspect.signature(arun_batch).parameters
    assert {*BatchArguments.__annotations__} == BatchOptions.model_fields.keys()
    for name, field in BatchOptions.model_fields.items():
        assert signature[name].default == field.default, name


def test_type_checkers_know_the_fields_of_a_block():
    module = ast.parse(Path(blocks.__file__).read_text())
    fields = next(part for part in ast.walk(module) if isinstance(part, ast.ClassDef) and part.name == "BlockFields")
    names = [
        part.target.id for part in fields.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    ]
    assert sorted(names) == sorted({*DeployedCrew.model_fields} - {"url", "token"})
