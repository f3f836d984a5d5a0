"""`prefect deploy --all` with deployments/prefect.yaml: what arrives on the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefect_crew.records.keys import TEMPLATE
from support.deployed import ROOT, wait_for_state
from support.site import CREW_POOL, POOL, Site
from support.workers import Worker

IN_PROCESSES = [
    "one-crew/daily",
    "one-crew/every-six-hours",
    "report-pipeline/weekly",
    "report-by-hand/by-hand",
    "reviewed-report/by-form",
    "fan-out/cities",
    "batch-file/by-hand",
    "watch-folder/inbox",
    "costs-page/page",
    "follow-up/after-research",
]
ON_THE_CREW_WORKER = {
    "deployed-crew/evenings": "prefect_crew.run_deployed_crew",
    "deployed-pipeline/report": "prefect_crew.run_deployed_pipeline",
    "prune-records/sweep": "prefect_crew.operations.prune_records",
}
RECOVER = "recover/crashed"
DEPLOYMENTS = [*IN_PROCESSES, *ON_THE_CREW_WORKER, RECOVER]


def schedules(site: Site) -> dict[str, dict[str, Any]]:
    return {one["slug"]: one for name in DEPLOYMENTS for one in site.deployment(name)["schedules"]}


def test_each_is_there_for_its_pool_with_the_code_that_it_runs(site: Site):
    here = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    for name in (*IN_PROCESSES, *ON_THE_CREW_WORKER):
        deployment = site.deployment(name)
        assert deployment["description"]
        if name in IN_PROCESSES:
            assert (deployment["work_pool_name"], deployment["pull_steps"]) == (POOL, here), name
        else:
            found = (deployment["work_pool_name"], deployment["entrypoint"], deployment["pull_steps"] or None)
            assert found == (CREW_POOL, ON_THE_CREW_WORKER[name], None), name


def test_nothing_starts_before_somebody_says_so(site: Site):
    assert {name: one["active"] for name, one in schedules(site).items()} == dict.fromkeys(schedules(site), False)
    triggers = [one for one in site.call("POST", "/automations/filter", {}) if "prefect-crew" not in one["tags"]]
    assert [one["enabled"] for one in triggers] == [False]


def test_a_crew_worker_runs_them(site: Site, tmp_path: Path):
    parameters: dict[str, dict[str, Any]] = {
        "deployed-crew/evenings": {},
        "deployed-pipeline/report": {"inputs": {"topic": "rye"}},
        "prune-records/sweep": {"dry_run": True},
    }
    with Worker(site.server, CREW_POOL, folder=tmp_path, kind="crew"):
        started = {name: site.start(name, given) for name, given in parameters.items()}
        ended = {name: wait_for_state(site.seen, run)["state_type"] for name, run in started.items()}
    assert ended == dict.fromkeys(parameters, "COMPLETED")


def test_templates_survive_prefects_own_templating(site: Site):
    first, second, _ = site.deployment("deployed-pipeline/report")["parameters"]["pipeline"]["steps"]
    assert first["inputs"] == {"topic": "{{ (topic) }}"}
    assert second["inputs"]["notes"] == "{{ (research.output) }}"
    text = (ROOT / "deployments" / "prefect.yaml").read_text()
    written = re.findall(r'^\s+idempotency_key: "(.*scheduled_start.*)"$', text, flags=re.MULTILINE)
    assert len(written) == 5
    arrived = [one["parameters"].get("idempotency_key") for one in schedules(site).values()]
    assert sorted(filter(None, arrived)) == sorted(written)
    assert all(TEMPLATE.search(key) for key in arrived if key)


def test_schedules_have_parameters_of_their_own(site: Site):
    food, games, tea = (schedules(site)[slug] for slug in ("food", "games", "tea"))
    assert food["schedule"]["cron"] == "0 6 * * *"
    assert "inputs" not in food["parameters"]
    assert games["parameters"]["inputs"]["interests"] == "games, tech"
    assert tea["schedule"]["interval"] == 21600


def test_a_second_deploy_changes_nothing_and_doubles_nothing(site: Site):
    def standing() -> tuple[dict[str, Any], int]:
        found = {name: site.deployment(name) for name in DEPLOYMENTS}
        automations = site.call("POST", "/automations/filter", {})
        return {name: (one["id"], len(one["schedules"])) for name, one in found.items()}, len(automations)

    before = standing()
    assert "Warning" not in site.deploy()
    assert standing() == before


def test_what_recovers_crashes_is_not_recovered_itself(site: Site):
    tagged = {name for name in DEPLOYMENTS if "recover-crashed" in site.deployment(name)["tags"]}
    assert tagged == set(IN_PROCESSES)
