"""The form on Prefect's page for a deployed pipeline: it asks for the pipeline's inputs, in both interfaces."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from prefect_crew.deployments import Plan, pipeline_deployment
from prefect_crew.pipelines.definition import PipelineDefinition
from support.chromium import Chromium
from support.deployed import wait_until
from support.prefect_server import PrefectServer

INPUTS = {
    "topic": {"description": "What the report is about."},
    "audience": {"description": "Whom it is for.", "default": "everyone"},
    "days": {"type": "integer", "default": 3, "description": "How long it may take."},
    "login": {"secret": True, "default": "my-login"},
}


@pytest.mark.parametrize("ui", ["v1", "v2"])
def test_it_asks_for_each_input(
    prefect_api: PrefectServer, chromium: Chromium, ui: Literal["v1", "v2"], tmp_path: Path
):
    name = f"report-{uuid.uuid4().hex[:8]}"
    pipeline = PipelineDefinition.model_validate(
        {"name": name, "inputs": INPUTS, "steps": [{"name": "a", "crew": "b", "inputs": {"text": "{{ topic }}"}}]}
    )
    made: Any = pipeline_deployment(pipeline, Plan(name, {}))
    deployment_id = made.apply()
    root = prefect_api.ui_url + ("/v2" if ui == "v2" else "")
    with chromium.page(height=1800) as page:
        page.open(f"{root}/deployments/deployment/{deployment_id}/run")
        for text in ("topic", "What the report is about.", "Whom it is for.", "How long it may take.", "Secret block"):
            page.wait_for_text(text)
        page.screenshot(tmp_path / f"{ui}.png")
        page.fill("textarea >> nth=0", "tea")
        page.click("button:has-text('Submit')")
        run = wait_until(lambda: made_of(prefect_api, deployment_id), seconds=30, what="a flow run")
    # The steps are the deployment's, which the form leaves alone.
    inputs = {"topic": "tea", "audience": "everyone", "days": 3, "login": "my-login"}
    assert run["parameters"]["inputs"] == inputs
    assert run["parameters"]["pipeline"] == made.parameters["pipeline"]


def made_of(server: PrefectServer, deployment_id: Any) -> dict[str, Any] | None:
    asked = {"deployments": {"id": {"any_": [str(deployment_id)]}}}
    runs = httpx.post(f"{server.api_url}/flow_runs/filter", json=asked).raise_for_status().json()
    return runs[0] if runs else None
