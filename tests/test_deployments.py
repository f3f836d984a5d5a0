"""The form of a deployed crew's inputs, and flow runs for past times: which, with what, and none twice."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from prefect_crew.deployments import backfill, build_deployment, crew_target, shared_key, slowest_heartbeat
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError
from support.prefect_server import PrefectServer

CREW = """
name: form
inputs:
  - topic
  - {name: first name, description: Of the reader., required: false}
  - {name: tone, description: How it sounds., default: dry, required: false}
  - {name: days, type: integer}
  - {name: odd, type: whatever}
tasks: [{name: t, output: x}]
"""
TEXT = ["string", "number", "boolean"]


def kinds(field: dict[str, Any]) -> list[str]:
    return [kind["type"] for kind in field.get("anyOf", [field])]


async def test_the_form_asks_for_each_input_and_says_what_it_is():
    with CrewServer(CREW, response_format="live") as server:
        block: Any = server.crew()
        deployment = build_deployment(await crew_target(block.crew.called("form"), {}), "form")
    schema = deployment._parameter_openapi_schema.model_dump()["properties"]["inputs"]
    assert deployment.parameters == {"crew": "form"}
    assert schema["required"] == ["topic", "days", "odd"]
    fields = schema["properties"]
    assert list(fields) == ["topic", "first name", "tone", "days", "odd"]
    assert [field["position"] for field in fields.values()] == list(range(5))
    assert (fields["topic"]["title"], kinds(fields["topic"])) == ("topic", TEXT)
    assert (fields["first name"]["description"], kinds(fields["first name"])) == ("Of the reader.", [*TEXT, "null"])
    assert fields["tone"]["description"] == "How it sounds. The crew's own default: dry."
    assert (fields["tone"]["default"], fields["first name"]["default"]) == (None, None)
    assert (kinds(fields["days"]), kinds(fields["odd"])) == (["integer"], TEXT)


# Backfills

KEY = "day-{scheduled_start:%Y-%m-%d}"
FIRST, LAST = date(2024, 2, 27), date(2024, 3, 1)
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
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


async def count(deployment_id: UUID) -> int:
    body = {"deployments": {"id": {"any_": [str(deployment_id)]}}}
    async with get_client() as client:
        return (await client.request("POST", "/flow_runs/count", json=body)).json()


def moments(runs: list[Any]) -> list[str]:
    return [f"{run.scheduled_for:%m-%d %H:%M}" for run in runs]


async def test_each_time_of_the_schedule_gets_a_run_and_only_one(prefect_api: PrefectServer):
    name, deployment = await deploy(SIX, parameters={"city": "Porto"})
    assert [run.flow_run for run in await backfill(name, FIRST, LAST, dry_run=True)] == [None] * 4
    assert await count(deployment) == 0
    runs, at_once = await asyncio.gather(backfill(name, FIRST, LAST), backfill(name, FIRST, LAST))
    assert moments(runs) == ["02-27 06:00", "02-28 06:00", "02-29 06:00", "03-01 06:00"]
    for run, twin in zip(runs, at_once, strict=True):
        made = run.flow_run
        assert made is not None
        assert twin.flow_run is not None
        assert (made.id, made.expected_start_time) == (twin.flow_run.id, run.scheduled_for)
        assert made.parameters == {"idempotency_key": KEY, "city": "Porto"}
        assert "backfill" in made.tags
        assert not made.auto_scheduled  # those are deleted by the next deploy
    longer = await backfill(name, FIRST, LAST + timedelta(days=2))
    assert [run.created for run in longer] == [False] * 4 + [True] * 2
    assert await count(deployment) == 6


async def test_what_the_schedule_itself_made_is_not_made_again_and_a_run_of_another_schedule_does_not_count(
    prefect_api: PrefectServer,
):
    twin = SIX.model_copy(update={"slug": "twin", "parameters": {"idempotency_key": f"twin-{KEY}"}})
    name, deployment = await deploy(SIX.model_copy(update={"active": True}), twin)
    # Prefect's own way to schedule for the past, which makes runs as its scheduler does.
    body = {"start_time": "2024-02-28T00:00:00Z", "end_time": "2024-02-28T23:00:00Z", "max_runs": 1}
    async with get_client() as client:
        await client.request("POST", f"/deployments/{deployment}/schedule", json=body)
    for slug, created in (("six", [True, False, True, True]), ("twin", [True] * 4)):
        assert [run.created for run in await backfill(name, FIRST, LAST, schedule=slug)] == created


async def test_times_in_other_zones_and_intervals(prefect_api: PrefectServer):
    name, _ = await deploy(SIX.model_copy(update={"schedule": CronSchedule(cron="0 6 * * *", timezone="Asia/Tokyo")}))
    assert moments(await backfill(name, FIRST, date(2024, 2, 28), dry_run=True)) == ["02-27 21:00", "02-28 21:00"]
    start = datetime(2024, 2, 27, 22, 30, tzinfo=timezone(timedelta(hours=1)))
    assert moments(await backfill(name, start, date(2024, 2, 28), dry_run=True)) == ["02-28 21:00"]
    anchor = datetime(2024, 1, 1, 1, tzinfo=UTC)
    hourly = SIX.model_copy(update={"schedule": IntervalSchedule(interval=timedelta(hours=1), anchor_date=anchor)})
    name, _ = await deploy(hourly)
    assert len(await backfill(name, FIRST, FIRST + timedelta(days=30), dry_run=True)) == 31 * 24


TWO = (SIX, SIX.model_copy(update={"slug": "other"}))
SAME_KEY = SIX.model_copy(update={"parameters": {"idempotency_key": "always"}})
YEARLY_KEY = SIX.model_copy(update={"parameters": {"idempotency_key": "year-{scheduled_start:%Y}"}})
HOURLY = SIX.model_copy(update={"schedule": CronSchedule(cron="0 * * * *")})


@pytest.mark.parametrize(
    ("schedules", "call", "problem"),
    [
        ((SIX,), {"end": date(2024, 1, 1)}, "ends before it begins"),
        ((SIX,), {"end": date(2999, 1, 1), "start": date(2998, 12, 1)}, "all in the past"),
        ((HOURLY,), {"end": date(2024, 5, 1)}, "at most 1000 times"),
        ((SIX,), {"schedule": "seven"}, "schedule=….*: six"),
        ((), {}, "has no schedule to take the times from"),
        (TWO, {}, "schedule=….*: (six, other|other, six)"),
        ((SAME_KEY,), {}, "same for every time"),
        ((YEARLY_KEY,), {}, "same for every time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_would_go_wrong_is_refused_and_nothing_is_created(
    prefect_api: PrefectServer, schedules: tuple[DeploymentScheduleCreate, ...], call: dict[str, Any], problem: str
):
    name, deployment = await deploy(*schedules)
    with pytest.raises(ConfigurationError, match=problem):
        await backfill(name, **{"start": FIRST, "end": LAST, **call})
    assert await count(deployment) == 0


@pytest.mark.parametrize(
    ("key", "again"),
    [
        ("day-{scheduled_start:%Y-%m-%d}", None),
        ("month-{scheduled_start:%B}", "month-"),
        ("weekday-{scheduled_start:%A}", "weekday-"),  # seven keys, none of them twice in a row
        ("{scheduled_start:%m-%d}", "-"),
        (None, None),
    ],
)
async def test_a_key_that_comes_again_is_found(key: str | None, again: str | None):
    found = await shared_key(key, SIX.schedule)
    assert found is None if again is None else again in (found or "")


@pytest.mark.parametrize(
    ("job_variables", "seconds"),
    [({}, 180), ({"env": None}, 180), ({"env": {HEARTBEAT: "60"}}, 60), ({"env": {HEARTBEAT: "60.0"}}, 60)],
)
async def test_the_slowest_heartbeat_is_that_of_the_job_variables(job_variables: dict[str, Any], seconds: int):
    deployment = SimpleNamespace(job_variables=job_variables)
    client: Any = SimpleNamespace(read_deployments=AsyncMock(return_value=[deployment]))
    assert await slowest_heartbeat(client) == seconds


async def test_a_deployment_that_does_not_exist_is_named(prefect_api: PrefectServer):
    for name in ("backfilled/nowhere", "no-slash"):
        with pytest.raises(ConfigurationError, match=name):
            await backfill(name, FIRST, LAST)
