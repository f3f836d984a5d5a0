"""Runs that the API and an event start, on a worker."""

from __future__ import annotations

from typing import Any

import pytest

from support.deployed import FINAL, wait_for_state, wait_until
from support.site import Site
from support.workers import Worker


def test_a_run_started_through_the_api_runs_with_its_parameters(site: Site, worker: Worker):
    run_id = site.start("report-pipeline/weekly", {"topic": "cocoa", "idempotency_key": "api-cocoa"})
    run = wait_for_state(site.seen, run_id)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    for step in ("research", "write", "review"):
        assert site.crews[step].kickoffs_by_key[f"api-cocoa/{step}"] == 1


def test_parameters_that_do_not_fit_are_refused_when_the_run_is_made(site: Site):
    import httpx

    with pytest.raises(httpx.HTTPStatusError, match="409"):
        site.start("report-pipeline/weekly", {"topic": ["no", "text"]})


@pytest.mark.slow
def test_a_run_started_by_another_crews_event_gets_that_ones_result(site: Site, worker: Worker):
    # The same run twice: one purchase, one `crew.completed`, one follow-up.
    for _ in range(2):
        first = site.start("one-crew/every-six-hours", {"idempotency_key": "event-tea"})
        assert wait_for_state(site.seen, first)["state_type"] == "COMPLETED"

    def followed() -> list[dict[str, Any]] | None:
        runs = [run for run in site.seen.flow_runs("follow-up") if run["parameters"]["idempotency_key"] == "event-tea"]
        return runs if runs and all(run["state_type"] in FINAL for run in runs) else None

    (run,) = wait_until(followed, seconds=90, what="the follow-up's run")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["created_by"]["type"] == "AUTOMATION"
    (bought,) = [one for one in site.crews["write"].runs if one.meta["idempotency_key"] == "write after event-tea"]
    assert "what is new in tea doubled" in bought.inputs["notes"]
    assert bought.inputs["audience"] == "everyone"


@pytest.mark.slow
def test_the_pipelines_own_research_is_not_followed_up(site: Site, worker: Worker):
    run_id = site.start("report-pipeline/weekly", {"topic": "mate", "idempotency_key": "event-mate"})
    assert wait_for_state(site.seen, run_id)["state_type"] == "COMPLETED"
    # Another follow-up, started later, has come by then, and with it every earlier event.
    other = site.start("one-crew/every-six-hours", {"inputs": {"topic": "mate"}, "idempotency_key": "event-later"})
    wait_for_state(site.seen, other)

    def keys() -> set[str]:
        return {run["parameters"]["idempotency_key"] for run in site.seen.flow_runs("follow-up")}

    wait_until(lambda: "event-later" in keys(), seconds=90, what="the later follow-up")
    assert not any(key.startswith("event-mate") for key in keys())
