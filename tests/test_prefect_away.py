"""A Prefect API that does not answer: each public function that needs it raises PrefectAwayError."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow, unmapped

import prefect_crew as pc
from prefect_crew.flows import run_deployed_crew
from prefect_crew.operations import recover
from prefect_crew.testing import CrewServerFactory
from support.proxy import Proxy

INPUTS = {"text": "a"}


def batch(crew: pc.DeployedCrew, folder: Path) -> Any:
    return pc.run_batch(crew, [INPUTS], name="b", export=str(folder / "b.jsonl"))


CALLS: dict[str, Callable[[pc.DeployedCrew, Path], Any]] = {  # a synchronous function calls its asynchronous twin
    "run_crew": lambda crew, _: pc.run_crew(crew, INPUTS),
    "run_crew of a block": lambda *_: pc.run_crew("travel", INPUTS),
    "get_result": lambda *_: pc.get_result("daily"),
    "trigger": lambda crew, _: crew.trigger(INPUTS),
    "resume": lambda crew, _: pc.CrewRun(crew, "k1").resume("Yes.", approve=True),
    "run_pipeline": lambda crew, _: pc.run_pipeline([pc.CrewStep("a", crew, INPUTS)]),
    "plan_pipeline": lambda *_: pc.plan_pipeline([pc.CrewStep("a", "travel", INPUTS)]),
    "run_batch": batch,
    "plan_batch": lambda *_: pc.plan_batch("travel", [INPUTS]),
    "to_deployment": lambda *_: pc.crew_flow("travel").to_deployment(),
    "deploy": lambda *_: pc.crew_flow("travel").deploy(work_pool_name="crews"),
    "serve": lambda *_: pc.crew_flow("travel").serve(),
    "recover": lambda *_: asyncio.run(recover.fn(uuid4())),
    "discover_inputs": lambda crew, _: pc.discover_inputs(crew),
    "kickoff_crew": lambda crew, _: pc.kickoff_crew(crew, INPUTS),
    "wait_for_crew": lambda crew, _: pc.wait_for_crew(crew, "k1"),
    "resume_crew": lambda crew, _: pc.resume_crew(crew, "k1", approve=True),
    "stop_crew": lambda crew, _: pc.stop_crew(crew, "k1"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_says_that_prefect_is_away(name: str, away: str, crew_server: CrewServerFactory, tmp_path: Path):
    server = crew_server("echo")
    with pytest.raises(pc.PrefectAwayError, match=r"does not answer .+ prefect-crew doctor\.$") as caught:
        CALLS[name](server.crew(), tmp_path)
    assert away in str(caught.value)
    assert server.requests.keys() <= {"inputs"}, "nothing was started or answered"


IN_A_FLOW: dict[str, Callable[[pc.DeployedCrew], Any]] = {
    "submit": lambda crew: pc.resume_crew.submit(crew, "k1", approve=True).result(),
    "map": lambda crew: pc.resume_crew.map(unmapped(crew), ["k1"], approve=True).result(),
    "the time of a key": lambda crew: asyncio.run(run_deployed_crew.fn(crew, INPUTS, idempotency_key="daily")),
    "a Secret block": lambda crew: asyncio.run(run_deployed_crew.fn(crew, INPUTS)),
}


@pytest.mark.parametrize("name", IN_A_FLOW)
@pytest.mark.usefixtures("no_pause")
def test_a_call_in_a_flow_says_that_prefect_is_away(name: str, proxy: Proxy, crew_server: CrewServerFactory):
    crew = crew_server("echo").crew(secret_inputs=["text"])

    @flow
    def subflow() -> None:
        proxy.cut()
        try:
            with pytest.raises(pc.PrefectAwayError):
                IN_A_FLOW[name](crew)
        finally:
            proxy.restore()

    @flow
    def parent() -> None:
        subflow()

    parent()
