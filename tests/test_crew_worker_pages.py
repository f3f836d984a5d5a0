"""A crew worker's flow run on Prefect's pages, seen in a browser: it runs, is cancelled there, and its log says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.chromium import Chromium
from support.crew_pool import CrewOnCommand, CrewPool
from support.deployed import wait_until
from support.prefect_server import PrefectServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_flow_run_is_cancelled_on_its_page(prefect_server: PrefectServer, chromium: Chromium, tmp_path: Path):
    with CrewPool(prefect_server, tmp_path, heartbeat=3) as pool, chromium.page() as page:
        pool.worker("one")
        crew = pool.add_crew("on-command", CrewOnCommand())
        run_id = pool.start(pool.deploy("on-command"), crew="on-command", inputs={"topic": "tea"})
        wait_until(lambda: crew.requests["status"] > 1, seconds=60, what="a wait")
        address = f"{prefect_server.ui_url}/v2/runs/flow-run/{run_id}"
        page.open(address)
        page.wait_for_text(pool.flow_run(run_id)["name"])
        page.wait_for_text("Running")
        page.wait_for_text("Crew on-command was kicked off")
        page.click("button[aria-haspopup='menu']")
        page.click('role=menuitem[name="Cancel"]')
        page.wait_for('text="Will become:"')
        page.click('role=button[name="Cancel Flow Run"]')
        run = pool.wait_for(run_id)
        wait_until(lambda: "was asked to stop" in pool.logs(run_id), seconds=30, what="its log")
        page.open(address)
        page.wait_for("text=/^Cancelled$/")
        page.wait_for_text("was asked to stop")
        page.screenshot(tmp_path / "cancelled.png")
        assert run["state_name"] == "Cancelled", run["state"]["message"]
        assert [one.state for one in crew.runs] == ["stopped"]
