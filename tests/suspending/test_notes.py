"""Who is suspended for which run: on the Prefect server, beside the record, one for each flow run, gone with it."""

from __future__ import annotations

import uuid

import pytest

from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RunRecord, utcnow
from prefect_crew.suspending.resuming import Attended, attend
from prefect_crew.suspending.suspended import SuspendedWait, SuspendedWaits
from prefect_crew.waiting import WaitPolicy

pytestmark = pytest.mark.usefixtures("prefect_api")


def record(run_key: str, attempt: int = 1) -> RunRecord:
    return RunRecord(
        run_key=run_key,
        attempt=attempt,
        crew="travel",
        crew_url="http://127.0.0.1",
        inputs_digest="d",
        owner="o",
        claimed_at=utcnow(),
        known_by=utcnow(),
    )


def wait(run_key: str, attempt: int = 1) -> SuspendedWait:
    return SuspendedWait(
        flow_run_id=str(uuid.uuid4()),
        run_key=run_key,
        attempt=attempt,
        since=utcnow(),
        policy=WaitPolicy(mode="suspend", timeout=None),
    )


async def test_several_flow_runs_wait_for_one_run_and_each_is_found():
    key = f"notes/{uuid.uuid4()}"
    first, second, other = wait(key), wait(key), wait(key, attempt=2)
    waits = SuspendedWaits()
    for one in (first, second, other, first):  # a second time replaces
        await waits.put(one)
    assert {one.flow_run_id for one in await waits.of(key, 1)} == {first.flow_run_id, second.flow_run_id}
    assert await waits.of(key, 1, second.flow_run_id) == [second]
    assert await waits.waits(record(key), first.flow_run_id)
    assert not await waits.waits(record(key), other.flow_run_id)
    assert not await waits.waits(record(key), None)
    await waits.forget(record(key), first.flow_run_id)
    await waits.forget(record(key), first.flow_run_id)  # harmless
    assert await waits.of(key, 1) == [second]
    assert other in [one async for one in waits.all()]


async def test_they_go_with_the_record_of_their_attempt():
    key = f"notes/{uuid.uuid4()}"
    store, waits = PrefectRecords(), SuspendedWaits()
    assert await store.claim(record(key))
    for one in (wait(key), wait(key), wait(key, attempt=2)):
        await waits.put(one)
    await store.delete(record(key))
    assert not await waits.of(key, 1)
    assert len(await waits.of(key, 2)) == 1


async def test_one_of_a_flow_run_that_is_gone_is_taken_away():
    key = f"notes/{uuid.uuid4()}"
    gone, waits = wait(key), SuspendedWaits()
    await waits.put(gone)
    assert await attend([gone]) == {gone.flow_run_id: Attended.OVER}
    assert not await waits.of(key, 1)
