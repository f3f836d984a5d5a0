"""flows/backfill.py: a flow run for each past time, a few at once, and none twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.states import Completed, Failed

from support.deployed import load_flow
from support.prefect_server import PrefectServer

DAYS = [datetime(2024, 2, day, 6, tzinfo=UTC) for day in (27, 28, 29)]


@flow
def daily() -> None:
    """Is ended by the test, as a worker would run it."""


async def flow_runs(deployment: UUID) -> list[Any]:
    async with get_client() as client:
        of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        return await client.read_flow_runs(deployment_filter=of_deployment)


@asynccontextmanager
async def ended_with(deployment: UUID, state: State) -> AsyncIterator[list[int]]:
    """End each flow run with a state; yield how many there were to end at each look."""
    open_at_once: list[int] = []

    async def end() -> None:
        async with get_client() as client:
            while True:
                begun = [run for run in await flow_runs(deployment) if not run.state.is_final()]
                open_at_once.append(len(begun))
                for run in begun:
                    await client.set_flow_run_state(run.id, state, force=True)
                await asyncio.sleep(0.2)

    worker = asyncio.create_task(end())
    try:
        yield open_at_once
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


async def test_each_past_time_gets_one_flow_run(prefect_api: PrefectServer):
    backfill, name = load_flow("backfill.py:backfill"), f"d-{uuid4()}"
    async with get_client() as client:
        deployment = await client.create_deployment(await client.create_flow(daily), name)
    days = {"first": DAYS[0].replace(tzinfo=None), "last": datetime(2024, 2, 29, 12, tzinfo=UTC)}
    async with ended_with(deployment, Completed()) as open_at_once:
        assert await backfill(f"daily/{name}", **days, at_once=2) == 3
        assert max(open_at_once) <= 2
        assert await backfill(f"daily/{name}", **days) == 3
    runs = await flow_runs(deployment)
    assert sorted(run.expected_start_time for run in runs) == DAYS
    assert all("backfill" in run.tags for run in runs)


async def test_a_flow_run_that_fails_is_named(prefect_api: PrefectServer):
    backfill, name = load_flow("backfill.py:backfill"), f"d-{uuid4()}"
    async with get_client() as client:
        deployment = await client.create_deployment(await client.create_flow(daily), name)
    async with ended_with(deployment, Failed()):
        with pytest.raises(RuntimeError, match="did not complete: 2024-02-27 06:00"):
            await backfill(f"daily/{name}", DAYS[0], DAYS[0])
