"""Crashed flow runs are begun again, a limited number of times, and nothing else is."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from prefect_crew import operations
from support.prefect_server import PrefectServer


@flow
def fragile() -> None:
    """Is never run here: only its runs' states matter."""


async def new_run(*states: State, deployed: bool = True) -> FlowRun:
    """Make a flow run that goes through these states."""
    async with get_client() as client:
        if deployed:
            flow_id = await client.create_flow(fragile)
            deployment_id = await client.create_deployment(flow_id, f"recover-{uuid4()}")
            run = await client.create_flow_run_from_deployment(deployment_id)
        else:
            run = await client.create_flow_run(fragile)
        for state in states:
            await client.set_flow_run_state(run.id, state, force=True)
        return await client.read_flow_run(run.id)


async def state_of(flow_run_id: UUID) -> str:
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
    assert run.state is not None
    return run.state.type.value


async def recover(flow_run_id: UUID, **options: int) -> str:
    """Run the flow without its retries, which would make a failing test slow."""
    return await operations.recover.with_options(retries=0)(flow_run_id, **options)


async def test_the_limit_holds_over_many_crashes(prefect_api: PrefectServer):
    run = await new_run(Running(), Crashed())
    said: list[str] = []
    for _ in range(4):
        said.append(await recover(run.id, max_attempts=3))
        if await state_of(run.id) == "SCHEDULED":
            async with get_client() as client:
                await client.set_flow_run_state(run.id, Running(), force=True)
                await client.set_flow_run_state(run.id, Crashed(), force=True)
    assert said[:2] == ["scheduled again, attempt 2 of 3", "scheduled again, attempt 3 of 3"]
    assert said[2].startswith("given up after 3 attempts")
    assert said[3] == said[2]
    assert await state_of(run.id) == "CRASHED"


async def test_a_run_that_dies_before_it_begins_has_a_limit_as_well(prefect_api: PrefectServer):
    run = await new_run(Pending(), Crashed(), Pending(), Crashed())
    assert run.run_count == 0
    assert (await recover(run.id, max_attempts=2)).startswith("given up after 2 attempts")


@pytest.mark.parametrize(
    "last",
    [Failed(message="CrewFailedError"), Completed(), Cancelled(), Running()],
    ids=["failed", "completed", "cancelled", "running"],
)
async def test_what_is_no_crash_is_left_alone(prefect_api: PrefectServer, last: State):
    run = await new_run(Running(), last)
    assert (await recover(run.id)).startswith("left alone")
    assert await state_of(run.id) == last.type.value


async def test_a_run_without_a_deployment_is_left_alone_and_one_that_is_gone_is_an_error(prefect_api: PrefectServer):
    run = await new_run(Running(), Crashed(), deployed=False)
    assert "no deployment" in await recover(run.id)
    assert await state_of(run.id) == "CRASHED"
    with pytest.raises(ObjectNotFound):
        await recover(uuid4())
