"""`deploy` and `backfill`: what they store on a real Prefect server, what they say, and that it runs."""

from __future__ import annotations

import asyncio
import importlib
import re
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async
from prefect.settings import PREFECT_API_URL, PREFECT_DEFAULT_WORK_POOL_NAME, temporary_settings

from prefect_crew.deployments import crew_flow
from prefect_crew.devserver import CrewServer

TEXT = ["string", "number", "boolean"]
"""What an input that is text takes: a number of JSON becomes its text."""


@pytest.fixture
def name(prefect_api: object, crews: CrewServer) -> str:
    """The name of a stored crew with the input `who`."""
    name = f"greet-{uuid.uuid4().hex[:8]}"
    save(crews, name)
    return name


def save(crews: CrewServer, name: str, **fields: Any) -> None:
    block: Any = crews.crew(url=f"{crews.url}/greet", wait={"initial": 0.1, "max_interval": 0.5}, **fields)
    block.save(name, overwrite=True, _sync=True)


def deployment(full_name: str) -> Any:
    async def read() -> Any:
        async with get_client() as client:
            return await client.read_deployment_by_name(full_name)

    return asyncio.run(read())


def work_pool(kind: str) -> str:
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    httpx.post(f"{PREFECT_API_URL.value()}/work_pools/", json={"name": pool, "type": kind}).raise_for_status()
    return pool


