"""What prefect.yaml deploys, run against the scripted crews of this folder: no account, no network, no worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.testing.utilities import prefect_test_harness

from prefect_crew import run_deployed_crew, run_deployed_pipeline
from prefect_crew.devserver import CrewServer
from prefect_crew.operations import batch_file
from prefect_crew.testing import CrewServerFactory

PROJECT = Path(__file__).parents[1]
DEPLOYMENTS = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
PARAMETERS: dict[str, dict[str, Any]] = {one["name"]: one.get("parameters", {}) for one in DEPLOYMENTS}
FLOWS: dict[str, Any] = {"daily": run_deployed_crew, "report": run_deployed_pipeline, "topics": batch_file}


def run(deployment: str, **changes: Any) -> Any:
    """Run the flow of a deployment with its parameters, and return its result."""
    return asyncio.run(FLOWS[deployment](**{**PARAMETERS[deployment], **changes}))


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server for these tests alone."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def crews(crew_server: CrewServerFactory, instant_polling: None) -> dict[str, CrewServer]:
    """The crews of the folder flows/crews, each stored under its name. The two fixtures come with prefect-crew."""
    servers = {
        script.stem: crew_server(str(script), speed=50) for script in (PROJECT / "flows" / "crews").glob("*.yaml")
    }
    for name, server in servers.items():
        server.crew().save(name, overwrite=True)
    return servers


def test_the_scheduled_crew(crews: dict[str, CrewServer]):
    result = run("daily")
    assert "tea is older" in result.output
    assert crews["research"].kickoffs == 1


def test_the_pipeline(crews: dict[str, CrewServer]):
    result = run("report")
    assert "Reviewed for everyone" in result["review"].output
    assert [crews[step].kickoffs for step in ("research", "write", "review")] == [1, 1, 1]


def test_the_batch(crews: dict[str, CrewServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(PROJECT)
    output = tmp_path / "topics.jsonl"
    report = run("topics", export=str(output))
    assert report["completed"] == crews["research"].kickoffs == 3
    assert "coffee is older" in output.read_text(encoding="utf-8")
