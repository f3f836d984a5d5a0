"""The benchmarks run: all of them, with tiny numbers, which then mean nothing; and what one run may enter at most."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["run", "burst", "past", "rows", "worker", "pipeline"]


def run(*command: str, seconds: float) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["rows"], id="one", marks=pytest.mark.programs),
        pytest.param(PARTS, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_every_part_has_a_goal(parts: list[str]):
    *_, table = run("benchmarks/bench.py", "--small", *parts, seconds=280 if len(parts) == 1 else 880).split("\n\n")
    assert table.count(", met |") + table.count(", **missed** |") >= len(parts)


MOST_FUNCTIONS = 264
"""The goal is 130. Whoever removes a step that a run passes lowers this."""
MOST_TASKS = 4


@pytest.mark.programs
@pytest.mark.usefixtures("prefect_api")
def test_a_run_enters_no_more_functions_and_asyncio_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A process of its own, since the tests before this one leave state that a run of this process would pass through.
    monkeypatch.setenv("BENCHMARK_FIGURES", str(tmp_path / "figures"))
    listed = run("benchmarks/run.py", "--list", "--times", "1", "--seconds", "0.1", seconds=120)
    figures = json.loads((tmp_path / "figures").read_text())
    assert "kick_off" in listed, "nothing was traced"
    assert figures["functions"] <= MOST_FUNCTIONS, listed
    assert figures["asyncio_tasks"] <= MOST_TASKS, listed