async def run_of(deployment: Any, parameters: dict[str, Any]) -> None:
    """Make a flow run of a deployment and run it here, as a worker of a pool of the type `crew` does."""
    module, _, name = deployment.entrypoint.rpartition(".")
    async with get_client() as client:
        made = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        flow_run = await client.read_flow_run(made.id)
    loaded: Any = getattr(importlib.import_module(module), name)
    state = await run_flow_async(loaded, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    assert state.is_completed(), state


def test_a_deployment_asks_for_the_inputs_of_its_crew(here, name: str):
    made = here("deploy", name, "--name", "daily trip; date", "--tag", "mine", "--concurrency-limit", "2")
    assert made.code == 0, made.err
    for part in (
        "Deployed deployed-crew/daily trip; date, which asks for who.",
        """prefect deployment run 'deployed-crew/daily trip; date' -p 'inputs={"who": "…"}'""",  # quoted for a shell
        "Nothing runs it yet",
    ):
        assert part in made.out
    found = deployment("deployed-crew/daily trip; date")
    assert (found.entrypoint, found.pull_steps) == ("prefect_crew.run_deployed_crew", [])
    assert (found.parameters, found.tags) == ({"crew": name}, ["prefect-crew", "mine"])
    assert found.enforce_parameter_schema
    schema = found.parameter_openapi_schema
    assert (list(schema["properties"]), schema["required"]) == (["inputs", "idempotency_key", "session"], ["inputs"])
    inputs = schema["properties"]["inputs"]
    assert (list(inputs["properties"]), inputs["required"]) == (["who"], ["who"])


def test_a_schedule_needs_defaults_and_stays_with_its_key_until_another_is_given(here, crews: CrewServer, name: str):
    full_name, key = f"deployed-crew/daily {name}", "daily-{scheduled_start:%Y-%m-%d}"

    def deploy(*options: str, code: int = 0) -> str:
        done = here("deploy", name, "--name", f"daily {name}", *options)
        assert done.code == code, done.err
        return done.out + done.err

    daily, ada = ("--cron", "0 6 * * *", "--timezone", "Europe/Lisbon"), ("-i", "who=Ada")
    assert "Missing: who." in deploy(*daily, code=2)
    when = r"schedule: 0 6 \* \* \* \(Europe/Lisbon\)\. The next run: \d{4}-\d\d-\d\d 06:00 WES?T\.\n"
    assert re.search(f"Its {when}", deploy(*daily, *ada, "--key", key, "--session", "trips"))
    found = deployment(full_name)
    assert (found.parameters["inputs"], found.parameters["idempotency_key"]) == ({"who": "Ada"}, key)
    assert (found.schedules[0].schedule.cron, found.schedules[0].schedule.timezone) == ("0 6 * * *", "Europe/Lisbon")

    again = deploy("-i", "who=Grace")
    assert "Its earlier schedule stays: 0 6 * * * (Europe/Lisbon)" in again
    assert f"Its earlier idempotency key stays: {key}\nIts earlier session stays: trips\n" in again
    found = deployment(full_name)
    assert [one.schedule.cron for one in found.schedules] == ["0 6 * * *"]
    assert found.parameters == {"crew": name, "inputs": {"who": "Grace"}, "idempotency_key": key, "session": "trips"}
    other = f"other-{name}"
    save(crews, other)
    refused = here("deploy", other, "--name", f"daily {name}", *ada)
    assert refused.code == 2
    assert f"The deployment {full_name} is of '{name}', not of '{other}'. Nothing was deployed." in refused.err
    assert deployment(full_name).parameters["crew"] == name
    assert f"delete the schedule of {full_name}, or choose another name." in deploy(code=2)
    nowhere = deploy(*ada, "--cron", "0 6 * * *", "--timezone", "Mars/Base", code=2)
    assert "The deployment cannot be made: Invalid timezone" in nowhere
    assert "errors.pydantic.dev" not in nowhere
    shared = f"Several run times of a schedule of {full_name} share the key 'daily-"
    assert shared in deploy(*ada, "--cron", "* * * * *", "--key", key)
    assert shared in deploy(*ada, "--key", key)  # of the schedule that stays
    assert "is the same for every time of the schedule" in deploy(*ada, "--key", "always", code=2)
    assert "Its schedule: every 1:00:00 (UTC). The next run: " in deploy(*ada, "--interval", "3600")
    assert [one.schedule.interval.total_seconds() for one in deployment(full_name).schedules] == [3600]


def test_a_second_deploy_keeps_what_it_is_not_given(here, name: str):
    full_name, pools = f"deployed-crew/{name}", [work_pool("process") for _ in range(2)]

    def deploy(*options: str) -> str:
        with temporary_settings({PREFECT_DEFAULT_WORK_POOL_NAME: pools[1]}):
            done = here("deploy", name, *options)
        assert done.code == 0, done.err
        return done.out

    def facts() -> Any:
        found = deployment(full_name)
        limit = found.global_concurrency_limit
        parameters = [found.parameters.get(one) for one in ("idempotency_key", "session")]
        return *parameters, limit and limit.limit, found.tags[1:], found.work_pool_name

    key, tags = "trip-{scheduled_start:%Y-%m-%d}", ["recover-crashed"]
    given = ("--key", key, "--session", "ada", "--concurrency-limit", "2", "--tag", *tags, "--pool", pools[0])
    deploy(*given)
    for schedule in ((), ("--cron", "0 6 * * *", "-i", "who=Ada"), ("--cron", "0 7 * * *", "-i", "who=Ada")):
        out = deploy(*schedule)
        assert facts() == (key, "ada", 2, tags, pools[0])
        for kept in (f"idempotency key stays: {key}", "session stays: ada", "limit stays: 2", "tag stays: recover"):
            assert f"Its earlier {kept}" in out.replace("concurrency ", "")
    deploy("--key", "", "--session", "", "--concurrency-limit", "0", "-i", "who=Ada")
    assert facts() == (None, None, None, tags, pools[0])


def test_a_second_deploy_keeps_parameters_and_job_variables(here, name: str):
    pool, other = (work_pool("process") for _ in range(2))
    by_hand = {"review": "form", "wait": {"human_timeout": 604800}}
    of_pool = {"work_pool_name": pool, "job_variables": {"env": {"A": "b"}}}
    crew_flow(name).deploy(name, parameters=by_hand, print_next_steps=False, **of_pool)
    out, stored = here("deploy", name, "-i", "who=Ada").out, deployment(f"deployed-crew/{name}")
    assert "Its earlier parameter stays: review, wait" in out
    assert stored.parameters == {**by_hand, "crew": name, "inputs": {"who": "Ada"}}
    assert (stored.work_pool_name, stored.job_variables) == (pool, of_pool["job_variables"])
    moved = here("deploy", name, "--pool", other)
    assert f"Its job variables are gone: they belonged to work pool {pool}." in moved.err


@pytest.mark.parametrize("line", ["deploy travel", "backfill travel/daily --from 2024-02-28 --to 2024-03-01"])
def test_it_needs_a_server_that_stays(alone, line: str):
    done = alone(*line.split(), env={"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"})
    assert done.code == 1
    assert "prefect server start" in done.err


def test_a_run_has_text_inputs_and_the_key_of_its_time(here, crews: CrewServer, name: str):
    pool, key = work_pool("process"), ("--key", f"{name}-{{scheduled_start:%Y}}")
    made = here("deploy", name, "--pool", pool, *key)
    assert f"prefect worker start --pool {pool}" in made.out
    assert f"prefect worker start --pool {pool}" in here("deploy", name, *key).out, "it keeps its pool"
    asyncio.run(run_of(deployment(f"deployed-crew/{name}"), {"inputs": {"who": 35}}))
    filled = f"{name}-{time.gmtime().tm_year}"
    assert [one.inputs for one in crews.runs if one.meta and one.meta["idempotency_key"] == filled] == [{"who": "35"}]


def test_a_secret_input_is_a_block_loaded_in_the_run(here, crews: CrewServer, name: str):
    secret, block = f"who-{uuid.uuid4().hex}", f"who-{uuid.uuid4().hex[:8]}"
    save(crews, name, secret_inputs=["who"])
    refused = here("deploy", name, "-i", f"who={secret}")
    assert (refused.code, "'who' is secret" in refused.err, secret in refused.err) == (2, True, False)
    value: Any = Secret(value=secret)
    value.save(block)
    assert here("deploy", name, "-i", f"who={block}").code == 0
    found = deployment(f"deployed-crew/{name}")
    assert found.parameters["inputs"] == {"who": block}
    who = found.parameter_openapi_schema["properties"]["inputs"]["properties"]["who"]
    assert (who["type"], who["description"][:51]) == ("string", "The name of the Prefect Secret block with the value")
    asyncio.run(run_of(found, {}))
    assert {"who": secret} in [run.inputs for run in crews.runs]


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


def test_a_pipeline_asks_for_its_inputs_and_runs(here, crews: CrewServer, name: str, file: Path):
    pool = work_pool("crew")
    made = here("deploy", "--pipeline", str(file), "--pool", pool, "--tag", "mine", "-i", "times=3")
    assert made.code == 0, made.err
    assert f"Deployed deployed-pipeline/{name}, which asks for who, times, tone." in made.out
    assert f"""prefect deployment run deployed-pipeline/{name} -p 'inputs={{"who": "…"}}'""" in made.out
    found = deployment(f"deployed-pipeline/{name}")
    assert (found.entrypoint, found.pull_steps) == ("prefect_crew.run_deployed_pipeline", [])
    assert (found.work_pool_name, found.tags) == (pool, ["prefect-crew", "mine"])
    assert found.description == "Greets twice."
    inputs = found.parameter_openapi_schema["properties"]["inputs"]
    assert inputs["required"] == ["who"]
    who, times, tone = inputs["properties"].values()
    assert (who["title"], who["description"]) == ("who", "Whom to greet.")
    assert [kind["type"] for kind in who["anyOf"]] == TEXT
    assert (times["default"], times["anyOf"]) == (3, [{"type": "integer"}, {"type": "null"}])
    assert tone["default"] == "warm"
    who = f"Ada of {name}"
    asyncio.run(run_of(found, {"inputs": {"who": who}}))
    runs = [run.inputs["who"] for run in crews.runs if who in run.inputs["who"]]
    assert runs == [who, f"**Hello** {who}, 3 times, warm"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("{{ who }}", "{{ whom }}", "'whom' is no step, and no input that has a value"),
        ("crew: ", "crew: no-", "No crew is stored under the name 'no-"),
    ],
)
def test_a_pipeline_that_cannot_run_is_not_deployed(here, name: str, file: Path, before: str, after: str, said: str):
    file.write_text(file.read_text().replace(before, after))
    done = here("deploy", "--pipeline", str(file))
    assert (done.code, ".." in done.err) == (2, False)
    assert said in done.err


