"""Runs on a process worker that the API, an event, a schedule or a backfill starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import get_result
from prefect_crew.deployments import backfill
from support.deployed import FINAL, wait_for_state, wait_until
from support.prefect_server import connected
from support.site import Site
from support.workers import Worker


def test_a_run_started_through_the_api_runs_with_its_parameters(site: Site, worker: Worker):
    run_id = site.start("report-pipeline/weekly", {"topic": "cocoa", "idempotency_key": "api-cocoa"})
    run = wait_for_state(site.seen, run_id)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    for step in ("research", "write", "review"):
        assert site.crews[step].kickoffs_by_key[f"api-cocoa/{step}"] == 1


@pytest.fixture
def follow_up(site: Site) -> Iterator[None]:
    """The trigger of follow-up/after-research, which is disabled."""
    (trigger,) = [one["id"] for one in site.call("POST", "/automations/filter", {}) if "after-research" in one["name"]]
    site.call("PATCH", f"/automations/{trigger}", {"enabled": True})
    yield
    site.call("PATCH", f"/automations/{trigger}", {"enabled": False})


@pytest.mark.slow
@pytest.mark.usefixtures("follow_up")
def test_a_run_started_by_another_crews_event_gets_that_ones_result(site: Site, worker: Worker):
    # The same run twice: one kickoff, one `crew.completed`, one follow-up.
    for _ in range(2):
        first = site.start("one-crew/daily", {"idempotency_key": "event-tea"})
        assert wait_for_state(site.seen, first)["state_type"] == "COMPLETED"

    def followed() -> list[dict[str, Any]] | None:
        runs = [run for run in site.seen.flow_runs("follow-up") if run["parameters"]["idempotency_key"] == "event-tea"]
        return runs if runs and all(run["state_type"] in FINAL for run in runs) else None

    (run,) = wait_until(followed, seconds=90, what="the follow-up's run")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["created_by"]["type"] == "AUTOMATION"
    (started,) = [one for one in site.crews["write"].runs if one.meta["idempotency_key"] == "write after event-tea"]
    assert "tea doubled" in started.inputs["notes"]
    assert started.inputs["audience"] == "everyone"


EVERY_TEN_SECONDS = """
deployments:
  - name: every-ten-seconds
    entrypoint: flows/one_crew.py:one_crew
    work_pool: {name: processes}
    parameters:
      crew: research
    schedules:
      - interval: 10
        parameters:
          inputs: {topic: tea}
          idempotency_key: "tea-{scheduled_start:%Y-%m-%dT%H:%M:%S}"
"""


def test_a_scheduled_run_ends_and_its_key_is_of_its_time(site: Site, worker: Worker, tmp_path: Path):
    file = tmp_path / "prefect.yaml"
    file.write_text(EVERY_TEN_SECONDS)
    site.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file)
    deployment = site.deployment("one-crew/every-ten-seconds")["id"]

    def ended() -> dict[str, Any] | None:
        runs = site.seen.flow_runs("one-crew")
        return next((run for run in runs if run["deployment_id"] == deployment and run["end_time"]), None)

    try:
        run = wait_until(ended, seconds=120, what="a scheduled run that has ended")
    finally:
        site.call("DELETE", f"/deployments/{deployment}")
    assert run["state_type"] == "COMPLETED"
    assert run["auto_scheduled"]
    key = f"tea-{run['expected_start_time'][:19]}"
    assert site.crews["research"].kickoffs_by_key[key] == 1
    with connected(site.server, site.folder / "home"):
        assert "tea is older" in get_result(key).output


@pytest.mark.slow
def test_each_day_is_started_once_under_its_own_key(site: Site, worker: Worker):
    def fill() -> list[tuple[bool, Any]]:
        with connected(site.server, site.folder / "home"):
            runs = asyncio.run(backfill("one-crew/daily", date(2025, 3, 1), date(2025, 3, 3), schedule="mornings"))
        return [(run.created, run.flow_run) for run in runs]

    for _, run in fill():
        ended = wait_for_state(site.seen, run.id, seconds=120)
        assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert [(created, run.state_name) for created, run in fill()] == [(False, "Completed")] * 3
    started = {key: times for key, times in site.crews["research"].kickoffs_by_key.items() if "2025-03" in key}
    assert started == {f"research-2025-03-0{day}": 1 for day in (1, 2, 3)}
