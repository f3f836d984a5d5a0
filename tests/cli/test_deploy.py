"""`deploy`: what it says, and the deployment that it serves itself."""

from __future__ import annotations

import asyncio
import importlib
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer
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
    assert found.entrypoint == f"prefect_crew.deployments.{name}(who)"
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
    assert here(*line, "-i", "who=Ada", "--key", "daily-{{ scheduled_start:%Y-%m-%d }}").code == 0
    found = deployment("deployed-crew/daily")
    assert found.parameters == {"who": "Ada", "idempotency_key": "daily-{{ scheduled_start:%Y-%m-%d }}"}
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
    same = here(*line, *defaults, "--key", "always")
    assert same.code == 25
    assert "is the same for every time of the schedule" in same.err
    assert here(*line, *defaults, "--interval", "3600").code == 0
    assert [one.schedule.interval.total_seconds() for one in deployment(f"deployed-crew/daily {name}").schedules] == [
        3600
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--pool", "no-such-pool"], "prefect work-pool create no-such-pool", id="pool"),
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
        # Before 3.9 Prefect's runner shows a traceback where the process of a flow run ends as the runner is stopped.
        while process.family() != [process.pid]:
            assert time.monotonic() < deadline, process.family()
            time.sleep(0.1)
        process.send(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert process.family() == []
    assert "Traceback" not in process.output


# Pipelines

STEPS = """
name: {name}
description: Greets twice.
inputs:
  who: {{description: Whom to greet.}}
  times: {{type: integer, default: 2}}
  tone: {{default: warm}}
steps:
  - {{name: first, crew: {crew}, inputs: {{who: "{{{{ who }}}}"}}}}
  - {{name: second, crew: {crew}, inputs: {{who: "{{{{ first.output }}}}, {{{{ times }}}} times, {{{{ tone }}}}"}}}}
"""


@pytest.fixture
def file(name: str, tmp_path: Path) -> Path:
    """A file with a pipeline over that crew. The pipeline is called as the crew is."""
    path = tmp_path / "greet.yaml"
    path.write_text(STEPS.format(name=name, crew=name))
    return path


def test_a_pipeline_asks_for_its_inputs(here, prefect_api: PrefectServer, crews: CrewServer, name: str, file: Path):
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    httpx.post(f"{prefect_api.api_url}/work_pools/", json={"name": pool, "type": "crew"}).raise_for_status()
    made = here("deploy", "--pipeline", str(file), "--pool", pool, "--tag", "mine", "-i", "times=3")
    assert made.code == 0, made.err
    assert f"Deployed deployed-pipeline/{name}, which asks for who, times, tone." in made.out
    assert f"""prefect deployment run deployed-pipeline/{name} -p 'inputs={{"who": "…"}}'""" in made.out
    assert f"prefect worker start --pool {pool}" in made.out
    found = deployment(f"deployed-pipeline/{name}")
    assert (found.entrypoint, found.pull_steps) == ("prefect_crew.run_deployed_pipeline", [])
    assert (found.work_pool_name, found.tags) == (pool, ["prefect-crew", "mine"])
    assert found.description == "Greets twice."
    schema = found.parameter_openapi_schema
    assert (list(schema["properties"]), schema["required"]) == (["inputs", "idempotency_key"], ["inputs"])
    inputs = schema["properties"]["inputs"]
    assert (list(inputs["properties"]), inputs["required"]) == (["who", "times", "tone"], ["who"])
    who, times, tone = inputs["properties"].values()
    assert (who["title"], who["description"], [kind["type"] for kind in who["anyOf"]]) == (
        "who",
        "Whom to greet.",
        ["string", "number", "boolean"],
    )
    assert (times["default"], times["anyOf"]) == (3, [{"type": "integer"}, {"type": "null"}])
    assert tone["default"] == "warm"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        pytest.param(None, "required", id="none"),
        pytest.param({"times": 2}, "'who' is a required property", id="one-missing"),
        pytest.param({"who": "Ada", "times": "x"}, "'x'", id="type"),
        pytest.param({"who": "Ada", "colour": "red"}, "colour", id="unknown"),
    ],
)
def test_prefect_refuses_a_run_of_a_pipeline_whose_inputs_do_not_fit(
    here, prefect_api: PrefectServer, name: str, file: Path, inputs: Any, said: str
):
    assert here("deploy", "--pipeline", str(file)).code == 0
    found = deployment(f"deployed-pipeline/{name}")
    parameters = {} if inputs is None else {"inputs": inputs}
    refused = httpx.post(
        f"{prefect_api.api_url}/deployments/{found.id}/create_flow_run", json={"parameters": parameters}
    )
    assert refused.status_code in (409, 422), refused.text
    assert said in refused.text


