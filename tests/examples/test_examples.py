"""The examples do what their README says: its lines are what these tests serve and run, without Prefect. The whole page
is done as a reader would by tests/test_docs.py."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import httpx
import pytest

from prefect_crew.devserver import CrewServer

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def commands(language: str = "bash") -> list[list[str]]:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


SERVED = {line[line.index("--port") + 1]: line[2] for line in commands() if line[:2] == ["prefect-crew", "serve"]}
RUN = {
    line[2].rpartition(":")[2]: dict(word.split("=", 1) for word in line if "=" in word)
    for line in commands()
    if line[:2] == ["prefect-crew", "run"]
}
EXPECTED: dict[str, tuple[list[str], str]] = {
    "examples/travel_crew.py:build": (["research", "write"], "## A day in Lisbon for families"),
    "examples/report_flow.py:ReportFlow": (["research", "report"], '{"title": "Report on tea"'),
    "examples/reviewed_crew.py:build": (["draft", "polish"], "## The final announcement of picnic"),
    "examples/reviewed_flow.py:ReviewedFlow": (
        ["begin", "write", "revise", "write", "send"],
        '{"letter": "## A letter',
    ),
}


def test_the_readme_serves_and_runs_every_example() -> None:
    assert set(SERVED.values()) == set(EXPECTED)
    assert set(RUN) == set(SERVED)
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert files == set(re.findall(r"\]\((\w+\.py)\)", README))


@pytest.mark.parametrize("port", SERVED, ids=[spec.rpartition("/")[2] for spec in SERVED.values()])
def test_an_example_runs_as_the_readme_says(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = SERVED[port]
    with (
        CrewServer(spec, response_format="union") as server,
        httpx.Client(base_url=server.url, headers=server.headers, trust_env=False) as client,
    ):
        inputs = client.get("/inputs").json()
        assert set(inputs["required_inputs"]) <= set(RUN[port]) <= set(inputs["inputs"])
        kickoff_id = client.post("/kickoff", json={"inputs": RUN[port]}).json()["kickoff_id"]
        answers = [False, True]  # a person, where one is asked, rejects once
        while (body := client.get(f"/status/{kickoff_id}").json())["state"] not in ("SUCCESS", "FAILED"):
            if body["state"] == "PENDING_HUMAN_INPUT":
                answer_as_the_readme(client, kickoff_id, body["task_id"], approve=answers.pop(0))
            time.sleep(0.02)
    tasks, start = EXPECTED[spec]
    assert (body["state"], body["error"]) == ("SUCCESS", None)
    assert [task["name"] for task in body["tasks"]] == tasks
    assert body["output"].startswith(start)
    assert body["token_usage"]["total_tokens"] > 0
    if "reviewed" in spec:
        assert answers == []
        assert "Name the place." in body["output"]


def answer_as_the_readme(client: httpx.Client, kickoff_id: str, task_id: str, *, approve: bool) -> None:
    (reject,) = [line for line in commands() if line[:3] == ["prefect-crew", "reviews", "reject"]]
    body = {
        "execution_id": kickoff_id,
        "task_id": task_id,
        "is_approve": approve,
        "human_feedback": reject[reject.index("--feedback") + 1],
    }
    answer = client.post("/resume", json=body)
    assert answer.status_code == 200, answer.text


def test_without_the_server_they_are_plain_crewai_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (code,) = [line[2] for line in commands() if line[:2] == ["python", "-c"]]
    monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    sys.modules.pop("travel_crew", None)
    exec(compile(code, "README.md", "exec"), {})
    assert "## A day in Lisbon for families" in capsys.readouterr().out
