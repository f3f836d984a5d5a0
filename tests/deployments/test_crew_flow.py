"""`crew_flow` and `pipeline_flow` by each way that Prefect has to deploy: real processes, one flow run each."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.crew_pool import CrewPool
from support.deployed import command, wait_until
from support.prefect_server import PrefectServer
from support.processes import Process

FLOWS = """
import sys
from pathlib import Path

from prefect_crew import crew_flow, pipeline_flow

travel = crew_flow("travel")
patient = travel.with_options(name="patient", retries=2)
report = pipeline_flow(Path(__file__).with_name("report.yaml"))

if __name__ == "__main__":
    way, *pool = sys.argv[1:]
    if way == "source":
        here = str(Path(__file__).parent)
        travel.from_source(here, "my_flows.py:travel").deploy("source", work_pool_name=pool[0])
    else:
        report.serve(parameters={"inputs": {"topic": "cocoa"}})
"""
REPORT = 'inputs: {topic: {}}\nsteps: [{name: one, crew: travel, inputs: {topic: "{{ topic }}"}}]\n'
CREW = "name: travel\ninputs: [topic]\ntasks: [{name: t, output: 'on {{ topic }}'}]\n"


@pytest.fixture
def pool(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[CrewPool]:
    (tmp_path / "my_flows.py").write_text(FLOWS)
    (tmp_path / "report.yaml").write_text(REPORT)
    with CrewPool(prefect_server, tmp_path) as pool:
        pool.add_crew("travel", CREW)
        yield pool


def test_a_flow_of_a_module_keeps_its_options(pool: CrewPool, tmp_path: Path):
    pool.worker("modules", PYTHONPATH=str(tmp_path), PREFECT_INTEGRATIONS_CREW_WORKER_MODULES="my_flows")
    line = ("prefect", "--no-prompt", "deploy", "my_flows.patient", "--name", "module", "--pool", pool.name)
    command(*line, env={**pool.env, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    deployment = pool.call("GET", "/deployments/name/patient/module")
    assert deployment["parameter_openapi_schema"]["properties"]["inputs"]["required"] == ["topic"]
    run = pool.start(deployment["id"], inputs={"topic": "tea"})
    pool.wait_for(run, "COMPLETED")
    assert pool.call("GET", f"/flow_runs/{run}")["empirical_policy"]["retries"] == 2
    assert [run.inputs for run in pool.crews["travel"].runs] == [{"topic": "tea"}]


def test_a_flow_of_a_file_runs_on_a_process_pool(prefect_server: PrefectServer, pool: CrewPool, tmp_path: Path):
    with CrewPool(prefect_server, tmp_path, f"{pool.name}-processes", kind="process") as processes:
        processes.worker("there")
        line = ("prefect", "--no-prompt", "deploy", "my_flows.py:travel", "--name", "file", "--pool", processes.name)
        command(*line, "--rrule", "FREQ=YEARLY", "--tag", "mine", env=pool.env, cwd=tmp_path)
        command(sys.executable, "my_flows.py", "source", processes.name, env=pool.env, cwd=tmp_path)
        for name in ("file", "source"):
            deployment = pool.call("GET", f"/deployments/name/deployed-crew/{name}")
            assert deployment["entrypoint"] == "my_flows.py:travel"
            assert deployment["parameter_openapi_schema"]["properties"]["inputs"]["required"] == ["topic"]
            pool.wait_for(pool.start(deployment["id"], inputs={"topic": name}), "COMPLETED")
    assert [run.inputs["topic"] for run in pool.crews["travel"].runs] == ["file", "source"]


def test_a_served_pipeline_runs_in_a_process_of_its_own(pool: CrewPool, tmp_path: Path):
    with Process([sys.executable, "my_flows.py", "serve"], log=tmp_path / "log", env=pool.env, cwd=tmp_path) as process:
        process.wait_for("being served")
        deployment = pool.call("GET", "/deployments/name/deployed-pipeline/report")
        pool.wait_for(pool.start(deployment["id"]), "COMPLETED")
    wait_until(lambda: not process.running, what="the end of the process")
    assert [run.inputs for run in pool.crews["travel"].runs] == [{"topic": "cocoa"}]
