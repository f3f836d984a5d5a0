"""`backfill`: what a range of dates lacks, on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
from prefect import flow, get_client

from support.commands import Command
from support.prefect_server import PrefectServer


@flow
def filled(idempotency_key: str) -> None:
    """Is never run here: only its runs matter."""


@pytest.fixture
def deployment(prefect_api: PrefectServer) -> str:
    name = f"d-{uuid.uuid4()}"

    async def make() -> None:
        async with get_client() as client:
            flow_id = await client.create_flow(filled)
            key = f"{name}-{{{{ scheduled_start:%Y-%m-%d }}}}"
            await client.create_deployment(flow_id, name, parameters={"idempotency_key": key})

    asyncio.run(make())
    return f"filled/{name}"


RANGE = ("--from", "2024-02-28", "--to", "2024-03-01", "--every", "1d")


def test_a_second_call_creates_nothing_twice(here: Command, deployment: str):
    first, second = (here("backfill", deployment, *RANGE, "--json") for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    made, again = json.loads(first.out), json.loads(second.out)
    assert [run["scheduled_for"][:10] for run in made] == ["2024-02-28", "2024-02-29", "2024-03-01"]
    assert [run["created"] for run in made] == [True] * 3
    assert [run["created"] for run in again] == [False] * 3
    assert [run["flow_run_id"] for run in made] == [run["flow_run_id"] for run in again]


def test_a_dry_run_creates_nothing(here: Command, deployment: str):
    planned = here("backfill", deployment, *RANGE, "--dry-run")
    assert planned.code == 0
    assert planned.out.count("to create") == 3
    assert [run["created"] for run in json.loads(here("backfill", deployment, *RANGE, "--json").out)] == [True] * 3


@pytest.mark.parametrize("wrong", ["yesterday", "2024-13-01"])
def test_what_is_no_day_is_said(here: Command, deployment: str, wrong: str):
    refused = here("backfill", deployment, "--from", wrong, "--to", "2024-03-01")
    assert refused.code == 2
    assert wrong in refused.err


def test_a_deployment_that_is_not_there_is_said(here: Command, prefect_api: PrefectServer):
    refused = here("backfill", "filled/nowhere", *RANGE)
    assert refused.code not in (0, 1)
    assert "filled/nowhere" in refused.err


def test_the_deployment_is_named_by_its_place_alone(here: Command):
    assert "--DEPLOYMENT" not in here("backfill", "--help").out


def test_errors_name_the_options_of_the_command(here: Command, deployment: str):
    without = here("backfill", deployment, *RANGE[:4])
    assert without.code == 25
    assert "no schedule to take the times from. Give --every …" in without.err
    unreadable = here("backfill", deployment, *RANGE[:4], "--every", "daily")
    assert unreadable.code == 2
    assert "--every 'daily' is no age" in unreadable.err
