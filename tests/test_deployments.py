"""The form of a deployed crew's inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prefect_crew.blocks import DeployedCrew
from prefect_crew.crew import Crew
from prefect_crew.deployments import Plan, build_deployment, crew_target
from prefect_crew.devserver import CrewServer

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


async def fields_of(crew: Crew, **defaults: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the deployment's parameters and the schema of its inputs."""
    deployment = build_deployment(await crew_target(crew, defaults), Plan("form"))
    schema = deployment._parameter_openapi_schema.model_dump()
    return deployment.parameters, schema["properties"]["inputs"]


@pytest.fixture
async def crew() -> Any:
    with CrewServer(CREW, response_format="live") as server:
        block: Any = server.crew()
        assert isinstance(block, DeployedCrew)
        yield block.crew.called("form")


def kinds(field: dict[str, Any]) -> list[str]:
    return [kind["type"] for kind in field.get("anyOf", [field])]


async def test_the_form_asks_for_each_input_and_says_what_it_is(crew: Crew):
    parameters, schema = await fields_of(crew)
    assert parameters == {"crew": "form"}
    assert schema["required"] == ["topic", "days", "odd"]
    fields = schema["properties"]
    assert list(fields) == ["topic", "first name", "tone", "days", "odd"]
    assert [field["position"] for field in fields.values()] == list(range(5))
    assert (fields["topic"]["title"], kinds(fields["topic"])) == ("topic", TEXT)
    assert (fields["first name"]["description"], kinds(fields["first name"])) == ("Of the reader.", [*TEXT, "null"])
    assert fields["tone"]["description"] == "How it sounds. The crew's own default: dry."
    assert (fields["tone"]["default"], fields["first name"]["default"]) == (None, None)
    assert (kinds(fields["days"]), kinds(fields["odd"])) == (["integer"], TEXT)


async def test_defaults_are_the_deployments_and_what_is_required_stays_so(crew: Crew):
    parameters, schema = await fields_of(crew, days="3", topic="1.10")
    assert parameters["inputs"] == {"days": 3, "topic": "1.10"}
    assert schema["properties"]["days"]["default"] == 3
    assert schema["required"] == ["topic", "days", "odd"]


async def test_a_secret_input_is_the_name_of_a_block(crew: Crew):
    _, schema = await fields_of(replace(crew, secret_inputs=("days",)))
    assert schema["properties"]["days"]["type"] == "string"
    assert schema["properties"]["days"]["description"].startswith("The name of the Prefect Secret block")
