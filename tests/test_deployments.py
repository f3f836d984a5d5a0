"""A crew's own deployment: its form, its entrypoint, and that it really runs, by `serve` and on a process worker."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint

from prefect_crew import deployments
from prefect_crew.blocks import DeployedCrew
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import Crew
from prefect_crew.deployments import Plan, crew_flow, deployment_of, entrypoint_attribute, parameter_names
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError
from support.prefect_server import PrefectServer, drain
from support.workers import Worker

TRAVEL = [CrewInput(name=name) for name in ("budget", "interests", "duration", "age")]
ODD = [
    "first name",
    "class",
    "idempotency_key",
    "a.b,c(d)",
    "2nd",
    "_private",
    "first_name",
    "schema",
    "copy",
    "été",
    "-",
]


def crew() -> Crew:
    return DeployedCrew(url="https://travel.example.com", token="token-1").crew.called("travel")  # type: ignore[arg-type]


def test_parameters_are_named_as_the_inputs_where_python_allows_that():
    names = parameter_names([item.name for item in TRAVEL])
    assert list(names) == list(names.values())


def test_any_input_gets_a_parameter_of_its_own():
    names = parameter_names(ODD)
    assert len(set(names.values())) == len(ODD)
    for name in names.values():
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)  # which refuses what is no name


@pytest.mark.parametrize("inputs", [["budget", "interests"], ODD, []], ids=["plain", "odd", "none"])
def test_the_entrypoint_alone_makes_the_flow_again(inputs: list[str]):
    made = crew_flow("travel-2", [CrewInput(name=name) for name in inputs])
    loaded = load_flow_from_entrypoint(f"{made.__module__}.{made.__name__}")
    assert loaded.name == made.name == deployments.FLOW_NAME
    assert list(inspect.signature(loaded.fn).parameters) == list(inspect.signature(made.fn).parameters)


def test_an_entrypoint_can_be_read():
    assert entrypoint_attribute("travel", ["budget", "age"]) == "travel(budget,age)"


def test_a_name_that_is_no_flow_is_no_attribute():
    with pytest.raises(AttributeError):
        _ = deployments.nothing  # type: ignore[attr-defined]


def schema_of(inputs: list[CrewInput], **options: Any) -> dict[str, Any]:
    deployment = deployment_of(crew(), inputs, Plan("travel", {}, **options))
    return deployment._parameter_openapi_schema.model_dump()


TEXT = ["string", "number", "boolean"]
"""What an input that is text takes: a number of JSON becomes its text, as it does without a deployment."""


def kinds(field: dict[str, Any]) -> list[str]:
    return [kind["type"] for kind in field.get("anyOf", [field])]


def test_an_optional_input_may_be_left_out_and_its_default_is_told():
    schema = schema_of(
        [
            CrewInput(name="topic"),
            CrewInput(name="tone", required=False, description="How it sounds.", default="dry"),
            CrewInput(name="length", required=False),
        ]
    )
    assert schema["required"] == ["topic"]
    fields = schema["properties"]
    assert fields["tone"]["description"] == "How it sounds. Left out, the crew takes its own default: dry."
    assert fields["length"]["description"] == "Left out, the crew takes its own default."
    assert (fields["tone"]["default"], fields["length"]["default"]) == (None, None)
    assert "description" not in fields["topic"]


def test_the_form_asks_for_each_input_by_its_name_and_says_what_it_is():
    schema = schema_of(
        [
            CrewInput(name="budget", description="What it may cost."),
            CrewInput(name="first name", required=False),
            CrewInput(name="days", type="integer"),
            CrewInput(name="odd", type="whatever"),
        ]
    )
    assert schema["required"] == ["budget", "days", "odd"]
    fields = schema["properties"]
    assert (fields["budget"]["title"], kinds(fields["budget"])) == ("budget", TEXT)
    assert fields["budget"]["description"] == "What it may cost."
    assert (fields["first_name"]["title"], kinds(fields["first_name"])) == ("first name", [*TEXT, "null"])
    assert (kinds(fields["days"]), kinds(fields["odd"])) == (["integer"], TEXT)
    assert [field["position"] for field in fields.values()] == list(range(5))
    assert fields["idempotency_key"]["title"] == "Idempotency key"


def test_a_secret_input_is_asked_for_by_the_name_of_a_secret_block():
    secret = replace(crew(), secret_inputs=("age",))
    inputs = [*TRAVEL[:3], CrewInput(name="age", type="integer", description="In years.")]
    made = deployment_of(secret, inputs, Plan("travel", {}))
    fields = made._parameter_openapi_schema.properties
    assert fields["age"]["type"] == "string"
    assert fields["age"]["description"] == (
        "The name of the Prefect Secret block that holds it: a value would be stored with the flow run. In years."
    )
    assert "description" not in fields["budget"]
    assert str(made.entrypoint).endswith(".travel(budget,interests,duration,*age)")


def test_a_schedule_needs_a_value_for_each_required_input():
    given = {item.name: "x" for item in TRAVEL}
    made = deployment_of(crew(), TRAVEL, Plan("travel", given, cron="0 6 * * *", timezone="Europe/Lisbon"))
    assert made.schedules
    assert made.parameters == given
    with pytest.raises(ConfigurationError, match="Missing: budget, age"):
        deployment_of(crew(), TRAVEL, Plan("travel", {"interests": "x", "duration": "x"}, interval=60))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        pytest.param(Plan("travel", {"colour": "red"}), "does not know the inputs colour", id="unknown-default"),
        pytest.param(Plan("travel", {}, cron="0 6 * * *", interval=60), "not both", id="two-schedules"),
        pytest.param(Plan("travel", {}, cron="0 6 x * *"), "cannot be made", id="no-cron"),
        pytest.param(Plan("travel", {}, cron="0 6 * * *", timezone="Mars/Base"), "cannot be made", id="no-time-zone"),
        pytest.param(Plan("travel", {}, interval=-5), "cannot be made", id="backwards"),
        pytest.param(Plan("travel", {}, "trip-{{ start }}"), "'{{ start }}' is not known", id="no-template"),
        pytest.param(Plan("travel", {}, "trip", cron="0 6 * * *"), "the same for every time", id="one-key-for-all"),
    ],
)
def test_plans_that_make_no_sense(plan: Plan, said: str):
    with pytest.raises(ConfigurationError, match=said):
        deployment_of(crew(), [CrewInput(name="topic", required=False)], plan)


# On a real Prefect server


@pytest.fixture
def travel() -> Iterator[CrewServer]:
    with CrewServer("travel", speed=20) as server:
        yield server


@pytest.fixture
def stored(prefect_api: PrefectServer, travel: CrewServer) -> DeployedCrew:
    name = f"travel-{uuid.uuid4().hex[:8]}"
    block: Any = travel.crew()
    block.save(name)
    return DeployedCrew.load(name)


async def texts_of(server: PrefectServer) -> str:
    """Return all that the Prefect database holds."""
    await asyncio.to_thread(drain)
    assert server.database is not None
    with closing(sqlite3.connect(server.database)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return "\n".join(str(row) for table in tables for row in database.execute(f'SELECT * FROM "{table}"'))


async def test_a_secret_input_is_loaded_in_the_run_and_stored_nowhere(
    prefect_api: PrefectServer, stored: DeployedCrew, travel: CrewServer
):
    secret, block = f"age-{uuid.uuid4().hex}", f"age-{uuid.uuid4().hex[:8]}"
    await cast("Any", Secret)(value=secret).save(block)
    await cast("Any", stored.model_copy(update={"secret_inputs": ["age"]})).save(stored.label, overwrite=True)
    crew = await DeployedCrew.aload(stored.label)
    deployment: Any = deployment_of(crew.crew, TRAVEL, Plan(crew.label, {"age": block}))
    assert deployment.parameters == {"age": block}
    loaded: Any = load_flow_from_entrypoint(deployment.entrypoint)
    await loaded(**{**GOOD, "age": block})
    assert [run.inputs for run in travel.runs] == [{**GOOD, "age": secret}]
    kept = await texts_of(prefect_api)
    assert block in kept
    assert secret not in kept


async def test_what_is_no_name_of_a_secret_block_is_refused_and_not_shown(stored: DeployedCrew, travel: CrewServer):
    secret = f"age-{uuid.uuid4().hex}"
    loaded: Any = crew_flow(stored.label, TRAVEL, secret_inputs=["age"])
    with pytest.raises(ConfigurationError, match=r"'age' is secret.*Nothing was started") as raised:
        await loaded(**{**GOOD, "age": secret})
    assert secret not in str(raised.value)
    assert not travel.runs


async def test_a_deployment_from_before_an_input_was_secret_is_refused(stored: DeployedCrew, travel: CrewServer):
    loaded: Any = crew_flow(stored.label, TRAVEL)
    await cast("Any", stored.model_copy(update={"secret_inputs": ["age"]})).save(stored.label, overwrite=True)
    with pytest.raises(ConfigurationError, match=r"inputs age are secret.*Deploy it again"):
        await loaded(**GOOD)
    assert not travel.runs


class Run:
    """A flow run that the API was asked for."""

    def __init__(self, server: PrefectServer, deployment_id: Any, parameters: dict[str, Any]) -> None:
        self.api = server.api_url
        for _ in range(20):
            self.answer = httpx.post(
                f"{self.api}/deployments/{deployment_id}/create_flow_run", json={"parameters": parameters}
            )
            if self.answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # a busy SQLite, as Prefect's client knows
                break
            time.sleep(0.5)

    def ended(self, timeout: float = 60) -> dict[str, Any]:
        """Wait for its end and return it."""
        deadline = time.monotonic() + timeout
        run_id = self.answer.json()["id"]
        while True:
            run = httpx.get(f"{self.api}/flow_runs/{run_id}").json()
            if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return run
            assert time.monotonic() < deadline, run["state"]
            time.sleep(0.2)


GOOD = {"budget": "1000 USD", "interests": "food", "duration": "2 days", "age": "35"}


def applied(deployment: RunnerDeployment) -> Any:
    return deployment.apply()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        pytest.param({**GOOD, "age": None}, "age", id="null"),
        pytest.param({**GOOD, "age": [35]}, "35", id="list-for-text"),
        pytest.param({"budget": "1000 USD"}, "required", id="missing"),
    ],
)
def test_bad_parameters_are_refused_when_the_run_is_made(
    prefect_api: PrefectServer, stored: DeployedCrew, parameters: dict[str, Any], said: str
):
    deployment_id = applied(deployment_of(stored.crew, TRAVEL, Plan(stored.label, {})))
    refused = Run(prefect_api, deployment_id, parameters).answer
    assert refused.status_code in (409, 422)
    assert said in refused.text


def test_a_run_on_a_process_worker(
    prefect_api: PrefectServer, stored: DeployedCrew, travel: CrewServer, tmp_path: Path
):
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    httpx.post(f"{prefect_api.api_url}/work_pools/", json={"name": pool, "type": "process"}).raise_for_status()
    plan = Plan(
        stored.label, {}, work_pool=pool, idempotency_key=f"{stored.label}-{{{{ scheduled_start:%Y }}}}", tags=["mine"]
    )
    deployment_id = applied(deployment_of(stored.crew, TRAVEL, plan))
    with Worker(prefect_api, pool, folder=tmp_path):
        # `prefect deployment run … -p age=35` gives a number, as JSON has it.
        run = Run(prefect_api, deployment_id, {**GOOD, "age": 35})
        assert run.answer.status_code == 201, run.answer.text
        ended = run.ended()
    assert ended["state_type"] == "COMPLETED", ended["state"]
    assert sorted(ended["tags"]) == ["mine", "prefect-crew"]
    assert ended["parameters"].items() >= {**GOOD, "age": 35}.items()
    (only,) = travel.runs
    assert only.inputs == GOOD
    assert travel.kickoffs_by_key == {f"{stored.label}-{time.gmtime().tm_year}": 1}
    # Tasks of that flow run, and no flow run within it.
    made = httpx.post(f"{prefect_api.api_url}/flow_runs/filter", json={"flow_runs": {"id": {"any_": [ended["id"]]}}})
    assert made.json()[0]["parent_task_run_id"] is None
