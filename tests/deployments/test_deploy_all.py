"""`prefect deploy --all` in a project of `prefect-crew init`: what arrives on the server, and on a crew worker."""

from __future__ import annotations

import re
from typing import Any

from prefect_crew.records.keys import TEMPLATE
from support.deployed import wait_for_state
from support.site import CREW_POOL, Site
from support.workers import Worker

DEPLOYMENTS = {
    "deployed-crew/daily": "prefect_crew.run_deployed_crew",
    "deployed-pipeline/report": "prefect_crew.run_deployed_pipeline",
    "batch-file/topics": "prefect_crew.operations.batch_file",
    "prune-records/weekly": "prefect_crew.operations.prune_records",
}


def schedules(site: Site) -> dict[str, dict[str, Any]]:
    return {one["slug"]: one for name in DEPLOYMENTS for one in site.deployment(name)["schedules"]}


def test_each_is_there_for_its_pool_with_the_code_that_it_runs(site: Site):
    for name, entrypoint in DEPLOYMENTS.items():
        deployment = site.deployment(name)
        assert deployment["description"]
        found = (deployment["work_pool_name"], deployment["entrypoint"], deployment["pull_steps"] or None)
        assert found == (CREW_POOL, entrypoint, None), name


def test_nothing_starts_before_somebody_says_so(site: Site):
    assert {slug: one["active"] for slug, one in schedules(site).items()} == {
        "mornings": False,
        "coffee": False,
        "sundays": False,
    }


def test_a_crew_worker_runs_them(site: Site):
    with Worker(site.server, CREW_POOL, folder=site.project, kind="crew"):
        started = {name: site.start(name) for name in DEPLOYMENTS}
        ended = {name: wait_for_state(site.seen, run)["state_type"] for name, run in started.items()}
    assert ended == dict.fromkeys(DEPLOYMENTS, "COMPLETED")
    assert len((site.project / "results" / "topics.jsonl").read_text().splitlines()) == 3


def test_templates_survive_prefects_own_templating(site: Site):
    first, second, _ = site.deployment("deployed-pipeline/report")["parameters"]["pipeline"]["steps"]
    assert first["inputs"] == {"topic": "{{ (topic) }}"}
    assert second["inputs"]["notes"] == "{{ (research.output) }}"
    text = (site.project / "prefect.yaml").read_text()
    written = re.findall(r'^\s+idempotency_key: "(.*scheduled_start.*)"$', text, flags=re.MULTILINE)
    assert len(written) == 2
    arrived = [one["parameters"].get("idempotency_key") for one in schedules(site).values()]
    assert sorted(filter(None, arrived)) == sorted(written)
    assert all(TEMPLATE.search(key) for key in arrived if key)


def test_schedules_have_parameters_of_their_own(site: Site):
    mornings, coffee = (schedules(site)[slug] for slug in ("mornings", "coffee"))
    assert mornings["schedule"]["cron"] == "0 7 * * *"
    assert "inputs" not in mornings["parameters"]
    assert coffee["schedule"]["interval"] == 43200
    assert coffee["parameters"]["inputs"] == {"topic": "coffee"}


def test_a_second_deploy_changes_nothing_and_doubles_nothing(site: Site):
    def standing() -> dict[str, Any]:
        found = {name: site.deployment(name) for name in DEPLOYMENTS}
        return {name: (one["id"], len(one["schedules"])) for name, one in found.items()}

    before = standing()
    assert "Warning" not in site.deploy()
    assert standing() == before
