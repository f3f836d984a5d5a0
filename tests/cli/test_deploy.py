"""`deploy`: what it says, and the deployment that it serves itself."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.server import CrewServer
from support.commands import environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process


@pytest.fixture
def name(prefect_api: PrefectServer, crews: CrewServer) -> str:
    """The name of a stored crew with the input `who`."""
    name = f"greet-{uuid.uuid4().hex[:8]}"
    block: Any = crews.crew(url=f"{crews.url}/greet")
    block.save(name)
    return name


def deployment(full_name: str) -> Any:
    from prefect.client.orchestration import get_client

    async def read() -> Any:
        async with get_client() as client:
            return await client.read_deployment_by_name(full_name)

    return asyncio.run(read())


def test_a_deployment_asks_for_the_inputs_of_its_crew(here, name: str):
    made = here("deploy", name, "--tag", "mine", "--concurrency-limit", "2")
    assert made.code == 0, made.err
    assert f"Deployed deployed-crew/{name}, which asks for who." in made.out
    assert "Nothing runs it yet" in made.out
    found = deployment(f"deployed-crew/{name}")
    assert found.parameter_openapi_schema["required"] == ["who"]
    assert found.entrypoint == f"prefect_crew.deploying.{name}(who)"
    assert found.enforce_parameter_schema
    assert found.tags == ["prefect-crew", "mine"]


def test_the_commands_that_it_prints_are_quoted_for_a_shell(here, name: str):
    made = here("deploy", name, "--name", "daily trip; date")
    assert made.code == 0, made.err
    assert "prefect deployment run 'deployed-crew/daily trip; date' -p who=…" in made.out
    assert f"prefect-crew deploy {name} --name 'daily trip; date' --serve" in made.out


def test_a_schedule_and_defaults(here, name: str):
    line = ("deploy", name, "--name", "daily", "--cron", "0 6 * * *", "--timezone", "Europe/Lisbon")
    without = here(*line)
    assert without.code == 25
    assert "Missing: who" in without.err
    assert here(*line, "-i", "who=Ada", "--run-key", "daily-{{ scheduled_start:%Y-%m-%d }}").code == 0
    found = deployment("deployed-crew/daily")
    assert found.parameters == {"who": "Ada", "run_key": "daily-{{ scheduled_start:%Y-%m-%d }}"}
    assert found.schedules[0].schedule.timezone == "Europe/Lisbon"


def test_a_schedule_stays_until_another_is_given(here, name: str):
    line, defaults = ("deploy", name, "--name", f"daily {name}"), ("-i", "who=Ada")
    assert here(*line, *defaults, "--cron", "0 6 * * *").code == 0
    again = here(*line, "-i", "who=Grace")
    assert again.code == 0, again.err
    assert "The schedule that it has stays." in again.out
    found = deployment(f"deployed-crew/daily {name}")
    assert [one.schedule.cron for one in found.schedules] == ["0 6 * * *"]
    assert found.parameters == {"who": "Grace"}
    without = here(*line)
    assert without.code == 25
    assert f"The schedule that deployed-crew/daily {name} has stays: delete it, or give them." in without.err
    same = here(*line, *defaults, "--run-key", "always")
    assert same.code == 25
    assert "is the same for every time of the schedule" in same.err
    assert here(*line, *defaults, "--interval", "3600").code == 0
    assert [one.schedule.interval.total_seconds() for one in deployment(f"deployed-crew/daily {name}").schedules] == [
        3600
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--work-pool", "no-such-pool"], "prefect work-pool create no-such-pool", id="pool"),
        pytest.param(["-i", "colour=red"], "does not know the inputs colour", id="default"),
        pytest.param(["--cron", "now and then", "-i", "who=Ada"], "cron", id="cron"),
    ],
)
def test_what_cannot_be_deployed(here, name: str, options: list[str], said: str):
    done = here("deploy", name, *options)
    assert done.code == 25
    assert said in done.err


def test_a_crew_that_is_not_stored(here, prefect_api: PrefectServer):
    done = here("deploy", "never-stored")
    assert done.code == 25
    assert "prefect-crew save never-stored --url URL" in done.err


def test_it_needs_a_server_that_stays(alone):
    done = alone("deploy", "travel", env={"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"})
    assert done.code == 30
    assert "prefect server start" in done.err


def test_served_by_the_command_itself(prefect_api: PrefectServer, crews: CrewServer, name: str, tmp_path: Path):
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url, "PREFECT_RUNNER_POLL_FREQUENCY": "1"})
    command = [program("prefect-crew"), "deploy", name, "--serve"]
    with Process(command, log=tmp_path / "log", env=env) as process:
        process.wait_for(f"Serving deployed-crew/{name}")
        deadline = time.monotonic() + 60
        while True:
            found = deployment(f"deployed-crew/{name}")
            answer = httpx.post(
                f"{prefect_api.api_url}/deployments/{found.id}/create_flow_run", json={"parameters": {"who": "Ada"}}
            )
            if answer.status_code == httpx.codes.CREATED:
                break
            assert time.monotonic() < deadline, answer.text
        while True:
            run = httpx.get(f"{prefect_api.api_url}/flow_runs/{answer.json()['id']}").json()
            if run["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING"):
                break
            assert time.monotonic() < deadline, run["state"]
            time.sleep(0.2)
        assert run["state_type"] == "COMPLETED", run["state"]
        process.send(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert process.family() == []
    # Before 3.11 asyncio raises KeyboardInterrupt wherever Prefect's runner happens to be, which may print it.
    assert "Traceback" not in process.output or sys.version_info < (3, 11)
