"""`deploy` and `automations`: what they store on a real Prefect server, what they say, and that it runs.

test_mistakes.py has what is refused.
"""

import asyncio
import importlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async

from prefect_crew.deployments import crew_flow
from prefect_crew.devserver import CrewServer
from support.commands import Command

Store = Callable[..., str]
WorkPool = Callable[[str], str]
ADA = ("-i", "who=Ada")


def deployment(full_name: str) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(full_name)


async def run_of(deployment: Any, parameters: dict[str, Any]) -> None:
    """Make a flow run of a deployment and run it here, as a worker of a pool of the type `crew` does."""
    module, _, name = deployment.entrypoint.rpartition(".")
    async with get_client() as client:
        made = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        flow_run = await client.read_flow_run(made.id)
    loaded: Any = getattr(importlib.import_module(module), name)
    state: Any = await run_flow_async(loaded, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    assert state.is_completed(), state


def test_a_deployment_asks_for_the_inputs_of_its_crew(here: Command, greeter: str):
    made = here("deploy", greeter, "--name", "daily trip; date", "--tag", "mine").ok
    assert "Deployed deployed-crew/daily trip; date, which asks for who." in made
    # Quoted for a shell.
    assert """prefect deployment run 'deployed-crew/daily trip; date' -p 'inputs={"who": "…"}'""" in made
    assert "Nothing runs it yet" in made
    stored = deployment("deployed-crew/daily trip; date")
    assert stored.entrypoint == "prefect_crew.run_deployed_crew"
    assert stored.pull_steps == []
    assert stored.parameters == {"crew": greeter}
    assert stored.tags == ["prefect-crew", "mine"]
    assert stored.enforce_parameter_schema
    schema = stored.parameter_openapi_schema
    assert list(schema["properties"]) == ["inputs", "idempotency_key"]
    assert schema["required"] == ["inputs"]
    assert schema["properties"]["inputs"]["required"] == ["who"]


def test_a_schedule_is_told_with_its_next_time(here: Command, greeter: str):
    key = "daily-{scheduled_start:%Y-%m-%d}"
    made = here("deploy", greeter, *ADA, "--cron", "0 6 * * *", "--timezone", "Europe/Lisbon", "--key", key).ok
    when = r"Its schedule: 0 6 \* \* \* \(Europe/Lisbon\)\. The next run: \d{4}-\d\d-\d\d 06:00 WES?T\.\n"
    assert re.search(when, made)
    stored = deployment(f"deployed-crew/{greeter}")
    assert [(entry.schedule.cron, entry.schedule.timezone) for entry in stored.schedules] == [
        ("0 6 * * *", "Europe/Lisbon")
    ]
    # The form does not fill the key in: a person who runs other inputs takes no key of a scheduled run.
    assert stored.parameters == {"crew": greeter, "inputs": {"who": "Ada"}}
    assert [entry.parameters for entry in stored.schedules] == [{"idempotency_key": key}]


def test_a_second_deploy_replaces_the_first(here: Command, store: Store, work_pool: WorkPool):
    pool, greeter = work_pool("process"), store("greet", flow=True)
    first: Any = {"work_pool_name": pool, "job_variables": {"env": {"A": "b"}}, "cron": "0 6 * * *", "tags": ["mine"]}
    parameters = {"review": "form", "inputs": {"who": "Ada"}, "session": "ada"}
    crew_flow(greeter).deploy(greeter, parameters=parameters, concurrency_limit=2, print_next_steps=False, **first)
    again = here("deploy", greeter, "-i", "who=Grace", "--session", "ada")
    assert again.err == ""
    stored = deployment(f"deployed-crew/{greeter}")
    assert stored.parameters == {"crew": greeter, "inputs": {"who": "Grace"}, "session": "ada"}
    assert "session" in stored.parameter_openapi_schema["properties"]
    assert stored.schedules == []
    assert stored.work_pool_name == pool, "left out, it stays"


def test_it_needs_a_server_that_stays(alone: Command):
    done = alone("deploy", "travel", env={"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"})
    assert "prefect server start" in done.error(1)


def test_a_run_has_text_inputs_and_the_key_of_its_time(
    here: Command, crews: CrewServer, greeter: str, work_pool: WorkPool
):
    pool, key = work_pool("process"), ("--key", f"{greeter}-{{scheduled_start:%Y}}")
    for options in (("--pool", pool), ()):  # it keeps its pool
        assert f"prefect worker start --pool {pool}" in here("deploy", greeter, *key, *options).ok
    asyncio.run(run_of(deployment(f"deployed-crew/{greeter}"), {"inputs": {"who": 35}}))
    filled = f"{greeter}-{time.gmtime().tm_year}"
    assert [run.inputs for run in crews.runs if run.meta and run.meta["idempotency_key"] == filled] == [{"who": "35"}]


def test_a_secret_input_is_a_block_loaded_in_the_run(
    here: Command, crews: CrewServer, store: Store, greeter: str, pipeline: Path
):
    store("greet", greeter, secret_inputs=["who"])
    pipeline.write_text("\n".join(line for line in pipeline.read_text().splitlines() if "second" not in line))
    secret = f"hunter2-{greeter}"
    for line in (("deploy", greeter), ("deploy", "--pipeline", str(pipeline))):
        error = here(*line, "-i", f"who={secret}").error(2)
        assert "The input 'who' is secret" in error
        assert secret not in error
    Secret(value=secret).save(block := f"who-{greeter}")  # type: ignore[arg-type]
    assert here("deploy", "--pipeline", str(pipeline), "-i", f"who={block}").code == 0
    assert deployment(f"deployed-pipeline/{greeter}").parameters["pipeline"]["inputs"]["who"]["secret"] is True
    assert here("deploy", greeter, "-i", f"who={block}").code == 0
    stored = deployment(f"deployed-crew/{greeter}")
    assert stored.parameters["inputs"] == {"who": block}
    who = stored.parameter_openapi_schema["properties"]["inputs"]["properties"]["who"]
    assert who["type"] == "string"
    assert who["description"][:51] == "The name of the Prefect Secret block with the value"
    asyncio.run(run_of(stored, {}))
    assert {"who": secret} in [run.inputs for run in crews.runs]


def test_a_pipeline_asks_for_its_inputs_and_runs(
    here: Command, crews: CrewServer, greeter: str, pipeline: Path, work_pool: WorkPool
):
    pool = work_pool("crew")
    made = here("deploy", "--pipeline", str(pipeline), "--pool", pool, "--tag", "mine", "-i", "times=3").ok
    assert f"Deployed deployed-pipeline/{greeter}, which asks for who, times, tone." in made
    assert f"""prefect deployment run deployed-pipeline/{greeter} -p 'inputs={{"who": "…"}}'""" in made
    stored = deployment(f"deployed-pipeline/{greeter}")
    assert stored.entrypoint == "prefect_crew.run_deployed_pipeline"
    assert stored.pull_steps == []
    assert stored.work_pool_name == pool
    assert stored.tags == ["prefect-crew", "mine"]
    assert stored.description == "Greets twice."
    inputs = stored.parameter_openapi_schema["properties"]["inputs"]
    assert inputs["required"] == ["who"]
    who, times, tone = inputs["properties"].values()
    assert who["title"] == "who"
    assert who["description"] == "Whom to greet."
    assert [kind["type"] for kind in who["anyOf"]] == ["string", "number", "boolean"]  # a number becomes its text
    assert times["default"] == 3
    assert times["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert tone["default"] == "warm"
    person = f"Ada of {greeter}"
    asyncio.run(run_of(stored, {"inputs": {"who": person}}))
    runs = [run.inputs["who"] for run in crews.runs if person in run.inputs["who"]]
    assert runs == [person, f"**Hello** {person}, 3 times, warm"]


# Automations

RECOVERY = ["prefect-crew: no heartbeat", "prefect-crew: recover"]
ALERTS = [f"prefect-crew: alert {event}" for event in ("asked", "batch", "problem", "waiting")]


def automations() -> list[dict[str, Any]]:
    with get_client(sync_client=True) as client:
        every = client.request("POST", "/automations/filter", json={}).json()
    return [automation for automation in every if automation["name"] in (*RECOVERY, *ALERTS)]


@pytest.fixture
def pool(here: Command, work_pool: WorkPool) -> Iterator[str]:
    yield work_pool("crew")
    with get_client(sync_client=True) as client:
        for automation in automations():
            client.request("DELETE", f"/automations/{automation['id']}")
        client.delete_deployment(client.read_deployment_by_name("recover/crashed").id)


def test_automations_are_set_up(here: Command, pool: str):
    first = here("automations", "apply", "--pool", pool).ok
    assert "prefect-crew: recover\tcreated\tBegins a crashed flow run" in first
    assert "No alert was changed. Give --notify" in first

    block: Any = CustomWebhookNotificationBlock.model_validate({"name": "alerts", "url": "http://127.0.0.1:1"})
    block.save("alerts-of-a-test", overwrite=True, _sync=True)
    notify = ("--notify", "custom-webhook/alerts-of-a-test")
    lines = here("automations", "apply", *notify, "--waiting", "90m").ok.splitlines()[1:]
    changes = [line.split("\t") for line in lines]
    assert {name: change for name, change, _ in changes} == {
        **dict.fromkeys(RECOVERY, "updated"),
        **dict.fromkeys(ALERTS, "created"),
    }
    assert next(description for name, _, description in changes if name == ALERTS[-1]).endswith("for 1:30:00.")
    again = here("automations", "apply").ok.splitlines()[1:-1]
    assert [line.split("\t")[0] for line in again] == RECOVERY
    assert sorted(automation["name"] for automation in automations()) == sorted([*RECOVERY, *ALERTS])
    assert all(automation["enabled"] and automation["description"].endswith(".") for automation in automations())
