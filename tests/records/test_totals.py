"""What removed runs used: counted once each, however many processes add to a day, on a real Prefect server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any
from unittest import mock

import pytest
from prefect.client.orchestration import get_client

from prefect_crew.client.models import TokenUsage
from prefect_crew.prices import Spending
from prefect_crew.records import totals as totals_module
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.totals import DayTotal, add_to_totals, read_totals, total_of
from support.prefect_server import PrefectServer
from support.records import new_record, read_named

ENDED = datetime(2026, 4, 1, 12, tzinfo=UTC)


def record(crew: str = "c", **facts: Any) -> RunRecord:
    return new_record(**{"crew": crew, "phase": RecordPhase.ENDED, "ended_at": ENDED, **facts})


async def stored(count: int, crew: str, **facts: Any) -> list[RunRecord]:
    store, records = PrefectRecords(), [record(crew, **facts) for _ in range(count)]
    for one in records:
        assert await store.claim(one)
    return records


async def deleted(records: Sequence[RunRecord]) -> None:
    for one in records:
        await PrefectRecords().delete(one)


def plain(one: RunRecord, flow: str | None = None, tags: Sequence[str] = ()) -> DayTotal:
    return total_of(one, flow, tags)


async def added(records: Sequence[RunRecord], **facts: Any) -> None:
    for one in records:
        await add_to_totals(one, plain(one, **facts))


async def totals(crew: str) -> list[DayTotal]:
    return [total for total in (await read_totals())[0] if total.crew.startswith(crew)]


async def counted(crew: str) -> int:
    return sum(total.spending.runs for total in await totals(crew))


async def names(day: date) -> list[str]:
    return [one.name for one in await read_named(f"crew_usage_{day:%Y%m%d}_")]


def test_long_names_are_cut():
    total = plain(record(crew="c" * 500), "f" * 500, ["t" * 500, *(f"t{number:02}" for number in range(20))])
    assert (len(total.crew), len(total.flow or ""), total.tags) == (60, 60, [f"t{number:02}" for number in range(10)])
    assert plain(record(), None, ["t" * 500]).tags == ["t" * 60]


async def test_who_dies_before_it_has_deleted_the_records_counts_none_of_them_twice(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 1, tzinfo=UTC)
    records = await stored(3, crew, ended_at=day, usage=TokenUsage(total_tokens=10), cost=0.25)
    await added(records[:2])
    await added(records)
    await added(records)
    (total,) = await totals(crew)
    assert total.spending == Spending(3, 3, 3, TokenUsage(total_tokens=30), 0.75)
    await deleted(records)
    await added(records)
    more = await stored(1, crew, ended_at=day)
    await added(more)
    assert await counted(crew) == 4
    assert len(await names(day)) == 1, "one Variable a day"
    (left,) = await read_named(f"crew_usage_{day:%Y%m%d}_")
    assert left.value["refs"] == [more[0].ref], "records that are gone are named no more"


async def test_of_many_that_add_to_a_day_at_the_same_time_each_run_counts_once(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 2, tzinfo=UTC)
    records = await stored(6, crew, ended_at=day)
    await asyncio.gather(*(added(records[start:]) for start in range(4)))
    assert await counted(crew) == 6


async def test_a_number_that_was_free_when_it_was_read_counts_nothing_later(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 3, tzinfo=UTC)
    first, second, third = [await stored(1, crew, ended_at=day) for _ in range(3)]
    await added(first)
    create = totals_module.create_variable
    slept = False

    async def sleeps(variable: Any) -> str | None:
        nonlocal slept
        if not slept:
            slept = True
            await added(second)  # takes the number
            await added(third)  # takes the one after it, and deletes that
        return await create(variable)

    with mock.patch.object(totals_module, "create_variable", sleeps):
        await added([*second, *third])
    assert await counted(crew) == 3
    assert len(await names(day)) == 1


async def test_a_day_with_many_groups_has_several_variables_and_loses_none(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 4, tzinfo=UTC)
    records = await stored(20, crew, ended_at=day)
    for number, one in enumerate(records):
        await add_to_totals(one, plain(one, f"f{number}", ["t" * 60] * 3))
    await deleted(records)
    assert len(await totals(crew)) == len(records)
    assert len(await names(day)) > 1
    await added(records)
    assert await counted(crew) == len(records)


async def test_what_somebody_else_keeps_under_such_a_name_stays(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 6, tzinfo=UTC)
    async with get_client() as client:
        body = {"name": "crew_usage_20200106_4", "value": "mine", "tags": ["prefect-crew-usage"]}
        await client.request("POST", "/variables/", json=body)
    await added(await stored(1, crew, ended_at=day))
    assert await counted(crew) == 1
    assert await names(day) == ["crew_usage_20200106_1", "crew_usage_20200106_4"]


@pytest.mark.parametrize("kind", ["crew", "flow", "tags"])
async def test_totals_tell_crews_flows_and_tags_apart(prefect_api: PrefectServer, kind: str):
    mark, day = uuid.uuid4().hex, datetime(2020, 1, 7, tzinfo=UTC)
    one, two = [(await stored(1, f"{mark}{kind == 'crew' and n}", ended_at=day))[0] for n in (1, 2)]
    await added([one], flow="f1", tags=["t1"])
    await added([two], flow=f"f{1 + (kind == 'flow')}", tags=[f"t{1 + (kind == 'tags')}"])
    assert len(await totals(mark)) == 2
