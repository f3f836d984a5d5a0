"""The forms on Prefect's page that start a run: they ask for each parameter or input and say what it is."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from prefect_crew.deployments import build_deployment, crew_target
from prefect_crew.devserver import CrewServer
from support.chromium import Chromium
from support.deployed import wait_until
from support.prefect_server import PrefectServer
from support.site import Site

CREW = """
name: report
inputs:
  - {name: topic, description: What the report is about.}
  - {name: days, type: integer, description: How long it may take., required: false}
  - {name: audience, description: Whom it is for., required: false}
  - login
tasks: [{name: write, output: x}]
"""


@pytest.mark.parametrize("ui", ["v1", "v2"])
def test_it_asks_for_each_input(
    prefect_api: PrefectServer, chromium: Chromium, ui: Literal["v1", "v2"], tmp_path: Path
):
    name = f"report-{uuid.uuid4().hex[:8]}"
    with CrewServer(CREW, response_format="live") as server:
        block: Any = server.crew(secret_inputs=["login"])
        target = asyncio.run(crew_target(block.crew.called(name), {"audience": "everyone"}))
    made: Any = build_deployment(target, name)
    deployment_id = made.apply()
    root = prefect_api.ui_url + ("/v2" if ui == "v2" else "")
    with chromium.page(height=1800) as page:
        page.open(f"{root}/deployments/deployment/{deployment_id}/run")
        for text in ("topic", "What the report is about.", "Whom it is for.", "How long it may take.", "Secret block"):
            page.wait_for_text(text)
        page.screenshot(tmp_path / f"{ui}.png")
        page.fill("textarea >> nth=0", "tea")
        page.fill("textarea >> nth=-1", "my-login")
        page.click("button:has-text('Submit')")
        run = wait_until(lambda: run_of(prefect_api, deployment_id), seconds=30, what="a flow run")
    # Which crew it is, is the deployment's, and the form leaves it alone.
    assert run["parameters"]["crew"] == name
    assert run["parameters"]["inputs"].items() >= {"topic": "tea", "audience": "everyone"}.items()


def run_of(server: PrefectServer, deployment_id: Any) -> dict[str, Any] | None:
    asked = {"deployments": {"id": {"any_": [str(deployment_id)]}}}
    runs = httpx.post(f"{server.api_url}/flow_runs/filter", json=asked).raise_for_status().json()
    return runs[0] if runs else None


SAID = {
    "one-crew/daily": ["The name of the crew's block, as under Blocks.", "The identity of one run."],
    "report-pipeline/weekly": ["What the report is about.", "Whom it is for."],
    "fan-out/cities": ["The crew's inputs, once for each run.", "How many runs may be in flight."],
}


@pytest.mark.parametrize("name", SAID)
def test_every_parameter_is_described(site: Site, chromium: Chromium, name: str):
    with chromium.page(height=1800) as page:
        page.open(f"{site.server.ui_url}/v2/deployments/deployment/{site.deployment(name)['id']}/run")
        for text in SAID[name]:
            page.wait_for_text(text)
