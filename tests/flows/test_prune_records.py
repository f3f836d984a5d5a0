"""The sweep: old ended runs go, everything else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prefect import flow

from prefect_crew import arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.operations import prune_records
from prefect_crew.records.model import utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.totals import read_totals
from support.records import let_pass

SaveCrew = Callable[..., CrewServer]


async def test_old_ended_runs_go_and_a_dry_run_only_counts(save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch):
    save_crew("prune-echo")
    for key in ("prune-old", "prune-young"):
        await arun_crew("prune-echo", {"text": key}, idempotency_key=key)
    with monkeypatch.context() as patch:
        let_pass(patch, "prune-old", 29)
        assert "removed" in await prune_records()
    assert await PrefectRecords().attempts("prune-old"), "30 days are not over"
    let_pass(monkeypatch, "prune-old", 31)

    assert "would go" in await prune_records(dry_run=True)
    assert await PrefectRecords().attempts("prune-old")

    assert "removed" in await prune_records(older_than_days=32)
    assert await PrefectRecords().attempts("prune-old")

    assert "removed" in await prune_records()
    assert not await PrefectRecords().attempts("prune-old")
    assert await PrefectRecords().attempts("prune-young")


async def test_a_setting_says_how_long_records_are_kept(save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch):
    save_crew("prune-echo")
    await arun_crew("prune-echo", {"text": "kept"}, idempotency_key="prune-kept")
    let_pass(monkeypatch, "prune-kept", 31)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", "60")
    await prune_records()
    assert await PrefectRecords().attempts("prune-kept")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", "7")
    await prune_records()
    assert not await PrefectRecords().attempts("prune-kept")
    (total,) = [one for one in (await read_totals())[0] if one.crew == "prune-echo"]
    assert (total.flow, total.day) == ("deployed-crew", utcnow().date())


async def test_a_run_of_a_subflow_is_kept_while_its_root_can_be_retried(
    save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch
):
    crew, keys = save_crew("prune-echo"), []

    @flow
    async def below() -> None:
        result = await arun_crew("prune-echo", {"text": "below"})
        record = await PrefectRecords().of_kickoff(result.kickoff_id)
        assert record is not None
        keys.append(record.idempotency_key)

    @flow
    async def root() -> None:
        await below()
        (key,) = keys
        with monkeypatch.context() as patch:
            let_pass(patch, key, 31)
            await prune_records()
        assert await PrefectRecords().attempts(key), "its root runs"

    await root()
    with monkeypatch.context() as patch:
        let_pass(patch, keys[0], 31)
        await prune_records()
    assert not await PrefectRecords().attempts(keys[0])
    assert crew.kickoffs >= 1
