"""Real CrewAI code, the crew server, our client and a real Prefect server at once: the README's lines of Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefect_crew import run_crew
from prefect_crew.devserver import CrewServer

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("response_format", ["documented", "union"])
def test_a_real_crew_runs_from_prefect(response_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "run_crew" in block)
    with CrewServer(
        f"{ROOT}/examples/travel_crew.py:build", token="local-token", response_format=response_format
    ) as server:
        code = code.replace("http://127.0.0.1:8141", server.url)
        exec(compile(code, "README.md", "exec"), {})
        assert server.kickoffs == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "## A day in Lisbon for families"
    assert [line.rpartition(" ")[0] for line in said[-3:-1]] == ["research Travel researcher", "write Guide writer"]
    assert all(float(line.rpartition(" ")[2]) > 0 for line in said[-3:-1])
    # The documented response_format has no word for usage.
    assert said[-1] == "None" if response_format == "documented" else re.search(r"total_tokens=[1-9]", said[-1])


@pytest.mark.usefixtures("prefect_api")
def test_a_real_flow_s_structured_result_arrives(tmp_path: Path) -> None:
    with CrewServer(f"{ROOT}/examples/report_flow.py:ReportFlow", response_format="union") as server:
        result = run_crew(server.crew(), {"topic": "tea", "sections": 1})
        assert result.data["title"] == "Report on tea"
        assert len(result.data["sections"]) == 1
        assert [task.name for task in result.tasks] == ["research", "report"]
