"""What may be removed, and what never: pure, and on a real Prefect server."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client

from prefect_crew.records import prune as prune_module
from prefect_crew.records import variables
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.prune import GONE, Pruned, owner_ids, prunable, prune, prune_regularly, read_owners
from prefect_crew.records.store import PrefectRecords, record_name
from prefect_crew.records.variables import delete_variable
from support.prefect_server import PrefectServer
from support.records import new_record, read_named

NOW = utcnow()
AGE = timedelta(days=90)
OLD, NEW = AGE.total_seconds() + 1.0, AGE.total_seconds() - 1.0
"""Seconds for which nobody has changed a record."""


def record(key: str, phase: RecordPhase, idle: float = 0.0, **facts: Any) -> RunRecord:
    ended_at = NOW if phase is RecordPhase.ENDED else None
    return new_record(key, phase=phase, idle=idle, claimed_at=NOW, **{"ended_at": ended_at, **facts})


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
    assert bool(prunable([record("a", phase, idle)], AGE, {})) is goes


@pytest.mark.parametrize(("idle", "goes"), [(3600.0, False), (3649.0, False), (3650.0, True)])
def test_a_record_stays_for_an_hour_after_its_claim(idle: float, goes: bool):
    assert bool(prunable([record("a", RecordPhase.NOT_STARTED, idle, good_for=50.0)], timedelta(0), {})) is goes


@pytest.mark.parametrize("later", [RecordPhase.UNCERTAIN, RecordPhase.STARTED, RecordPhase.ENDED])
def test_a_key_goes_as_a_whole_or_not_at_all(later: RecordPhase):
    first = record("a", RecordPhase.ENDED, OLD)
    second = record("a", later, NEW, attempt=2)
    assert prunable([second, first], AGE, {}) == []
    other = record("b", RecordPhase.ENDED, OLD)
    assert prunable([second, other, first], AGE, {}) == [other]


@pytest.mark.parametrize(
    ("owner", "goes"),
    [
        pytest.param(OLD, True, id="ended-long-ago"),
        pytest.param(NEW, False, id="ended-of-late"),
        pytest.param(-math.inf, False, id="runs"),
        pytest.param(GONE, True, id="deleted"),
        pytest.param(None, False, id="not-asked-for"),
    ],
)
@pytest.mark.parametrize("named", ["by the record", "by the key"])
def test_a_record_stays_while_its_flow_run_may_retry(owner: float | None, goes: bool, named: str):
    ours = str(uuid.uuid4())
    key, facts = (f"{ours}/c/d/1", {}) if named == "by the key" else ("a", {"flow_run_id": ours})
    owners = {} if owner is None else {ours: owner}
    attempts = [record(key, RecordPhase.ENDED, OLD, **facts), record(key, RecordPhase.ENDED, OLD, attempt=2)]
    assert len(prunable(attempts, AGE, owners)) == (2 if goes else 0), "both attempts, or none"


@pytest.mark.parametrize(
    "named", ["no-id", "550E8400-E29B-41D4-A716-446655440000", "{550e8400-e29b-41d4-a716-446655440000}"]
)
def test_what_is_no_flow_runs_id_is_not_asked_for(named: str):
    assert owner_ids(record(f"{named}/x", RecordPhase.ENDED, flow_run_id=named)) == []


def test_the_first_attempt_goes_last():
    attempts = [record("a", RecordPhase.ENDED, OLD, attempt=number) for number in (3, 1, 2)]
    assert [going.attempt for going in prunable(attempts, AGE, {})] == [3, 2, 1]


async def pruned(store: PrefectRecords, **options: Any) -> Pruned:
    """Prune as if an hour had passed since everything that stands there was written."""
    with mock.patch.object(prune_module, "YOUNGEST", timedelta(0)):
        return await prune(store, older_than=timedelta(0), share=1.0, **options)


async def test_pruning_walks_over_many_pages(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    store, mark = PrefectRecords(), uuid.uuid4().hex
    monkeypatch.setattr(variables, "PAGE", 7)
    monkeypatch.setattr(prune_module, "VARIABLES", 7)
    records = [record(f"{mark} {number}", RecordPhase.ENDED) for number in range(20)]
    flying = record(f"{mark} flying", RecordPhase.STARTED)
    for one in (*records[:10], flying, *records[10:]):
        assert await store.claim(one)
    await pruned(store)
    assert [one.idempotency_key for one in records if await store.attempts(one.idempotency_key)] == []
    assert len(await store.attempts(flying.idempotency_key)) == 1


async def test_pruning_pauses_for_most_of_the_time(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    pauses = list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(prune_module.asyncio, "sleep", sleep)
    began = time.monotonic()
    await prune(PrefectRecords(), dry_run=True)
    took = time.monotonic() - began
    assert pauses
    assert 0 < sum(pauses) <= 19.1 * took


async def test_records_of_ended_runs_are_pruned(prefect_api: PrefectServer):
    store, mark = PrefectRecords(), uuid.uuid4().hex
    ended = record(f"{mark} ended", RecordPhase.ENDED)
    flying = record(f"{mark} flying", RecordPhase.STARTED)
    for one in (ended, flying):
        assert await store.claim(one)
    assert (await prune(store, older_than=timedelta(0), dry_run=True)).runs == 0, "nothing is an hour old"
    counted = await pruned(store, dry_run=True)
    assert counted.runs >= 1
    assert await store.attempts(ended.idempotency_key)
    done = await pruned(store)
    # Records of other tests on this server may come of age in between.
    assert done.runs >= counted.runs
    assert await store.attempts(ended.idempotency_key) == []
    assert len(await store.attempts(flying.idempotency_key)) == 1


async def test_permits_left_by_a_killed_pruner_are_pruned(prefect_api: PrefectServer):
    store = PrefectRecords()
    gone, stands = record("gone", RecordPhase.CLAIMED), record("stands", RecordPhase.CLAIMED)
    for one in (gone, stands):
        one.idempotency_key = f"{one.idempotency_key} {uuid.uuid4()}"
        assert await store.claim(one)
        assert await store.permit(one, 60.0)
    await delete_variable(str(gone.ref))
    await asyncio.sleep(2.0)  # the Date of an answer has whole seconds, and is one late
    await prune(store, older_than=timedelta(0))
    assert len(await permits_of(gone)) == 1, "its record was deleted within the hour"
    await pruned(store)
    assert await permits_of(gone) == []
    assert len(await permits_of(stands)) == 1


async def permits_of(claim: RunRecord) -> list[Any]:
    return [one for one in await read_named(f"{record_name(claim.idempotency_key, 1)}_") if one.value["owner"]]


async def flow_run(state: str, *, parent: str | None = None, tags: Sequence[str] = ()) -> str:
    """Make a flow run in a state, as a subflow if a parent is given; return its id."""
    async with get_client() as client:
        flow = (await client.request("POST", "/flows/", json={"name": "pruned-flow"})).json()["id"]
        body: dict[str, Any] = {"flow_id": flow, "state": {"type": state}, "tags": [*tags]}
        if parent is not None:
            task = {"flow_run_id": parent, "task_key": "sub", "dynamic_key": str(uuid.uuid4())}
            body["parent_task_run_id"] = (await client.request("POST", "/task_runs/", json=task)).json()["id"]
        return str((await client.request("POST", "/flow_runs/", json=body)).json()["id"])


async def test_a_subflows_record_goes_with_its_root(prefect_api: PrefectServer):
    store = PrefectRecords()
    root = await flow_run("RUNNING")
    subflow = await flow_run("COMPLETED", parent=await flow_run("COMPLETED", parent=root))
    one = record(f"key {uuid.uuid4()}", RecordPhase.ENDED, flow_run_id=subflow)
    assert await store.claim(one)

    async def enter(state: str) -> None:
        async with get_client() as client:
            body = {"state": {"type": state}, "force": True}
            await client.request("POST", "/flow_runs/{id}/set_state", path_params={"id": root}, json=body)
        await asyncio.sleep(2.0)  # the Date of an answer has whole seconds, and is one late

    async def stands() -> bool:
        await pruned(store)
        return bool(await store.attempts(one.idempotency_key))

    assert await stands(), "its root runs"
    await enter("COMPLETED")
    await prune(store, older_than=timedelta(0))
    assert await store.attempts(one.idempotency_key), "its root has ended within the hour"
    await enter("SCHEDULED")
    assert await stands(), "its root is retried"
    await enter("COMPLETED")
    assert not await stands()


async def test_flow_runs_are_asked_for_together(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    request = PrefectClient.request

    async def noted(self: Any, method: Any, path: Any, **more: Any) -> Any:
        asked.append(path)
        return await request(self, method, path, **more)

    root = await flow_run("COMPLETED")
    owners = [await flow_run("COMPLETED", parent=root) for _ in range(60)]
    monkeypatch.setattr(PrefectClient, "request", noted)
    found = await read_owners([record(str(n), RecordPhase.ENDED, flow_run_id=one) for n, one in enumerate(owners)])
    assert len(found) == 60
    assert len(asked) <= 6


async def test_unread_flow_runs_keep_all_records(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    store = PrefectRecords()
    one = record(f"key {uuid.uuid4()}", RecordPhase.ENDED, flow_run_id=await flow_run("COMPLETED"))
    assert await store.claim(one)
    request = PrefectClient.request

    async def away(self: Any, method: Any, path: Any, **more: Any) -> Any:
        if path == "/flow_runs/filter":
            raise httpx.ConnectError("All connection attempts failed")
        return await request(self, method, path, **more)

    monkeypatch.setattr(PrefectClient, "request", away)
    with pytest.raises(httpx.ConnectError):
        await pruned(store)
    assert await store.attempts(one.idempotency_key)


async def test_a_worker_prunes_regularly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    answers = [httpx.ConnectError("away"), ValueError("odd"), Pruned(runs=2, kept=5), asyncio.CancelledError()]
    monkeypatch.setattr(prune_module, "prune", mock.AsyncMock(side_effect=answers))
    monkeypatch.setattr(prune_module, "FIRST_WITHIN", 0.01)
    monkeypatch.setattr(prune_module, "EVERY", 0.01)
    with caplog.at_level("DEBUG"), pytest.raises(asyncio.CancelledError):
        await prune_regularly(logging.getLogger("test-prune"))
    said = [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "test-prune"]
    assert [level for level, _ in said] == ["DEBUG", "ERROR", "INFO"]
    assert said[2][1] == "2 old run records were removed, 5 others of this age stay."
