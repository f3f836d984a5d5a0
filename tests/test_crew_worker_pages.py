"""A crew worker's flow runs on Prefect's pages, seen in a browser: a schedule, a person's form, a cancellation."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.chromium import Chromium, Page
from support.crew_pool import CrewOnCommand, CrewPool
from support.deployed import wait_until
from support.prefect_server import PrefectServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

QUICK = """
name: quick
inputs: [topic]
tasks: [{name: write, seconds: 1, output: "About {{ topic }}"}]
"""


@pytest.fixture(scope="module")
def pool(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrewPool]:
    with CrewPool(prefect_server, tmp_path_factory.mktemp("pages"), heartbeat=3) as pool:
        pool.worker("one")
        yield pool


def open_flow_run(page: Page, pool: CrewPool, run_id: str) -> None:
    page.open(f"{pool.server.ui_url}/v2/runs/flow-run/{run_id}")
    page.wait_for_text(pool.flow_run(run_id)["name"])


def test_a_scheduled_run_appears_and_completes(pool: CrewPool, chromium: Chromium, tmp_path: Path):
    pool.add_crew("quick", QUICK)
    every = {"interval": 5, "anchor_date": datetime.now(UTC).isoformat()}
    deployment = pool.deploy(
        "scheduled",
        parameters={"crew": "quick", "inputs": {"topic": "tea"}},
        schedules=[{"schedule": every, "active": True}],
    )

    def completed() -> Any:
        asked = {
            "deployments": {"id": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }
        return pool.call("POST", "/flow_runs/filter", asked)

    with chromium.page() as page:
        page.open(f"{pool.server.ui_url}/v2/deployments/deployment/{deployment}")
        (run, *_) = wait_until(completed, seconds=120, what="a scheduled run that completes")
        page.wait_for_text(run["name"])
        page.screenshot(tmp_path / "deployment.png")
        open_flow_run(page, pool, run["id"])
        page.wait_for_text("Completed")
        page.wait_for_text("Crew quick was kicked off")
        page.screenshot(tmp_path / "scheduled.png")
    assert run["auto_scheduled"]
    pool.call("PATCH", f"/deployments/{deployment}", {"paused": True})


def test_a_flow_run_is_cancelled_on_its_page(pool: CrewPool, chromium: Chromium, tmp_path: Path):
    crew = pool.add_crew("on-command", CrewOnCommand())
    run_id = pool.start(pool.deploy("on-command"), crew="on-command", inputs={"topic": "tea"})
    wait_until(lambda: crew.requests["status"] > 1, seconds=60, what="a wait")
    with chromium.page() as page:
        open_flow_run(page, pool, run_id)
        page.wait_for_text("Running")
        page.click("button[aria-haspopup='menu']")
        page.click('role=menuitem[name="Cancel"]')
        page.wait_for('text="Will become:"')
        page.screenshot(tmp_path / "cancelling.png")
        page.click('role=button[name="Cancel Flow Run"]')
        run = pool.wait_for(run_id)
        wait_until(lambda: "was asked to stop" in pool.logs(run_id), seconds=30, what="its log")
        open_flow_run(page, pool, run_id)
        page.wait_for("text=/^Cancelled$/")
        page.wait_for_text("was asked to stop")
        page.screenshot(tmp_path / "cancelled.png")
    assert run["state_name"] == "Cancelled", run["state"]["message"]
    assert [one.state for one in crew.runs] == ["stopped"]
