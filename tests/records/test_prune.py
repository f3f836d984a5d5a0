"""What may be removed, and what never: pure, and on a real Prefect server."""

import asyncio
import logging
import math
import time
import uuid
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.records import prune as prune_module
from prefect_crew.records import variables
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.prune import GONE, Pruned, owner_ids, prunable, prune, prune_regularly, read_owners
from prefect_crew.records.store import PrefectRecords, record_name
from prefect_crew.records.variables import delete_variable
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.records import CLAIMED, ENDED, NOT_STARTED, STARTED, UNCERTAIN, new_record, put, read_named

STORE = PrefectRecords()
NOW = utcnow()
AGE = timedelta(days=90)
OLD, NEW = AGE.total_seconds() + 1.0, AGE.total_seconds() - 1.0
"""Seconds for which nobody has changed a record."""


def record(key: str, phase: RecordPhase, idle: float = 0.0, **facts: Any) -> RunRecord:
    ended_at = NOW if phase is ENDED else None
    return new_record(key, phase=phase, idle=idle, claimed_at=NOW, **{"ended_at": ended_at, **facts})


@pytest.mark.parametrize(
    ("phase", "idle", "goes"),
    [
        pytest.param(ENDED, OLD, True, id="old-and-ended"),
        pytest.param(ENDED, NEW, False, id="young-and-ended"),
        pytest.param(NOT_STARTED, OLD, True, id="old-and-not-started"),
        pytest.param(NOT_STARTED, NEW, False, id="young-and-not-started"),
        pytest.param(STARTED, OLD, False, id="in-flight"),
        pytest.param(UNCERTAIN, OLD, False, id="uncertain"),
        pytest.param(CLAIMED, OLD, False, id="claimed"),
    ],
)
def test_what_goes(phase: RecordPhase, idle: float, goes: bool):
    assert bool(prunable([record("a", phase, idle)], AGE, {})) is goes


@pytest.mark.parametrize(("idle", "goes"), [(3600.0, False), (3649.0, False), (3650.0, True)])
def test_a_record_stays_for_an_hour_after_its_claim(idle: float, goes: bool):
    assert bool(prunable([record("a", NOT_STARTED, idle, good_for=50.0)], timedelta(0), {})) is goes


@pytest.mark.parametrize("later", [UNCERTAIN, STARTED, ENDED])
def test_a_key_goes_as_a_whole_or_not_at_all(later: RecordPhase):
    first = record("a", ENDED, OLD)
    second = record("a", later, NEW, attempt=2)
    assert prunable([second, first], AGE, {}) == []
    other = record("b", ENDED, OLD)
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
    attempts = [record(key, ENDED, OLD, **facts), record(key, ENDED, OLD, attempt=2)]
    assert len(prunable(attempts, AGE, owners)) == (2 if goes else 0), "both attempts, or none"


@pytest.mark.parametrize(
    "named", ["no-id", "550E8400-E29B-41D4-A716-446655440000", "{550e8400-e29b-41d4-a716-446655440000}"]
)
def test_what_is_no_flow_runs_id_is_not_asked_for(named: str):
    assert owner_ids(record(f"{named}/x", ENDED, flow_run_id=named)) == []


def test_the_first_attempt_goes_last():
    attempts = [record("a", ENDED, OLD, attempt=number) for number in (3, 1, 2)]
    assert [going.attempt for going in prunable(attempts, AGE, {})] == [3, 2, 1]


async def pruned(**options: Any) -> Pruned:
    """Prune as if an hour had passed since everything that stands there was written."""
    with mock.patch.object(prune_module, "YOUNGEST", timedelta(0)):
        return await prune(STORE, older_than=timedelta(0), share=1.0, **options)


