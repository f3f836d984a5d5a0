"""What may be removed, and what never: pure, and on a real Prefect server."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
from prefect.client.orchestration import get_client

from prefect_crew.records import prune as prune_module
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.prune import Pruned, prunable, prune
from prefect_crew.records.store import PrefectRecords, waiter_prefix
from support.prefect_server import PrefectServer

NOW = utcnow()
AGE = timedelta(days=90)
OLD, NEW = AGE.total_seconds() + 1.0, AGE.total_seconds() - 1.0
"""Seconds for which nobody has changed a record."""


def record(key: str, phase: RecordPhase, idle: float = 0.0, *, attempt: int = 1, **facts: Any) -> RunRecord:
    return RunRecord(
        idempotency_key=key,
        attempt=attempt,
        phase=phase,
        crew="c",
        crew_url="https://c.example.com",
        inputs_digest="d",
        owner="o",
        claimed_at=NOW,
        ended_at=NOW if phase is RecordPhase.ENDED else None,
        kickoff_id="k" if phase in (RecordPhase.ENDED, RecordPhase.STARTED) else None,
        idle=idle,
        **facts,
    )


@pytest.mark.parametrize(
    ("phase", "idle", "goes"),
    [
        pytest.param(RecordPhase.ENDED, OLD, True, id="old-and-ended"),
        pytest.param(RecordPhase.ENDED, NEW, False, id="young-and-ended"),
        pytest.param(RecordPhase.NOT_STARTED, OLD, True, id="old-and-not-started"),
        pytest.param(RecordPhase.NOT_STARTED, NEW, False, id="young-and-not-started"),
        pytest.param(RecordPhase.STARTED, OLD, False, id="in-flight"),
        pytest.param(RecordPhase.UNCERTAIN, OLD, False, id="uncertain"),
        pytest.param(RecordPhase.CLAIMED, OLD, False, id="claimed"),
    ],
)
def test_what_goes(phase: RecordPhase, idle: float, goes: bool):
    assert bool(prunable([record("a", phase, idle)], AGE)) is goes


@pytest.mark.parametrize(("idle", "goes"), [(3600.0, False), (3649.0, False), (3650.0, True)])
def test_whatever_age_is_asked_for_a_record_stays_for_an_hour_more_than_its_claim_is_good_for(idle: float, goes: bool):
    assert bool(prunable([record("a", RecordPhase.NOT_STARTED, idle, good_for=50.0)], timedelta(0))) is goes


@pytest.mark.parametrize("later", [RecordPhase.UNCERTAIN, RecordPhase.STARTED, RecordPhase.ENDED])
def test_a_key_goes_as_a_whole_or_not_at_all(later: RecordPhase):
    first = record("a", RecordPhase.ENDED, OLD)
    second = record("a", later, NEW, attempt=2)
    assert prunable([second, first], AGE) == []
    other = record("b", RecordPhase.ENDED, OLD)
    assert prunable([second, other, first], AGE) == [other]


def test_the_first_attempt_which_a_new_call_would_claim_goes_last():
    attempts = [record("a", RecordPhase.ENDED, OLD, attempt=number) for number in (3, 1, 2)]
    assert [going.attempt for going in prunable(attempts, AGE)] == [3, 2, 1]


async def pruned(store: PrefectRecords, **options: Any) -> Pruned:
    """Prune as if an hour had passed since everything that stands there was written."""
    with mock.patch.object(prune_module, "YOUNGEST", timedelta(0)):
        return await prune(store, older_than=timedelta(0), **options)


async def test_records_and_left_over_notes_go_from_a_real_server(prefect_api: PrefectServer):
    store, mark = PrefectRecords(), uuid.uuid4().hex
    ended = record(f"{mark} ended", RecordPhase.ENDED)
    flying = record(f"{mark} flying", RecordPhase.STARTED)
    for one in (ended, flying):
        assert await store.claim(one)
        await store.add_waiter(one, str(uuid.uuid4()))
    assert (await prune(store, older_than=timedelta(0), dry_run=True)).runs == 0, "nothing is an hour old"
    counted = await pruned(store, dry_run=True)
    assert counted.runs >= 1
    assert await store.attempts(ended.idempotency_key)
    done = await pruned(store)
    # Records of other tests on this server may come of age in between.
    assert (done.runs >= counted.runs, done.notes) == (True, counted.notes)
    assert await store.attempts(ended.idempotency_key) == []
    assert len(await store.attempts(flying.idempotency_key)) == 1
    notes = await store.waiter_notes()
    assert not any(name.startswith(waiter_prefix(ended)) for name in notes)
    assert sum(name.startswith(waiter_prefix(flying)) for name in notes) == 1


async def test_permits_whose_record_is_gone_go(prefect_api: PrefectServer):
    store, mark = PrefectRecords(), uuid.uuid4().hex
    killed, flying = record(f"{mark} killed", RecordPhase.CLAIMED), record(f"{mark} flying", RecordPhase.CLAIMED)
    for one in (killed, flying):
        assert await store.claim(one)
        assert await store.permit(one, 30.0, late=False)
    async with get_client() as client:
        await client.request("DELETE", "/variables/{id}", path_params={"id": str(killed.ref)})
    await prune(store)
    assert (str(flying.ref), str(flying.strongest.ref)) in (left := [one async for one in store.permits()])
    assert str(killed.ref) not in dict(left)


async def test_how_long_a_record_has_not_been_changed_is_measured_by_the_server(prefect_api: PrefectServer):
    store = PrefectRecords()
    one = record(f"key {uuid.uuid4()}", RecordPhase.CLAIMED)
    assert await store.claim(one)
    assert await store.permit(one, 30.0, late=False)
    await asyncio.sleep(5.0)
    before = (await store.attempts(one.idempotency_key))[0].idle
    one.phase = RecordPhase.NOT_STARTED
    await store.save(one)
    after = (await store.attempts(one.idempotency_key))[0].idle
    assert before >= 2.0  # the Date of an answer has whole seconds
    assert after < before
