"""Resolving an uncertain kickoff, on a real Prefect server: what is accepted, what is refused, and what then stands."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest

from prefect_crew.client.models import CrewStatus
from prefect_crew.exceptions import ConfigurationError, CrewConnectionError, CrewError
from prefect_crew.records.model import Caller, Decision, RecordPhase, RunRecord, decide, utcnow
from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
from prefect_crew.records.store import PrefectRecords
from prefect_crew.states import CrewState
from support.records import LONG_AGO, put

pytestmark = pytest.mark.usefixtures("prefect_api")


async def stored(*, permit: float | None = None, **facts: Any) -> RunRecord:
    now = utcnow()
    record = RunRecord(
        **{
            "idempotency_key": f"key {uuid.uuid4()}",
            "attempt": 1,
            "phase": RecordPhase.UNCERTAIN,
            "crew": "travel",
            "crew_url": "https://travel.example.com",
            "inputs_digest": "d" * 32,
            "owner": uuid.uuid4().hex,
            "claimed_at": now - timedelta(minutes=5),
            "reason": "the connection broke",
            **facts,
        }
    )
    return await put(record, permit=permit)


def look(state: CrewState) -> Any:
    async def look(kickoff_id: str) -> CrewStatus:
        return CrewStatus(kickoff_id=kickoff_id, state=state)

    return look


async def latest(record: RunRecord) -> RunRecord:
    return (await PrefectRecords().attempts(record.idempotency_key))[-1]


def decision(record: RunRecord) -> Decision:
    return decide(record, caller=Caller(owner="somebody"), kickoffs=1)


@pytest.mark.parametrize("state", [CrewState.PENDING, CrewState.RUNNING, CrewState.COMPLETED, CrewState.FAILED])
async def test_a_run_that_the_crew_knows_is_waited_for_from_then_on(state: CrewState):
    record, store, kickoff_id = await stored(), PrefectRecords(), f"k-{uuid.uuid4()}"
    assert decision(record) is Decision.UNCERTAIN
    assert (
        await resolve_started(await unresolved(record.idempotency_key, store), kickoff_id, store, look=look(state))
        is state
    )
    resolved = await latest(record)
    assert (resolved.phase, resolved.kickoff_id, resolved.reason) == (RecordPhase.STARTED, kickoff_id, None)
    assert resolved.kicked_off_at == record.claimed_at
    assert decision(resolved) is Decision.REATTACH
    found = await store.of_kickoff(kickoff_id)
    assert found is not None
    assert found.idempotency_key == record.idempotency_key


async def test_one_that_never_started_is_no_purchase():
    record, store = await stored(), PrefectRecords()
    await resolve_never_started(await unresolved(record.idempotency_key, store), store)
    resolved = await latest(record)
    assert resolved.counts is False
    assert decision(resolved) is Decision.START


@pytest.mark.parametrize("told", ["started", "never started"])
async def test_who_was_slower_is_told_so(told: str):
    record, store = await stored(), PrefectRecords()
    read = await unresolved(record.idempotency_key, store)
    await resolve_started(await unresolved(record.idempotency_key, store), f"k-{uuid.uuid4()}", store)
    with pytest.raises(CrewError, match="was resolved by somebody else: it is started, run k-"):
        await (resolve_started(read, "other", store) if told == "started" else resolve_never_started(read, store))
    assert (await latest(record)).phase is RecordPhase.STARTED


async def test_an_id_that_the_crew_does_not_know_changes_nothing():
    record, store = await stored(), PrefectRecords()
    with pytest.raises(ConfigurationError, match="does not know run k9"):
        await resolve_started(
            await unresolved(record.idempotency_key, store), "k9", store, look=look(CrewState.UNKNOWN)
        )
    assert (await latest(record)).phase is RecordPhase.UNCERTAIN


async def test_an_id_of_another_record_changes_nothing():
    store, kickoff_id = PrefectRecords(), f"k-{uuid.uuid4()}"
    other = await stored(phase=RecordPhase.STARTED, kickoff_id=kickoff_id)
    record = await stored()
    with pytest.raises(ConfigurationError, match=f"belongs to the idempotency key '{other.idempotency_key}'"):
        await resolve_started(
            await unresolved(record.idempotency_key, store), kickoff_id, store, look=look(CrewState.RUNNING)
        )
    assert (await latest(record)).phase is RecordPhase.UNCERTAIN


async def test_a_crew_that_cannot_be_asked_changes_nothing():
    async def away(kickoff_id: str) -> CrewStatus:
        raise CrewConnectionError(method="GET", url="https://x", reason="refused", sent=False, kickoff_id=kickoff_id)

    record, store = await stored(), PrefectRecords()
    with pytest.raises(CrewConnectionError):
        await resolve_started(await unresolved(record.idempotency_key, store), "k1", store, look=away)
    assert (await latest(record)).phase is RecordPhase.UNCERTAIN


async def test_a_claim_that_nobody_holds_any_more_can_be_resolved():
    store = PrefectRecords()
    stale = await stored(phase=RecordPhase.CLAIMED, permit=LONG_AGO)
    assert (await unresolved(stale.idempotency_key, store)).owner == stale.owner
    await resolve_never_started(await unresolved(stale.idempotency_key, store), store)
    assert decision(await latest(stale)) is Decision.START


async def test_a_kickoff_that_may_still_be_sent_is_not_resolved_whatever_its_flow_run_says():
    gone = str(uuid.uuid4())
    orphan = await stored(phase=RecordPhase.CLAIMED, permit=60.0, flow_run_id=gone)
    store = PrefectRecords()
    assert await store.owner_ended(orphan)
    with pytest.raises(CrewError, match=r"on its way\. Nothing was changed\. Resolve it in \d+ s"):
        await unresolved(orphan.idempotency_key, store)
    with pytest.raises(CrewError, match="may still be sent"):
        await resolve_never_started(await latest(orphan), store)
    assert (await latest(orphan)).phase is RecordPhase.CLAIMED


async def test_a_claim_whose_kickoff_was_never_sent_is_no_run():
    store = PrefectRecords()
    record = await stored(phase=RecordPhase.CLAIMED, good_for=LONG_AGO)
    with pytest.raises(ConfigurationError, match="was never sent: whoever claimed it ended before that"):
        await resolve_started(await unresolved(record.idempotency_key, store), "k1", store)


async def test_whoever_resolves_and_an_owner_that_lives_cannot_both_succeed():
    store = PrefectRecords()
    owner = await stored(phase=RecordPhase.CLAIMED, good_for=LONG_AGO)
    await resolve_never_started(await unresolved(owner.idempotency_key, store), store)
    assert not await store.permit(owner, 30, late=False)
    other = await stored(phase=RecordPhase.CLAIMED, good_for=LONG_AGO)
    read = await unresolved(other.idempotency_key, store)
    assert await store.permit(other, 30, late=False)
    with pytest.raises(CrewError, match="may still be sent"):
        await resolve_never_started(read, store)


async def test_a_late_write_takes_nothing_back():
    store = PrefectRecords()
    late = await stored(phase=RecordPhase.CLAIMED, permit=LONG_AGO)
    await resolve_started(await unresolved(late.idempotency_key, store), kickoff_id := f"k-{uuid.uuid4()}", store)
    late.phase = RecordPhase.UNCERTAIN
    await store.save(late)
    late.phase = RecordPhase.NOT_STARTED
    await store.save(late)
    now = await latest(late)
    assert (now.phase, now.kickoff_id) == (RecordPhase.STARTED, kickoff_id)
    ended = now.model_copy(update={"phase": RecordPhase.ENDED, "state": CrewState.COMPLETED})
    await store.save(ended)
    await store.save(now)
    late.phase, late.kickoff_id = RecordPhase.STARTED, kickoff_id
    await store.save(late)
    assert (await latest(late)).phase is RecordPhase.ENDED


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        pytest.param({"phase": RecordPhase.CLAIMED, "permit": 60.0}, "may still be sent", id="posted-now"),
        pytest.param({"phase": RecordPhase.STARTED, "kickoff_id": "k1"}, "run k1 is started", id="started"),
        pytest.param(
            {"phase": RecordPhase.ENDED, "kickoff_id": "k1", "state": "failed"}, "run k1 is failed", id="ended"
        ),
        pytest.param({"phase": RecordPhase.NOT_STARTED}, "it is not-started", id="not-started"),
    ],
)
async def test_there_is_nothing_to_resolve(facts: dict[str, Any], said: str):
    record = await stored(**facts)
    with pytest.raises(CrewError, match=said):
        await unresolved(record.idempotency_key, PrefectRecords())


async def test_nobody_used_the_key():
    with pytest.raises(CrewError, match="No run has the key"):
        await unresolved("never used", PrefectRecords())
