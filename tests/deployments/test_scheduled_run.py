"""A run that its schedule starts, on a worker, from the file that deploys it to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect_crew import get_result
from support.deployed import wait_until
from support.prefect_server import connected
from support.site import Site
from support.workers import Worker

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
          idempotency_key: "tea-{{ scheduled_start:%Y-%m-%dT%H:%M:%S }}"
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