def test_a_deployed_pipeline_runs_by_its_entrypoint(
    here, prefect_api: PrefectServer, crews: CrewServer, name: str, file: Path
):
    assert here("deploy", "--pipeline", str(file), "-i", "tone=dry").code == 0
    found = deployment(f"deployed-pipeline/{name}")
    who = f"Ada of {name}"
    state = asyncio.run(run_of(found, {"inputs": {"who": who}}))
    assert state.is_completed(), state
    runs = [run.inputs["who"] for run in crews.runs if who in run.inputs["who"]]
    assert runs == [who, f"**Hello** {who}, 2 times, dry"]


async def run_of(deployment: Any, parameters: dict[str, Any]) -> Any:
    """Make a flow run of a deployment and run it here, as a worker of a pool of the type `crew` does."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow_async

    module, _, name = deployment.entrypoint.rpartition(".")
    async with get_client() as client:
        made = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        flow_run = await client.read_flow_run(made.id)
    flow: Any = getattr(importlib.import_module(module), name)
    return await run_flow_async(flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")


def test_a_schedule_of_a_pipeline_needs_its_inputs(here, name: str, file: Path):
    line = ("deploy", "--pipeline", str(file), "--cron", "0 6 * * *")
    without = here(*line)
    assert without.code == 25
    assert "Missing: who" in without.err
    made = here(*line, "-i", "who=Ada", "--key", "greet-{{ scheduled_start:%Y-%m-%d }}")
    assert made.code == 0, made.err
    found = deployment(f"deployed-pipeline/{name}")
    assert found.schedules[0].schedule.cron == "0 6 * * *"
    assert found.parameters["idempotency_key"] == "greet-{{ scheduled_start:%Y-%m-%d }}"
    assert "required" not in found.parameter_openapi_schema


def test_the_inputs_of_a_pipeline_that_declares_none_are_found(here, name: str, tmp_path: Path):
    path = tmp_path / "found.yaml"
    path.write_text(
        f"name: found-{name}\nsteps: [{{name: a, crew: {name}}}, {{name: b, crew: {name}, inputs: "
        "{who: '{{ a.output }} and {{ whom }}'}}]"
    )
    assert here("deploy", "--pipeline", str(path)).code == 0
    found = deployment(f"deployed-pipeline/found-{name}")
    assert found.parameter_openapi_schema["properties"]["inputs"]["required"] == ["who", "whom"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        pytest.param("{{ who }}", "{{ whom }}", "'whom' is neither an input of the pipeline nor a step", id="template"),
        pytest.param("inputs: {who:", "inputs: {whom:", "gives the unknown inputs whom", id="input-of-a-crew"),
        pytest.param("crew: ", "crew: never-", "No crew is stored under the name", id="crew"),
        pytest.param("name: second", "name: first", "two steps are named 'first'", id="step"),
        pytest.param("steps:", "stpes:", "stpes: there is no such field", id="field"),
    ],
)
def test_a_pipeline_that_cannot_run_is_not_deployed(here, name: str, file: Path, before: str, after: str, said: str):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    done = here("deploy", "--pipeline", str(file))
    assert done.code == 25
    assert said in done.err


def test_a_default_that_the_pipeline_does_not_know(here, file: Path):
    done = here("deploy", "--pipeline", str(file), "-i", "colour=red")
    assert done.code == 25
    assert "does not know the inputs colour; it takes who, times, tone." in done.err
    done = here("deploy", "--pipeline", str(file), "-i", "times=two")
    assert done.code == 25
    assert "The default of the input times is to be JSON of the type integer." in done.err


def test_a_file_that_is_not_there(here):
    done = here("deploy", "--pipeline", "nowhere.yaml")
    assert done.code == 25
    assert "The pipeline in nowhere.yaml cannot be read" in done.err


def test_a_secret_input_of_a_pipeline_is_the_name_of_a_block(here, crews: CrewServer, name: str, file: Path):
    from prefect.blocks.system import Secret

    block: Any = crews.crew(url=f"{crews.url}/greet", secret_inputs=["who"])
    block.save(name, overwrite=True)
    text = file.read_text()
    only = "\n".join(line for line in text.splitlines() if "second" not in line)
    file.write_text(only)
    done = here("deploy", "--pipeline", str(file), "-i", "who=hunter2")
    assert done.code == 25
    assert "The input 'who' is secret" in done.err
    assert "hunter2" not in done.err
    secret: Any = Secret(value="hunter2")
    secret.save(f"who-{name}")
    assert here("deploy", "--pipeline", str(file), "-i", f"who=who-{name}").code == 0
    found = deployment(f"deployed-pipeline/{name}")
    who = found.parameter_openapi_schema["properties"]["inputs"]["properties"]["who"]
    assert who["description"].startswith("The name of the Prefect Secret block that holds it")
    assert found.parameters["pipeline"]["inputs"]["who"]["secret"] is True
    file.write_text(only.replace("{{ who }}", "hunter2"))
    done = here("deploy", "--pipeline", str(file))
    assert done.code == 25
    assert "step 'first', input 'who': it is secret" in done.err


# Flows


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's own, which can be imported."""
    name = f"flows_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(
        "from prefect import flow\n\n\n"
        "@flow(name='greet-them')\nasync def greet(who: str, times: int = 1) -> str:\n    return f'{who} {times}'\n\n\n"
        "@flow\ndef plain() -> None:\n    pass\n\n\n"
        "async def no_flow() -> None:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_flow_is_deployed_by_its_import_path(here, prefect_api: PrefectServer, module: str):
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    httpx.post(f"{prefect_api.api_url}/work_pools/", json={"name": pool, "type": "crew"}).raise_for_status()
    made = here("deploy", "--flow", f"{module}.greet", "--pool", pool, "-i", "times=3")
    assert made.code == 0, made.err
    assert "Deployed greet-them/greet, which asks for who, times." in made.out
    assert "prefect deployment run greet-them/greet -p who=…" in made.out
    assert f"PREFECT_INTEGRATIONS_CREW_WORKER_MODULES={module}" in made.out
    found = deployment("greet-them/greet")
    assert (found.entrypoint, found.parameters, found.pull_steps) == (f"{module}.greet", {"times": 3}, [])
    state = asyncio.run(run_of(found, {"who": "Ada"}))
    assert state.is_completed(), state


@pytest.mark.parametrize(
    ("path", "said"),
    [
        pytest.param("{}.plain", "is synchronous, and a crew worker runs asynchronous ones only", id="synchronous"),
        pytest.param("{}.no_flow", "is no flow: decorate the function with @flow.", id="no-flow"),
        pytest.param("{}.nothing", "cannot be imported", id="no-name"),
        pytest.param("never_installed.greet", "No module named 'never_installed'", id="no-module"),
        pytest.param("flows/greet.py:greet", "is no import path of a flow", id="a-file"),
    ],
)
def test_a_flow_that_a_crew_worker_cannot_run_is_not_deployed(
    here, prefect_api: PrefectServer, module: str, path: str, said: str
):
    done = here("deploy", "--flow", path.format(module))
    assert done.code == 25
    assert said in done.err


@pytest.mark.parametrize(
    "line",
    [["deploy"], ["deploy", "x", "--flow", "a.b"], ["deploy", "--pipeline", "x.yaml", "--flow", "a.b"]],
    ids=["nothing", "crew-and-flow", "pipeline-and-flow"],
)
def test_one_thing_is_deployed(here, line: list[str]):
    done = here(*line)
    assert done.code == 2
    assert "CREW, --pipeline FILE or --flow PATH" in done.err
