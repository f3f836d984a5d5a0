"""What type checkers know of the package, and that it is so when it runs."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.run import aplan_batch, arun_batch

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


@pytest.mark.parametrize("function", [arun_batch, aplan_batch])
def test_options_of_a_batch_are_those_of_its_functions(function: Callable[..., object]):
    signature = inspect.signature(function).parameters
    for name, field in BatchOptions.model_fields.items():
        if function is arun_batch or name in signature:
            assert signature[name].default == field.default, name
