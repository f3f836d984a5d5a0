"""`prefect deploy --all` in a project of `prefect-crew init`: what arrives on the server, and on a crew worker."""

from __future__ import annotations

from typing import Any

from support.deployed import wait_for_state, wait_until
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
    "prune-records/weekly": ("prefect_crew.operations.prune_records", {"sundays": (False, "15 3 * * 0", {})}),
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
        recovery = site.start("recover/by-hand", {"flow_run_id": started["prune-records/weekly"]})
        assert wait_for_state(site.seen, recovery)["state_type"] == "COMPLETED"
        wait_until(lambda: "left alone" in site.seen.logs(recovery), seconds=30, what="the recovery's log")
    assert len((site.project / "results" / "topics.jsonl").read_text().splitlines()) == 3


def test_a_second_deploy_changes_nothing_and_doubles_nothing(site: Site):
    def ids() -> list[Any]:
        deployments = map(site.deployment, DEPLOYMENTS)
        return [(deployment["id"], len(deployment["schedules"])) for deployment in deployments]

    before = ids()
    assert "Warning" not in site.deploy()
    assert ids() == before
