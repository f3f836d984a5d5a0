"""The client against the crew server of this package: what one half says, the other understands, in every format."""

from __future__ import annotations

import asyncio

import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import CrewStatus, StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import AuthenticationError, InvalidInputsError
from prefect_crew.states import CrewState

FORMATS = ["documented", "union", "live"]
TRIP = {"budget": "900", "interests": "food", "duration": "3", "age": "40"}


async def ended(client: CrewClient, kickoff_id: str) -> CrewStatus:
    while not (status := await client.status(kickoff_id)).state.ended:
        await asyncio.sleep(0.01)
    return status


@pytest.mark.parametrize("response_format", FORMATS)
async def test_a_run_in_every_dialect(response_format: str):
    with CrewServer("travel", response_format=response_format, speed=100) as server:
        async with CrewClient(server.url, server.token) as client:
            assert await client.health()
            assert {item.name for item in await client.inputs()} == set(TRIP)
            with pytest.raises(InvalidInputsError) as caught:
                await client.kickoff({"budget": "900"})
            kickoff_id = await client.kickoff(TRIP, meta={"idempotency_key": "r"})
            status = await ended(client, kickoff_id)
            unknown = await client.status("no-such-run")
            late = await client.stop(kickoff_id)
            nobody = await client.stop("no-such-run")
    assert status.state is CrewState.COMPLETED
    assert status.known_state
    assert status.result().output
    assert unknown.state is CrewState.UNKNOWN
    assert (late.outcome, late.state) == (StopOutcome.NOT_STOPPABLE, CrewState.COMPLETED)
    assert nobody.outcome is StopOutcome.UNKNOWN_RUN
    if response_format == "documented":
        assert set(caught.value.missing_inputs) == set(TRIP) - {"budget"}


@pytest.mark.parametrize("response_format", FORMATS)
async def test_a_run_that_is_stopped(response_format: str):
    with CrewServer("travel", response_format=response_format, speed=0.01) as server:
        async with CrewClient(server.url, server.token) as client:
            kickoff_id = await client.kickoff(TRIP)
            assert (await client.stop(kickoff_id)).accepted
            status = await ended(client, kickoff_id)
    assert status.state is CrewState.STOPPED


async def test_a_wrong_token_is_told():
    with CrewServer("echo") as server:
        async with CrewClient(server.url, "another-token") as client:
            with pytest.raises(AuthenticationError):
                await client.inputs()
