"""The flows to deploy as they are: a batch of a file, recovering."""

from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import prefect
import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed, Failed, Paused, Pending, Running

from prefect_crew import BatchFailedError
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.operations import batch_file, recover
from support.scripts import PICKY


async def test_a_file_is_run_and_what_failed_fails_the_flow(save_crew: Any, tmp_path: Path):
    server = save_crew("batch-picky", PICKY)
    (tmp_path / "rows.csv").write_text("topic\ntea\nbad milk\n")
    run: Any = partial(batch_file, "batch-picky", str(tmp_path / "rows.csv"))
    for kickoffs in (2, 3):  # the second call starts the failed row again
        with pytest.raises(BatchFailedError, match="1 of 2 rows completed, 1 failed"):
            await run("of a file", str(tmp_path / "out.jsonl"))
        assert server.kickoffs == kickoffs
    other = ("with options", str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigurationError, match=r"wait\.initial: Input should be greater than 0"):
        await run(*other, options={"wait": {"initial": -1}})
    wait, inputs = {"initial": 0.1, "timeout": 60}, {"topic": "{{ topic | length }}"}
    assert (await run(*other, options={"inputs": inputs, "max_in_flight": 1, "wait": wait}))["completed"] == 2


# Crashed flow runs are begun again, a limited number of times, and nothing else is


@flow
def fragile() -> None:
    """Is never run here: only its runs' states matter."""


async def new_run(*states: State, deployed: bool = True, force: bool = False) -> UUID:
    """Make a flow run that goes through these states."""
    async with get_client() as client:
        if deployed:
            flow_id = await client.create_flow(fragile)
            deployment_id = await client.create_deployment(flow_id, f"recover-{uuid4()}")
            run = await client.create_flow_run_from_deployment(deployment_id)
        else:
            run = await client.create_flow_run(fragile)
    return await change(run.id, *states, force=force)


async def change(run_id: UUID, *states: State, force: bool = False) -> UUID:
    async with get_client() as client:
        for state in states:
            await client.set_flow_run_state(run_id, state, force=force)
    return run_id


async def state_of(run_id: UUID) -> str | None:
    async with get_client() as client:
        return (await client.read_flow_run(run_id)).state_name


async def recovered(run_id: UUID, **options: int) -> str:
    """Run the flow without its retries, which would make a failing test slow."""
    return await recover.with_options(retries=0)(run_id, **options)


@pytest.mark.usefixtures("prefect_api")
async def test_the_limit_holds_over_many_crashes():
    run_id, outcomes = await new_run(Running(), Crashed()), list[str]()
    for _ in range(4):
        outcomes.append(await recovered(run_id, max_attempts=3))
        if await state_of(run_id) == "Scheduled":
            await change(run_id, Running(), Crashed(), force=True)
    assert outcomes[:2] == ["scheduled again, attempt 2 of 3", "scheduled again, attempt 3 of 3"]
    assert outcomes[2].startswith("given up after 3 attempts")
    assert outcomes[3] == outcomes[2]
    assert await state_of(run_id) == "Crashed"


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_dies_before_it_begins_has_a_limit_as_well():
    run_id = await new_run(Pending(), Crashed(), Pending(), Crashed(), force=True)
    async with get_client() as client:
        assert (await client.read_flow_run(run_id)).run_count == 0
    assert (await recovered(run_id, max_attempts=2)).startswith("given up after 2 attempts")


@pytest.mark.usefixtures("prefect_api")
async def test_a_form_that_was_answered_is_no_attempt():
    run_id = await new_run(Running(), Paused(), Running(), Paused(), Running(), Crashed())
    assert await recovered(run_id, max_attempts=2) == "scheduled again, attempt 2 of 2"


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_dies_with_its_form_up_goes_on():
    run_id = await new_run(Running(), Paused(), Crashed(), force=True)
    assert await recovered(run_id, max_attempts=2) == "scheduled again, attempt 2 of 2"


@pytest.mark.usefixtures("prefect_api")
async def test_up_to_prefect_3_9_2_a_form_takes_a_retry():
    run_id = await new_run()
    async with get_client() as client:
        policy = (await client.read_flow_run(run_id)).empirical_policy
        again = policy.model_copy(update={"retries": 1, "retry_delay": 0})
        await client.update_flow_run(run_id, empirical_policy=again)
    await change(run_id, Running(), Paused(), Running(), Failed())
    version = tuple(map(int, prefect.__version__.split(".")[:3]))
    assert await state_of(run_id) == ("Failed" if version < (3, 9, 3) else "AwaitingRetry")


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("states", "deployed", "outcome"),
    [
        pytest.param([Running(), Failed(message="CrewFailedError")], True, "left alone, it is ", id="failed"),
        pytest.param([Running(), Completed()], True, "left alone, it is ", id="completed"),
        pytest.param([Running(), Cancelled()], True, "left alone, it is ", id="cancelled"),
        pytest.param([Running()], True, "left alone, it is ", id="running"),
        pytest.param([Running(), Crashed()], False, "left alone, no deployment", id="without-a-deployment"),
    ],
)
async def test_a_run_is_left_alone(states: list[State], deployed: bool, outcome: str):
    run_id = await new_run(*states, deployed=deployed)
    assert (await recovered(run_id)).startswith(outcome)
    assert await state_of(run_id) == states[-1].name


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_is_gone_is_an_error():
    with pytest.raises(ConfigurationError, match="Nothing was scheduled"):
        await recovered(uuid4())
