"""Flow runs for times gone by: which, with what, and none twice."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from prefect_crew.deployments import MOST, backfill
from prefect_crew.exceptions import ConfigurationError
from support.prefect_server import PrefectServer

KEY = "day-{{ scheduled_start:%Y-%m-%d }}"
FIRST, LAST = date(2024, 2, 27), date(2024, 3, 1)
SIX = DeploymentScheduleCreate(
    schedule=CronSchedule(cron="0 6 * * *", timezone="UTC"),
    slug="six",
    active=False,
    parameters={"idempotency_key": KEY},
)


@flow
def backfilled(idempotency_key: str | None = None, city: str = "Lisbon") -> None:
    """Is never run here: only its runs matter."""


async def deploy(*schedules: DeploymentScheduleCreate, **options: Any) -> tuple[str, UUID]:
    name = f"d-{uuid4()}"
    async with get_client() as client:
        flow_id = await client.create_flow(backfilled)
        made = await client.create_deployment(flow_id, name, schedules=list(schedules), **options)
    return f"backfilled/{name}", made


async def flow_run(flow_run_id: UUID | None) -> FlowRun:
    assert flow_run_id is not None
    async with get_client() as client:
        return await client.read_flow_run(flow_run_id)


async def count(deployment_id: UUID) -> int:
    async with get_client() as client:
        answer = await client.request(
            "POST", "/flow_runs/count", json={"deployments": {"id": {"any_": [str(deployment_id)]}}}
        )
    return answer.json()


def moments(runs: list[Any]) -> list[str]:
    return [f"{run.scheduled_for:%m-%d %H:%M}" for run in runs]


async def test_each_time_of_the_schedule_gets_a_run_scheduled_for_that_time(prefect_api: PrefectServer):
    name, _ = await deploy(SIX, parameters={"city": "Porto"})
    runs = await backfill(name, FIRST, LAST, parameters={"city": "Faro"})
    assert moments(runs) == ["02-27 06:00", "02-28 06:00", "02-29 06:00", "03-01 06:00"]
    for run in runs:
        made = await flow_run(run.flow_run_id)
        assert made.expected_start_time == run.scheduled_for
        assert made.parameters == {"idempotency_key": KEY, "city": "Faro"}
        assert "backfill" in made.tags
        assert not made.auto_scheduled  # those are deleted by the next deploy
        assert (run.created, run.state) == (True, "Scheduled")


async def test_a_second_call_creates_nothing_and_a_longer_one_only_the_rest(prefect_api: PrefectServer):
    name, deployment = await deploy(SIX)
    first = await backfill(name, FIRST, LAST)
    again = await backfill(name, FIRST, LAST)
    assert [run.flow_run_id for run in again] == [run.flow_run_id for run in first]
    assert not any(run.created for run in again)
    longer = await backfill(name, FIRST, LAST + timedelta(days=2))
    assert [run.created for run in longer] == [False] * 4 + [True] * 2
    assert await count(deployment) == 6


async def test_two_calls_at_once_create_each_run_once(prefect_api: PrefectServer):
    name, deployment = await deploy(SIX)
    one, two = await asyncio.gather(backfill(name, FIRST, LAST), backfill(name, FIRST, LAST))
    assert [run.flow_run_id for run in one] == [run.flow_run_id for run in two]
    assert await count(deployment) == 4


async def test_what_the_schedule_itself_made_is_not_made_again(prefect_api: PrefectServer):
    name, deployment = await deploy(SIX.model_copy(update={"active": True}))
    # Prefect's own way to schedule for the past, which makes runs as its scheduler does.
    body = {"start_time": "2024-02-28T00:00:00Z", "end_time": "2024-02-28T23:00:00Z", "max_runs": 1}
    async with get_client() as client:
        await client.request("POST", f"/deployments/{deployment}/schedule", json=body)
    runs = await backfill(name, FIRST, LAST)
    assert [run.created for run in runs] == [True, False, True, True]


async def test_a_run_of_another_schedule_at_the_same_time_does_not_stand_in(prefect_api: PrefectServer):
    twin = SIX.model_copy(update={"slug": "twin", "parameters": {"idempotency_key": f"twin-{KEY}"}})
    name, _ = await deploy(SIX, twin)
    for slug in ("six", "twin"):
        assert all(run.created for run in await backfill(name, FIRST, LAST, schedule=slug))


async def test_without_a_schedule_the_times_are_counted_from_the_start(prefect_api: PrefectServer):
    name, _ = await deploy()
    start = datetime(2024, 2, 27, 22, tzinfo=timezone(timedelta(hours=1)))
    runs = await backfill(name, start, date(2024, 2, 28), timedelta(hours=9))
    assert moments(runs) == ["02-27 21:00", "02-28 06:00", "02-28 15:00"]


async def test_schedules_in_other_time_zones_and_intervals_are_followed(prefect_api: PrefectServer):
    tokyo = SIX.model_copy(update={"schedule": CronSchedule(cron="0 6 * * *", timezone="Asia/Tokyo")})
    name, _ = await deploy(tokyo)
    assert moments(await backfill(name, FIRST, date(2024, 2, 28), dry_run=True)) == ["02-27 21:00", "02-28 21:00"]
    anchor = datetime(2024, 1, 1, 1, tzinfo=UTC)
    hourly = SIX.model_copy(update={"schedule": IntervalSchedule(interval=timedelta(hours=1), anchor_date=anchor)})
    name, _ = await deploy(hourly)
    # More than Prefect gives in one go.
    assert len(await backfill(name, FIRST, FIRST + timedelta(days=30), dry_run=True)) == 31 * 24


async def test_a_dry_run_creates_nothing(prefect_api: PrefectServer):
    name, deployment = await deploy(SIX)
    runs = await backfill(name, FIRST, LAST, dry_run=True)
    assert [(run.created, run.flow_run_id, run.state) for run in runs] == [(True, None, "to be created")] * 4
    assert await count(deployment) == 0


TWO = (SIX, SIX.model_copy(update={"slug": "other"}))
SAME_KEY = SIX.model_copy(update={"parameters": {"idempotency_key": "always"}})
HOURLY = SIX.model_copy(update={"schedule": CronSchedule(cron="0 * * * *")})


@pytest.mark.parametrize(
    ("schedules", "call", "problem"),
    [
        pytest.param((SIX,), {"end": date(2024, 1, 1)}, "ends .* before it begins", id="reversed"),
        pytest.param((SIX,), {"end": date(2999, 1, 1), "start": date(2998, 12, 1)}, "has not come yet", id="future"),
        pytest.param((SIX,), {"every": timedelta(0)}, "longer than nothing", id="no-pause"),
        pytest.param((SIX,), {"every": timedelta(seconds=1)}, f"more than {MOST}", id="too-many-by-every"),
        pytest.param((HOURLY,), {"end": date(2024, 5, 1)}, f"more than {MOST}", id="too-many-by-schedule"),
        pytest.param((SIX,), {"schedule": "seven"}, "no schedule 'seven'. It has: six", id="unknown-schedule"),
        pytest.param(TWO, {}, "several schedules.*six, other|several schedules.*other, six", id="which-schedule"),
        pytest.param((), {}, r"Give every=…\.", id="no-schedule"),
        pytest.param((SAME_KEY,), {}, "same for every time", id="one-key-for-all"),
    ],
)
async def test_what_would_go_wrong_is_refused_and_nothing_is_created(
    prefect_api: PrefectServer, schedules: tuple[DeploymentScheduleCreate, ...], call: dict[str, Any], problem: str
):
    name, deployment = await deploy(*schedules)
    with pytest.raises(ConfigurationError, match=problem):
        await backfill(name, **{"start": FIRST, "end": LAST, **call})
    assert await count(deployment) == 0


@pytest.mark.parametrize("name", ["backfilled/nowhere", "no-slash"])
async def test_a_deployment_that_does_not_exist_is_named(prefect_api: PrefectServer, name: str):
    with pytest.raises(ConfigurationError, match=name):
        await backfill(name, FIRST, LAST)


async def test_a_deployment_that_drops_runs_is_refused_unless_all_fit(prefect_api: PrefectServer):
    drops = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    name, deployment = await deploy(SIX, concurrency_limit=2, concurrency_options=drops)
    with pytest.raises(ConfigurationError, match="CANCEL_NEW"):
        await backfill(name, FIRST, LAST)
    assert await count(deployment) == 0
    assert len(await backfill(name, FIRST, date(2024, 2, 28))) == 2
