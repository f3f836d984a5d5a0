"""PostgreSQL, one pool, two workers; one of them dies with a pipeline in the middle, and the other ends it.

Nobody helps: heartbeats stop, an automation calls that a crash, another one has the run begun again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from support.deployed import flow_processes, wait_for_state, wait_until
from support.postgres import Postgres
from support.prefect_server import PrefectServer
from support.site import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG_WRITE = """
name: write
inputs: [topic, audience, notes]
tasks: [{name: draft, seconds: 30, output: "# {{ topic }}\\n{{ notes }}"}]
"""


@pytest.fixture(scope="module")
def site_on_postgres(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Site]:
    """Everything deployed on a server on PostgreSQL, with a write crew that takes its time, and no worker yet."""
    folder = tmp_path_factory.mktemp("site-on-postgres")
    url = postgres.create_database("site")
    with PrefectServer(folder, database_url=url) as server, Site(server, folder) as site:
        site.add_crew("write", LONG_WRITE)
        yield site


def test_a_pipeline_whose_worker_dies_ends_on_the_other_one_and_nothing_is_started_twice(
    site_on_postgres: Site, notes: list[str]
):
    site = site_on_postgres
    workers = [site.worker("one"), site.worker("two")]
    write = site.crews["write"]
    run_id = site.start("report-pipeline/weekly", {"topic": "tea", "idempotency_key": "two-workers"})
    wait_until(
        lambda: write.kickoffs == 1 and write.requests["status"] > 0, seconds=90, what="the second step under way"
    )

    # Not by their logs: the one that came too late for the run names it as well.
    (dead,) = [worker for worker in workers if flow_processes(worker.process, run_id)]
    (alive,) = set(workers) - {dead}
    dead.kill()
    killed = time.monotonic()
    asked = write.requests["status"]

    wait_until(lambda: write.requests["status"] > asked, seconds=300, what="a run that is waited for again", pause=0.5)
    notes.append(
        f"worker killed with its flow run: waited for again by another worker after {time.monotonic() - killed:.0f} s, "
        "unattended (heartbeat 30 s)"
    )
    run = wait_for_state(site.seen, run_id, "COMPLETED", "FAILED", "CANCELLED", seconds=120)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["run_count"] == 2
    assert str(run_id) in alive.log.read_text()
    for step in ("research", "write", "review"):
        # A schedule of the site may fire during this, at the full hour, under a key of its own.
        ours = {key: n for key, n in site.crews[step].kickoffs_by_key.items() if key.startswith("two-workers/")}
        assert ours == {f"two-workers/{step}": 1}
    states = site.call("GET", f"/flow_run_states/?flow_run_id={run_id}")
    states.sort(key=lambda state: datetime.fromisoformat(state["timestamp"]))
    names = [state["name"] for state in states]
    assert names.count("Running") == 2
    assert names.index("Crashed") > names.index("Running")
    crashed = states[names.index("Crashed")]
    assert crashed["message"] == "No heartbeat for 90 s."
