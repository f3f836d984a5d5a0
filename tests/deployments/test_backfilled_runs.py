"""A backfill on a worker: each day is started once, under its own key, however often one fills."""

from __future__ import annotations

import asyncio
from datetime import date

import pytest

from prefect_crew.deployments import BackfilledRun, backfill
from support.deployed import wait_for_state
from support.prefect_server import connected
from support.site import Site
from support.workers import Worker


def flow_run_id(run: BackfilledRun) -> str:
    assert run.flow_run is not None
    return str(run.flow_run.id)


@pytest.mark.slow
def test_each_day_is_started_once_under_its_own_key(site: Site, worker: Worker):
    def fill() -> list[BackfilledRun]:
        with connected(site.server, site.folder / "home"):
            return asyncio.run(backfill("one-crew/daily", date(2025, 3, 1), date(2025, 3, 3), schedule="food"))

    first = fill()
    for run in first:
        ended = wait_for_state(site.seen, flow_run_id(run), seconds=120)
        assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    again = fill()
    assert [(run.created, run.flow_run and run.flow_run.state_name) for run in again] == [(False, "Completed")] * 3
    started = {key: times for key, times in site.crews["travel"].kickoffs_by_key.items() if "2025-03" in key}
    assert started == {f"travel-food-2025-03-0{day}": 1 for day in (1, 2, 3)}


@pytest.mark.slow
def test_a_day_that_was_run_by_hand_is_not_started_again(site: Site, worker: Worker):
    by_hand = site.start("one-crew/daily", {"idempotency_key": "travel-food-2025-04-01"})
    assert wait_for_state(site.seen, by_hand)["state_type"] == "COMPLETED"
    with connected(site.server, site.folder / "home"):
        (run,) = asyncio.run(backfill("one-crew/daily", date(2025, 4, 1), date(2025, 4, 1), schedule="food"))
    assert run.created
    assert wait_for_state(site.seen, flow_run_id(run))["state_type"] == "COMPLETED"
    assert site.crews["travel"].kickoffs_by_key["travel-food-2025-04-01"] == 1
