"""Real CrewAI code, the crew server, our client and a real Prefect server at once. test_docs.py runs the README."""

from pathlib import Path
from typing import Any

import pytest

from prefect_crew import run_crew
from prefect_crew.devserver import CrewServer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.crewai
@pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("spec", "inputs", "title", "tasks"),
    [
        (
            "travel_crew.py:build",
            {"topic": "Lisbon", "audience": "families"},
            "## A day in Lisbon for families",
            ["research", "write"],
        ),
        ("report_flow.py:ReportFlow", {"topic": "tea", "sections": 1}, "Report on tea", ["research", "report"]),
    ],
    ids=["crew", "flow"],
)
def test_real_code_runs_from_prefect(spec: str, inputs: dict[str, Any], title: str, tasks: list[str]) -> None:
    with CrewServer(f"{EXAMPLES}/{spec}") as server:
        result = run_crew(server.crew(), inputs)
        assert server.kickoffs == 1
        usage = server.runs[0].usage
    assert title in f"{result.output} {result.data}"
    assert [task.name for task in result.tasks] == tasks
    assert all(task.execution_time is not None for task in result.tasks)
    assert usage is not None
    assert usage.total_tokens
