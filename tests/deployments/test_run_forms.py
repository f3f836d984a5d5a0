"""The form on Prefect's page that starts a run: it asks for each input and says what it is."""

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from prefect_crew import crew_flow
from prefect_crew.devserver import CrewServer
from support.chromium import Chromium
from support.prefect_server import PrefectServer
from support.servers import describing
from support.waiting import TooLateError, wait_until

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
def test_it_asks_for_inputs(prefect_api: PrefectServer, chromium: Chromium, ui: Literal["v1", "v2"], tmp_path: Path):
    name = f"report-{uuid.uuid4().hex[:8]}"
    with describing(CrewServer(CREW)) as server:
        block: Any = server.crew(secret_inputs=["login"])
        block.save(name, _sync=True)
        deployment: Any = crew_flow(name).to_deployment(name, parameters={"inputs": {"audience": "everyone"}})
    deployment_id = deployment.apply()
    address = f"{prefect_api.ui_url}{'/v2' if ui == 'v2' else ''}/deployments/deployment/{deployment_id}/run"

    def run() -> dict[str, Any] | None:
        asked = {"deployments": {"id": {"any_": [str(deployment_id)]}}}
        runs = httpx.post(f"{prefect_api.api_url}/flow_runs/filter", json=asked).raise_for_status().json()
        return runs[0]["parameters"] if runs else None

    def submit() -> dict[str, Any] | None:
        page.click("button:has-text('Submit')")  # again, if the page still read the deployment and ignored a click
        with suppress(TooLateError):
            return wait_until(run, what="a flow run", seconds=5.0)

    with chromium.page(height=1800) as page:
        page.open(address)
        for text in ("topic", "What the report is about.", "Whom it is for.", "How long it may take.", "Secret block"):
            page.wait_for_text(text)
        page.screenshot(tmp_path / f"{ui}.png")
        page.fill("textarea >> nth=0", "tea")
        page.fill("textarea >> nth=-1", "my-login")
        parameters = wait_until(submit, what="a flow run")
    # Which crew it is, is the deployment's, and the form leaves it alone.
    assert parameters["crew"] == name
    assert parameters["inputs"].items() >= {"topic": "tea", "audience": "everyone"}.items()
