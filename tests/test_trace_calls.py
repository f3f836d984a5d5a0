"""How much of this package one run enters: as much as benchmarks/trace_calls.py counts, and no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prefect_crew import run_crew
from prefect_crew.crew import fast_polling
from prefect_crew.testing import CrewServerFactory

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from trace_calls import Trace, trace_run

MOST_FUNCTIONS = 255
"""The goal is 130. Whoever removes a step that a run passes lowers this; nobody raises it."""
MOST_TASKS = 7
"""The goal is 3."""


def names_of(trace: Trace) -> list[str]:
    return sorted(code.co_qualname for codes in trace.functions.values() for code in codes)


@pytest.mark.usefixtures("prefect_api")
def test_a_run_enters_no_more_functions_and_makes_no_more_asyncio_tasks(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()
    with fast_polling():
        run_crew(crew, {"text": "warm"})
        # Under load a request is repeated, which enters some more.
        traces = [trace_run(crew, {"text": "traced"}) for _ in range(3)]
    functions = min((names_of(trace) for trace in traces), key=len)
    assert len(functions) <= MOST_FUNCTIONS, functions
    tasks = min((trace.tasks for trace in traces), key=len)
    assert len(tasks) <= MOST_TASKS, tasks
    assert {"open_run", "wait_for_run"} <= {*functions}, "nothing was traced"
