"""What removed runs used: counted once each, however many processes add to a day, on a real Prefect server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import partial
from typing import Any
from unittest import mock

import pytest
from prefect.client.orchestration import get_client

from prefect_crew.client.models import TokenUsage
from prefect_crew.records import totals as totals_module
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult
from prefect_crew.records.store import PrefectRecords, read_named
from prefect_crew.records.totals import AT_ONCE, DayTotal, add_to_totals, total_of, totals_of_removed
from support.prefect_server import PrefectServer

ENDED = datetime(2026, 4, 1, 12, tzinfo=UTC)


def record(crew: str = "c", **facts: Any) -> RunRecord:
    values: dict[str, Any] = {
        "idempotency_key": f"key {uuid.uuid4()}",
        "attempt": 1,
        "phase": RecordPhase.ENDED,
        "crew": crew,
        "crew_url": "https://c.test",
        "inputs_digest": "d",
        "owner": "o",
        "claimed_at": ENDED,
        "ended_at": ENDED,
        "kickoff_id": "k",
    }
    return RunRecord(**{**values, **facts})


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


async def counted(crew: str) -> int:
    return sum(total.runs for total in await totals_of_removed() if total.crew == crew)


async def names(day: date) -> list[str]:
    return [one.name for one in await read_named(f"crew_usage_{day:%Y%m%d}_")]


def test_what_nobody_reported_is_not_counted_as_reported():
    assert plain(record()).model_dump(exclude_defaults=True) == {"day": ENDED.date(), "crew": "c", "runs": 1}
    total = plain(record(usage=TokenUsage(prompt_tokens=3, total_tokens=0), cost=0.0))
    assert (total.reported, total.priced, total.prompt_tokens, total.total_tokens) == (1, 1, 3, 0)
    assert plain(record(usage=TokenUsage(prompt_tokens=3))).reported == 0, "as costs count it"


def test_a_record_of_an_earlier_version_has_its_tokens_in_the_result():
    total = plain(record(result=StoredResult(output="x", usage=TokenUsage(total_tokens=9))))
    assert (total.reported, total.total_tokens) == (1, 9)


def test_long_names_are_cut():
    total = plain(record(crew="c" * 500), "f" * 500, ["t" * 500, *(f"t{number:02}" for number in range(20))])
    assert (len(total.crew), len(total.flow or ""), total.tags) == (60, 60, [f"t{number:02}" for number in range(10)])
    assert plain(record(), None, ["t" * 500]).tags == ["t" * 60]


async def test_who_dies_before_it_has_deleted_the_records_counts_none_of_them_twice(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 1, tzinfo=UTC)
    records = await stored(3, crew, ended_at=day, usage=TokenUsage(total_tokens=10), cost=0.25)
    await add_to_totals(records[:2], plain)
    await add_to_totals(records, plain)
    await add_to_totals(records, plain)
    (total,) = [one for one in await totals_of_removed() if one.crew == crew]
    assert (total.runs, total.reported, total.total_tokens, total.priced, total.cost) == (3, 3, 30, 3, 0.75)
    await deleted(records)
    await add_to_totals(records, plain)
    more = await stored(1, crew, ended_at=day)
    await add_to_totals(more, plain)
    assert await counted(crew) == 4
    assert len(await names(day)) == 1, "one Variable a day"
    (left,) = await read_named(f"crew_usage_{day:%Y%m%d}_")
    assert left.value["refs"] == [more[0].ref], "records that are gone are named no more"


async def test_of_many_that_add_to_a_day_at_the_same_time_each_run_counts_once(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 2, tzinfo=UTC)
    records = await stored(6, crew, ended_at=day)
    await asyncio.gather(*(add_to_totals(records[start:], plain) for start in range(4)))
    assert await counted(crew) == 6


async def test_a_number_that_was_free_when_it_was_read_counts_nothing_later(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 3, tzinfo=UTC)
    first, second, third = [await stored(1, crew, ended_at=day) for _ in range(3)]
    await add_to_totals(first, plain)
    create = totals_module.create_variable
    slept = False

    async def sleeps(variable: Any) -> str | None:
        nonlocal slept
        if not slept:
            slept = True
            await add_to_totals(second, plain)  # takes the number
            await add_to_totals(third, plain)  # takes the one after it, and deletes that
        return await create(variable)

    with mock.patch.object(totals_module, "create_variable", sleeps):
        await add_to_totals([*second, *third], plain)
    assert await counted(crew) == 3
    assert len(await names(day)) == 1


async def test_a_day_with_many_groups_has_several_variables_and_loses_none(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 4, tzinfo=UTC)
    records = await stored(AT_ONCE + 2, crew, ended_at=day)
    by_key = {one.idempotency_key: number for number, one in enumerate(records)}
    await add_to_totals(records, lambda one: plain(one, f"f{by_key[one.idempotency_key]}", ["t" * 60] * 3))
    await deleted(records)
    found = [one for one in await totals_of_removed() if one.crew == crew]
    assert len(found) == len(records)
    assert len(await names(day)) > 1
    await add_to_totals(records, plain)
    assert await counted(crew) == len(records)


async def test_numbers_that_prefect_cannot_hold_are_cut(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 5, tzinfo=UTC)
    records = await stored(2, crew, ended_at=day, usage=TokenUsage(total_tokens=2**62))
    await add_to_totals(records, plain)
    (total,) = [one for one in await totals_of_removed() if one.crew == crew]
    assert total.total_tokens == 2**53


async def test_what_somebody_else_keeps_under_such_a_name_stays(prefect_api: PrefectServer):
    crew, day = f"crew-{uuid.uuid4().hex}", datetime(2020, 1, 6, tzinfo=UTC)
    async with get_client() as client:
        body = {"name": "crew_usage_20200106_4", "value": "mine", "tags": ["prefect-crew-usage"]}
        await client.request("POST", "/variables/", json=body)
    await add_to_totals(await stored(1, crew, ended_at=day), plain)
    assert await counted(crew) == 1
    assert await names(day) == ["crew_usage_20200106_4", "crew_usage_20200106_5"]


async def test_runs_that_never_started_are_no_runs(prefect_api: PrefectServer):
    crew = f"crew-{uuid.uuid4().hex}"
    await add_to_totals([record(crew, phase=RecordPhase.NOT_STARTED, ref="r")], partial(plain, flow="f"))
    assert await counted(crew) == 0


@pytest.mark.parametrize("kind", ["crew", "flow", "tags"])
async def test_totals_tell_crews_flows_and_tags_apart(prefect_api: PrefectServer, kind: str):
    mark, day = uuid.uuid4().hex, datetime(2020, 1, 7, tzinfo=UTC)
    one, two = [(await stored(1, f"{mark}{kind == 'crew' and n}", ended_at=day))[0] for n in (1, 2)]
    await add_to_totals([one], partial(plain, flow="f1", tags=["t1"]))
    await add_to_totals([two], partial(plain, flow=f"f{1 + (kind == 'flow')}", tags=[f"t{1 + (kind == 'tags')}"]))
    assert len([total for total in await totals_of_removed() if total.crew.startswith(mark)]) == 2