def test_a_secret_input_of_a_pipeline_is_the_name_of_a_block(here, crews: CrewServer, name: str, file: Path):
    save(crews, name, secret_inputs=["who"])
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "second" not in line))
    done = here("deploy", "--pipeline", str(file), "-i", "who=hunter2")
    assert (done.code, "The input 'who' is secret" in done.err, "hunter2" in done.err) == (2, True, False)
    secret: Any = Secret(value="hunter2")
    secret.save(f"who-{name}")
    assert here("deploy", "--pipeline", str(file), "-i", f"who=who-{name}").code == 0
    assert deployment(f"deployed-pipeline/{name}").parameters["pipeline"]["inputs"]["who"]["secret"] is True


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{name} --pool no-such-pool", "prefect work-pool create no-such-pool"),
        ("{name} -i colour=red", "does not know the inputs colour; it takes who."),
        ("{name} --cron now -i who=Ada", "cron"),
        ("{name} --interval 1e15 -i who=Ada", "The schedule cannot be made"),
        ("{name} --key trip-{{start}}", "'{start}' is not known"),
        ("--pipeline {file} -i colour=red", "it takes who, times, tone."),
        ("--pipeline {file} -i times=two", "The default of the input times must be JSON of the"),
        ("--pipeline {file} --interval 60", "Missing: who"),
        ("--pipeline {file} --session trips", "cannot have the parameter 'session'; it takes"),
        (f"{{name}} --session {'x' * 201}", "it has to be a name of 1 to 200 characters"),
        ("--pipeline nowhere.yaml", "The pipeline in nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_deployed(here, name: str, file: Path, line: str, said: str):
    done = here("deploy", *line.format(name=name, file=file).split())
    assert done.code == 2
    assert said in done.err


def test_a_second_backfill_creates_nothing_twice(here, name: str):
    line = ("deploy", name, "--name", f"past {name}", "-i", "who=Ada", "--cron", "0 6 * * *")
    assert here(*line, "--key", f"{name}-{{scheduled_start:%Y-%m-%d}}").code == 0
    line = ("backfill", f"deployed-crew/past {name}", "--from", "2024-02-28", "--to", "2024-03-01")
    planned = here(*line, "--dry-run")
    assert (planned.code, planned.out.count("to create")) == (0, 3)
    for created in (True, False):
        runs = here(*line, "-o", "json").json
        days = [(run["scheduled_for"][:10], run["created"]) for run in runs]
        assert days == [("2024-02-28", created), ("2024-02-29", created), ("2024-03-01", created)]
