"""`prefect deploy --all` in a project of `prefect-crew init`; runs that a schedule or an event starts."""

from pathlib import Path
from typing import Any

import pytest

from prefect_crew import get_result
from support.deployed import FINAL, wait_for_state, wait_until
from support.prefect_server import connected
from support.site import CREW_POOL, Site
from support.workers import Worker

MORNING_KEY = {"idempotency_key": "research-{scheduled_start:%Y-%m-%d}"}
COFFEE = {"idempotency_key": "research-coffee-{scheduled_start:%Y-%m-%dT%H}", "inputs": {"topic": "coffee"}}
DEPLOYMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deployed-crew/daily": (
        "prefect_crew.run_deployed_crew",
        {"mornings": (False, "0 7 * * *", MORNING_KEY), "coffee": (False, 43200, COFFEE)},
    ),
    "deployed-pipeline/report": ("prefect_crew.run_deployed_pipeline", {}),
    "batch-file/topics": ("prefect_crew.operations.batch_file", {}),
}
"""By their names: what they run, and whether each schedule is active, its times and its parameters."""


def test_each_is_there_with_its_code_and_its_schedules(site: Site):
    for name, (entrypoint, schedules) in DEPLOYMENTS.items():
        deployment = site.deployment(name)
        assert deployment["description"], name
        assert deployment["work_pool_name"] == CREW_POOL
        assert deployment["entrypoint"] == entrypoint
        assert not deployment["pull_steps"]
        assert {
            schedule["slug"]: (
                schedule["active"],
                schedule["schedule"].get("cron") or schedule["schedule"]["interval"],
                schedule["parameters"],
            )
            for schedule in deployment["schedules"]
        } == schedules


def test_templates_survive_prefects_own_templating(site: Site):
    first, second, _ = site.deployment("deployed-pipeline/report")["parameters"]["pipeline"]["steps"]
    assert first["inputs"] == {"topic": "{{ (topic) }}"}
    assert second["inputs"]["notes"] == "{{ (research.output) }}"


def test_a_crew_worker_runs_them(site: Site):
    recover = ("prefect_crew.operations.recover", "--name", "by-hand", "--pool", CREW_POOL)
    site.run("prefect", "--no-prompt", "deploy", *recover)
    with Worker(site.server, CREW_POOL, folder=site.project, kind="crew"):
        started = {name: site.start(name) for name in DEPLOYMENTS}
        ended = {name: wait_for_state(site.seen, run)["state_type"] for name, run in started.items()}
        assert ended == dict.fromkeys(DEPLOYMENTS, "COMPLETED")
        recovery = site.start("recover/by-hand", {"flow_run_id": started["batch-file/topics"]})
        assert wait_for_state(site.seen, recovery)["state_type"] == "COMPLETED"
        wait_until(lambda: "left alone" in site.seen.logs(recovery), what="the recovery's log")
    assert len((site.project / "results" / "topics.jsonl").read_text().splitlines()) == 3


def test_a_second_deploy_changes_nothing_and_doubles_nothing(site: Site):
    def ids() -> list[Any]:
        deployments = map(site.deployment, DEPLOYMENTS)
        return [(deployment["id"], len(deployment["schedules"])) for deployment in deployments]

    before = ids()
    assert "Warning" not in site.deploy()
    assert ids() == before


# Started by a schedule or an event

EVERY_TWENTY_SECONDS = """
deployments:
  - name: every-twenty-seconds
    entrypoint: flows/report_pipeline.py:report_pipeline
    work_pool: {name: processes}
    schedules:
      - interval: 20
        parameters:
          topic: tea
          idempotency_key: "tea-{scheduled_start:%Y-%m-%dT%H:%M:%S}"
"""


def test_a_scheduled_run_ends_and_its_keys_are_of_its_time(site: Site, worker: Worker, tmp_path: Path):
    file = tmp_path / "prefect.yaml"
    file.write_text(EVERY_TWENTY_SECONDS)
    site.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file)
    deployment = site.deployment("report-pipeline/every-twenty-seconds")["id"]

    def ended() -> dict[str, Any] | None:
        runs = site.seen.flow_runs("report-pipeline")
        return next((run for run in runs if run["deployment_id"] == deployment and run["end_time"]), None)

    try:
        run = wait_until(ended, what="a scheduled run that has ended")
    finally:
        site.call("DELETE", f"/deployments/{deployment}")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["auto_scheduled"]
    key = f"tea-{run['expected_start_time'][:19]}"
    for step in ("research", "write", "review"):
        assert site.crews[step].kickoffs_by_key[f"{key}/{step}"] == 1
    with connected(site.server, site.folder / "home"):
        assert "tea is older" in get_result(f"{key}/research").output


@pytest.mark.slow
def test_a_run_started_by_another_crews_event_gets_that_ones_result(site: Site, worker: Worker):
    (trigger,) = [one["id"] for one in site.call("POST", "/automations/filter", {}) if "after-research" in one["name"]]
    site.call("PATCH", f"/automations/{trigger}", {"enabled": True})
    # The same run twice: one kickoff, one `crew.completed`, one follow-up.
    for _ in range(2):
        first = site.start("one-crew/daily", {"idempotency_key": "event-tea"})
        assert wait_for_state(site.seen, first)["state_type"] == "COMPLETED"

    def followed() -> list[dict[str, Any]] | None:
        runs = [run for run in site.seen.flow_runs("follow-up") if run["parameters"]["idempotency_key"] == "event-tea"]
        return runs if runs and all(run["state_type"] in FINAL for run in runs) else None

    try:
        (run,) = wait_until(followed, what="the follow-up's run")
    finally:
        site.call("PATCH", f"/automations/{trigger}", {"enabled": False})
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["created_by"]["type"] == "AUTOMATION"
    (started,) = [run for run in site.crews["write"].runs if run.meta["idempotency_key"] == "write after event-tea"]
    assert "tea doubled" in started.inputs["notes"]
    assert started.inputs["audience"] == "everyone"
