"""Flows whose form asks for the inputs of a crew or a pipeline; flow runs for past times, and none twice."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import pytest
from prefect import get_client
from prefect.blocks.system import Secret
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Cron, RRule
from prefect.utilities.callables import parameter_schema

from prefect_crew import crew_flow, pipeline_flow
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.flows import run_deployed_crew
from support.prefect_server import PrefectServer
from support.servers import describing

CREW = """
name: form
inputs:
  - topic
  - {name: first name, description: Of the reader., required: false}
  - {name: tone, description: How it sounds., default: dry, required: false}
  - {name: days, type: integer}
  - {name: odd, type: whatever}
tasks: [{name: t, output: x}]
"""
TEXT = ["string", "number", "boolean"]
KEY = "day-{scheduled_start:%Y-%m-%d}"


@pytest.fixture
def crew(prefect_api: PrefectServer) -> Iterator[CrewServer]:
    """A crew with that form, which is stored as `form`."""
    with describing(CrewServer(CREW)) as server:
        block: Any = server.crew(wait={"initial": 0.1, "max_interval": 0.5})
        block.save("form", overwrite=True, _sync=True)
        yield server


def kinds(field: dict[str, Any]) -> list[str]:
    return [kind["type"] for kind in field.get("anyOf", [field])]


async def test_the_form_asks_for_each_input_and_says_what_it_is(crew: CrewServer):
    deployment: Any = await crew_flow("form").to_deployment("form")
    schema = deployment._parameter_openapi_schema.model_dump()["properties"]["inputs"]
    assert deployment.parameters == {"crew": "form"}
    assert deployment.tags == ["prefect-crew"]
    assert schema["required"] == ["topic", "days", "odd"]
    fields = schema["properties"]
    assert list(fields) == ["topic", "first name", "tone", "days", "odd"]
    assert [field["position"] for field in fields.values()] == list(range(5))
    assert fields["topic"]["title"] == "topic"
    assert kinds(fields["topic"]) == TEXT
    assert fields["first name"]["description"] == "Of the reader."
    assert kinds(fields["first name"]) == [*TEXT, "null"]
    assert fields["tone"]["description"] == "How it sounds. The crew's own default: dry."
    assert fields["tone"]["default"] is None
    assert fields["first name"]["default"] is None
    assert kinds(fields["days"]) == ["integer"]
    assert kinds(fields["odd"]) == TEXT


GIVEN = {"topic": "tea", "days": 3, "odd": "x"}


async def test_a_call_runs_the_crew_and_the_form_is_read_only_where_prefect_makes_one(crew: CrewServer):
    travel = crew_flow("form").with_options(name="travel", retries=1)
    assert travel.name == "travel"
    assert travel.retries == 1
    assert crew.requests["inputs"] == 0
    result = await travel(GIVEN, idempotency_key=f"call {uuid4()}")
    assert result.output == "x"
    assert crew.runs[-1].inputs["days"] == "3"
    asked = crew.requests["inputs"]
    assert asked == 1, "the check of the inputs, as for each run"
    assert "topic" in parameter_schema(travel).model_dump()["properties"]["inputs"]["properties"]
    assert crew.requests["inputs"] == asked + 1


def test_a_call_in_sync_code_and_a_copy_in_another_process(crew: CrewServer):
    travel = cloudpickle.loads(cloudpickle.dumps(crew_flow("form")))
    assert asyncio.run(travel(GIVEN)).output == "x"
    copied = travel.to_deployment()
    assert copied.name == "form"
    assert copied.parameters == {"crew": "form"}


@pytest.fixture
async def pool(prefect_api: PrefectServer) -> str:
    """The name of a work pool of the type `crew`."""
    pool = f"pool-{uuid4().hex[:8]}"
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="crew"))
    return pool


async def test_a_deployment_takes_what_prefect_offers(crew: CrewServer, pool: str):
    made: Any = crew_flow("form").deploy(
        "whole",
        work_pool_name=pool,
        work_queue_name="urgent",
        job_variables={"env": {"A": "1"}},
        schedules=[
            Cron("0 6 * * *", timezone="Europe/Lisbon", parameters={"idempotency_key": "{scheduled_start:%F}"}),
            RRule("FREQ=WEEKLY;BYDAY=MO", slug="mondays"),
        ],
        concurrency_limit=ConcurrencyLimitConfig(limit=2, collision_strategy="CANCEL_NEW"),
        triggers=[DeploymentEventTrigger(expect={"crew.completed"}, name=f"after {pool}")],
        tags=["mine"],
        version="7",
        description="All of it.",
        paused=True,
        parameters={"inputs": {**GIVEN, "days": "4"}, "review": "form"},
        print_next_steps=False,
    )
    async with get_client() as client:
        stored = await client.read_deployment(await made)
        automations = await client.read_automations_by_name(f"after {pool}")
    assert stored.entrypoint == "prefect_crew.run_deployed_crew"
    assert stored.pull_steps == []
    assert stored.parameters == {"crew": "form", "inputs": {**GIVEN, "days": 4}, "review": "form"}
    assert stored.work_queue_name == "urgent"
    assert stored.job_variables == {"env": {"A": "1"}}
    schedules = {type(entry.schedule).__name__: entry.parameters for entry in stored.schedules}
    assert schedules == {"CronSchedule": {"idempotency_key": "{scheduled_start:%F}"}, "RRuleSchedule": {}}
    assert stored.concurrency_options
    assert stored.concurrency_options.collision_strategy == "CANCEL_NEW"
    assert stored.tags == ["prefect-crew", "mine"]
    assert stored.version == "7"
    assert stored.description == "All of it."
    assert stored.paused is True
    assert len(automations) == 1


def defaults(**parameters: Any) -> dict[str, Any]:
    return {"parameters": parameters}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown input": (defaults(inputs={"colour": "red"}), "does not know the inputs colour; it takes topic, "),
    "wrong type": (defaults(inputs={"days": "many"}), "must be JSON of the type integer"),
    "unknown input of a schedule": (
        {"schedules": [Cron("0 6 * * *", parameters={"inputs": {"colour": "red"}})]},
        "does not know the inputs colour; it takes topic, ",
    ),
    "session of a crew that is no Flow": (defaults(session="a"), "Crew 'form' takes no session"),
    "session of a schedule": (
        {"schedules": [Cron("0 6 * * *", parameters={"session": "a"})]},
        "Crew 'form' takes no session",
    ),
    "a text in place of inputs": (defaults(inputs="tea"), "takes its inputs by name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_default_that_does_not_fit_is_refused(crew: CrewServer, case: str):
    options, problem = REFUSED[case]
    with pytest.raises(ConfigurationError, match=problem):
        crew_flow("form").to_deployment("refused", **options)


async def test_a_crew_that_takes_extra_inputs_takes_them_from_its_deployment(crew: CrewServer, pool: str):
    block: Any = crew.crew(allow_extra_inputs=True, secret_inputs=["pin"])
    await block.save("form", overwrite=True)
    pin: Any = Secret(value="hunter22-secret")
    await pin.save("the-pin", overwrite=True)
    extra = {"colour": "red", "sizes": [1, 2], "pin": "the-pin"}
    made: Any = crew_flow("form").deploy(
        "extra",
        work_pool_name=pool,
        parameters={"inputs": {**GIVEN, **extra}},
        schedules=[Cron("0 6 * * *", parameters={"inputs": {**GIVEN, "shape": "round"}})],
        print_next_steps=False,
    )
    async with get_client() as client:
        stored = await client.read_deployment(await made)
        assert stored.parameters == {"crew": "form", "inputs": {**GIVEN, **extra}}
        assert stored.schedules[0].parameters == {"inputs": {**GIVEN, "shape": "round"}}
        flow_run = await client.create_flow_run_from_deployment(
            stored.id, parameters={"inputs": {**GIVEN, **extra, "shape": "round"}}
        )
    await run_deployed_crew(**flow_run.parameters)
    assert crew.runs[-1].inputs["shape"] == "round"
    assert crew.runs[-1].inputs["pin"] == "hunter22-secret"
    with pytest.raises(ConfigurationError, match="Secret block"):
        await crew_flow("form").to_deployment("refused", parameters={"inputs": {"pin": "hunter22-secret"}})


def test_a_secret_of_a_schedule_is_the_name_of_a_block(crew: CrewServer, prefect_api: PrefectServer):
    crew.crew(secret_inputs=["topic"]).save("form", overwrite=True)
    secret = Cron("0 6 * * *", parameters={"inputs": {"topic": "hunter22-secret"}})
    with pytest.raises(ConfigurationError, match="Secret block") as caught:
        crew_flow("form").to_deployment("refused", schedules=[secret])
    assert "hunter22" not in str(caught.value)


def test_a_crew_that_is_not_stored_is_named_where_the_form_is_made(prefect_api: PrefectServer):
    with pytest.raises(ConfigurationError, match="No crew is stored under the name 'nowhere'"):
        crew_flow("nowhere").to_deployment("nowhere")


PIPELINE = """
description: Writes twice.
inputs: {topic: {}, days: {type: integer, default: 2}}
steps:
  - {name: one, crew: form, inputs: {topic: "{{ topic }}", days: "{{ days }}", odd: x}}
"""


async def test_a_pipeline_of_a_file_is_held_by_its_deployment_with_the_defaults(crew: CrewServer, tmp_path: Path):
    file = tmp_path / "write.yaml"
    file.write_text(PIPELINE)
    write = pipeline_flow(file)
    assert write.label == "write"
    deployment: Any = await write.to_deployment("write", parameters={"inputs": {"days": "5"}})
    assert deployment.entrypoint == "prefect_crew.run_deployed_pipeline"
    assert deployment.parameters.keys() == {"pipeline"}
    assert deployment.parameters["pipeline"]["inputs"]["days"]["default"] == 5
    assert deployment._parameter_openapi_schema.model_dump()["properties"]["inputs"]["required"] == ["topic"]
    result = await write({"topic": "tea"})
    assert result["one"].output == "x"
    assert crew.runs[-1].inputs["days"] == "2"
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml cannot be read"):
        pipeline_flow("nowhere.yaml")
