"""How much of this package one run enters: as much as benchmarks/trace_calls.py counts, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "trace_calls.py"
MOST_FUNCTIONS = 210
"""The goal is 130. Whoever removes a step that a run passes lowers this. Three of them note the crew's version and let
a caller that waits for its turn close a run."""
MOST_TASKS = 3


@pytest.mark.programs
@pytest.mark.usefixtures("prefect_api")
def test_a_run_enters_no_more_functions_and_makes_no_more_asyncio_tasks(tmp_path: Path):
    # A process of its own, since the tests before this one leave state that a run of this process would pass through.
    file = tmp_path / "figures"
    environment = {**os.environ, "BENCHMARK_FIGURES": str(file)}
    run = subprocess.run(
        [sys.executable, BENCHMARK, "--list"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(file.read_text())
    assert "kick_off" in run.stdout, "nothing was traced"
    assert figures["functions"] <= MOST_FUNCTIONS, run.stdout
    assert figures["asyncio_tasks"] <= MOST_TASKS, run.stdout
