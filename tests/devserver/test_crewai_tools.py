"""A client that nobody here wrote: the tool with which CrewAI's crews call other crews."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer

pytestmark = pytest.mark.crewai

SCRIPT = """
name: state-of-ai
inputs: [year]
tasks:
  - name: report
    agent: Analyst
    output: "The state of AI in {{ year }}"
    fail: "{% if year == '1890' %}no AI yet{% endif %}"
"""


def tool_for(server: CrewServer) -> Any:
    """Return the tool with the inputs that the server names, as the API's pages have it: a list of names."""
    from crewai_tools import InvokeCrewAIAutomationTool
    from pydantic import Field

    named = httpx.get(f"{server.url}/inputs", headers=server.headers).json()["inputs"]
    return InvokeCrewAIAutomationTool(
        crew_api_url=server.url,
        crew_bearer_token=server.token,
        crew_name="State of AI Report",
        crew_description="Reports on the state of AI in a year.",
        crew_inputs={name: Field(..., description=f"The {name} of the report") for name in named},
    )


def test_it_runs_a_crew() -> None:
    with CrewServer(SCRIPT, response_format="union") as server:
        tool = tool_for(server)
        assert tool.run(year="2025").startswith("The state of AI in 2025")
        assert (server.kickoffs, server.requests["status"] <= 2) == (1, True)
        failed = tool.run(year="1890")
        assert failed.startswith("Error: Crew task failed. Response: {")
        assert "no AI yet" in failed
        server.token = "rotated"
        assert tool.run(year="2025").startswith("Error: Failed to kickoff crew. Response: {'error': 'Unauthorized'")
