"""Research, write, review: as steps and by hand, and what a retry pays for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer, Outcome, ProgramError, Run, load_program
from support.deployed import ROOT, load_flow
from support.prefect_server import environment

SaveCrew = Callable[..., CrewServer]
Crews = dict[str, CrewServer]
WAYS = ["report_pipeline", "report_by_hand"]


class FailsFirst:
    """The review crew, whose first run fails."""

    name = "review"

    def __init__(self) -> None:
        self._crew = load_program(str(ROOT / "flows" / "crews" / "review.yaml"), speed=10)
        self._runs = 0

    def inputs(self) -> list[CrewInput]:
        return self._crew.inputs()

    async def execute(self, run: Run) -> Outcome:
        self._runs += 1
        if self._runs == 1:
            raise ProgramError("the editor is out for lunch")
        return await self._crew.execute(run)


def kickoffs(crews: Crews) -> dict[str, int]:
    return {name: server.kickoffs for name, server in crews.items()}


@pytest.mark.parametrize("way", WAYS)
async def test_each_crew_gets_what_the_one_before_it_gave(report_crews: Crews, way: str):
    text = await load_flow(f"report_pipeline.py:{way}")("tea", audience="beginners")
    assert "# tea" in text
    assert "For beginners" in text
    assert "The numbers on tea doubled" in text
    assert "Reviewed for beginners" in text
    assert kickoffs(report_crews) == {"research": 1, "write": 1, "review": 1}


@pytest.mark.parametrize("way", WAYS)
async def test_a_retry_of_the_flow_run_starts_only_what_failed(report_crews: Crews, save_crew: SaveCrew, way: str):
    report_crews["review"] = save_crew("review", FailsFirst())
    flow = load_flow(f"report_pipeline.py:{way}").with_options(retries=1, retry_delay_seconds=0)
    assert "Reviewed for everyone" in await flow("coffee")
    assert kickoffs(report_crews) == {"research": 1, "write": 1, "review": 2}


async def test_the_flow_run_says_which_step_failed(report_crews: Crews, save_crew: SaveCrew):
    save_crew("review", FailsFirst())
    state = await load_flow("report_pipeline.py:report_pipeline")("tea", return_state=True)
    assert state.is_failed()
    assert "review" in state.message
    assert "the editor is out for lunch" in state.message


def test_the_weekly_one_is_retried_once_as_its_deployment_says():
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    (weekly,) = [one for one in deployments if one["name"] == "weekly"]
    with environment(weekly["work_pool"]["job_variables"]["env"]):
        flow = load_flow("report_pipeline.py:report_pipeline")
    assert (flow.retries, flow.retry_delay_seconds) == (1, 60)
