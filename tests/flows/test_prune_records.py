"""The sweep: old ended runs go, everything else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefect_crew import arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.operations import prune_records
from prefect_crew.records.store import PrefectRecords
from support.records import let_pass

SaveCrew = Callable[..., CrewServer]


async def test_old_ended_runs_go_and_a_dry_run_only_counts(save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch):
    save_crew("prune-echo")
    for key in ("prune-old", "prune-young"):
        await arun_crew("prune-echo", {"text": key}, idempotency_key=key)
    let_pass(monkeypatch, "prune-old", 91)

    assert "would go" in await prune_records(dry_run=True)
    assert await PrefectRecords().attempts("prune-old")

    assert "removed" in await prune_records(older_than_days=90)
    assert not await PrefectRecords().attempts("prune-old")
    assert await PrefectRecords().attempts("prune-young")