async def test_pruning_pauses_for_most_of_the_time(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    pauses = list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    # Only the walk's own: other tasks and threads sleep too.
    monkeypatch.setattr(prune_module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    began = time.monotonic()
    await prune(STORE, dry_run=True)
    took = time.monotonic() - began
    assert pauses
    assert 0 < sum(pauses) <= 19.1 * took


async def test_records_of_ended_runs_are_pruned(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variables, "PAGE", 7)
    monkeypatch.setattr(prune_module, "VARIABLES", 7)
    mark = uuid.uuid4().hex
    ended = [record(f"{mark} {number}", ENDED) for number in range(20)]
    flying = record(f"{mark} flying", STARTED)
    for each in (*ended[:10], flying, *ended[10:]):
        assert await STORE.claim(each)

    async def left() -> int:
        return sum([len(await STORE.attempts(each.idempotency_key)) for each in ended])

    assert (await prune(STORE, older_than=timedelta(0), dry_run=True)).runs == 0, "nothing is an hour old"
    counted = await pruned(dry_run=True)
    assert counted.runs >= 20
    assert await left() == 20
    # Records of other tests on this server may come of age in between.
    assert (await pruned()).runs >= counted.runs
    assert await left() == 0
    assert await STORE.attempts(flying.idempotency_key)


async def test_permits_left_by_a_killed_pruner_are_pruned(prefect_api: PrefectServer):
    async def permits(claim: RunRecord) -> int:
        entries = await read_named(f"{record_name(claim.idempotency_key, 1)}_")
        return len([entry for entry in entries if entry.value["owner"]])

    gone, stands = [await put(record(str(uuid.uuid4()), CLAIMED), permit=60.0) for _ in range(2)]
    await delete_variable(str(gone.ref))
    await asyncio.sleep(2.0)  # the Date of an answer has whole seconds, and is one late
    await prune(STORE, older_than=timedelta(0))
    assert await permits(gone) == 1, "its record was deleted within the hour"
    await pruned()
    assert await permits(gone) == 0
    assert await permits(stands) == 1


async def flow_run(parent: str | None = None) -> str:
    """Make a flow run that has completed, as a subflow if a parent is given; return its id."""
    async with get_client() as client:
        flow = (await client.request("POST", "/flows/", json={"name": "pruned-flow"})).json()["id"]
        body: dict[str, Any] = {"flow_id": flow, "state": {"type": "COMPLETED"}}
        if parent is not None:
            task = {"flow_run_id": parent, "task_key": "sub", "dynamic_key": str(uuid.uuid4())}
            body["parent_task_run_id"] = (await client.request("POST", "/task_runs/", json=task)).json()["id"]
        return str((await client.request("POST", "/flow_runs/", json=body)).json()["id"])


async def test_flow_runs_are_asked_for_together(prefect_api: PrefectServer, proxy: Proxy):
    root = await flow_run()
    flow_run_ids = [await flow_run(root) for _ in range(60)]
    before = proxy.count("_runs/")
    owners = await read_owners([record(id_, ENDED, flow_run_id=id_) for id_ in flow_run_ids])
    assert all(owners[flow_run_id] < GONE for flow_run_id in flow_run_ids)
    assert proxy.count("_runs/") - before <= 6


async def test_unread_flow_runs_keep_all_records(prefect_api: PrefectServer, proxy: Proxy):
    ended = record(f"key {uuid.uuid4()}", ENDED, flow_run_id=await flow_run())
    assert await STORE.claim(ended)
    proxy.refuse, proxy.answer = "POST /api/flow_runs/filter", ""
    # Prefect's client would send it again for a minute.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), pytest.raises(PREFECT_ERRORS):
        await pruned()
    assert await STORE.attempts(ended.idempotency_key)


async def test_a_worker_prunes_regularly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    answers = [httpx.ConnectError("away"), ValueError("odd"), Pruned(runs=2, kept=5), asyncio.CancelledError()]
    monkeypatch.setattr(prune_module, "prune", mock.AsyncMock(side_effect=answers))
    monkeypatch.setattr(prune_module, "FIRST_WITHIN", 0.01)
    monkeypatch.setattr(prune_module, "EVERY", 0.01)
    with caplog.at_level("DEBUG"), pytest.raises(asyncio.CancelledError):
        await prune_regularly(logging.getLogger("test-prune"))
    lines = [line for line in caplog.records if line.name == "test-prune"]
    assert [line.levelname for line in lines] == ["DEBUG", "ERROR", "INFO"]
    assert lines[2].getMessage() == "2 old run records were removed, 5 others of this age stay."
