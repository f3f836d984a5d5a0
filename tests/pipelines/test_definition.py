"""A pipeline as plain values: what a file may hold, what is said of one that cannot run, which inputs it asks for."""

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any, cast

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async

from prefect_crew import ConfigurationError, CrewStep, PipelineFailedError, WaitPolicy, run_deployed_pipeline
from prefect_crew.devserver import CrewServer
from prefect_crew.pipelines.definition import PipelineDefinition, PipelineInput, read_pipeline
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer, stored_texts
from support.scripts import script
from support.seen import Seen

REPORT = """
name: report
inputs:
  topic: {description: What it is about.}
  audience: {default: everyone}
steps:
  - name: research
    crew: research
    inputs: {topic: "{{ topic }}"}
  - name: write
    crew: write
    inputs: {topic: "{{ topic }}", audience: "{{ audience }}", notes: "{{ research.output }}"}
    after: research
    wait: {timeout: 600}
    review: form
"""


def test_a_file_is_a_pipeline():
    pipeline = read_pipeline(REPORT, "weekly.yaml")
    assert pipeline.name == "report"
    assert list(pipeline.inputs) == ["topic", "audience"]
    inputs = {"topic": "{{ topic }}", "audience": "{{ audience }}", "notes": "{{ research.output }}"}
    assert pipeline.crew_steps() == [
        CrewStep("research", "research", {"topic": "{{ topic }}"}),
        CrewStep("write", "write", inputs, after="research", wait=WaitPolicy(timeout=600), review="form"),
    ]


def test_names_and_inputs_have_defaults():
    pipeline = read_pipeline("inputs: {topic: , tone: }\nsteps: [{name: a, crew: b}]", "flows/weekly.report.yaml")
    assert pipeline.name == "weekly.report"
    assert pipeline.inputs == {"topic": PipelineInput(), "tone": PipelineInput()}
    assert read_pipeline(json.dumps({"steps": [{"name": "a", "crew": "b"}]}), "daily.json").name == "daily"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("steps: [", "x.yaml is neither YAML nor JSON: ", id="no-yaml"),
        pytest.param("- a", "x.yaml holds no pipeline: expected a mapping with `steps`", id="no-mapping"),
        pytest.param("name: x", "x.yaml is not a pipeline that can run: steps: it is missing.", id="no-steps"),
        pytest.param("steps: []", "steps: ", id="empty"),
        pytest.param("steps: [{name: a}]", "steps.0.crew: it is missing", id="no-crew"),
        pytest.param("steps: [{crew: a}]", "steps.0.name: it is missing", id="no-name"),
        pytest.param("steps: [{name: a, crew: b, inptus: {}}]", "steps.0.inptus: there is no such field", id="field"),
        pytest.param("step: []\nsteps: [{name: a, crew: b}]", "step: there is no such field", id="on-top"),
        pytest.param("steps: [{name: a, crew: b, wait: {timeout: -1}}]", "steps.0.wait.timeout: ", id="wait"),
        pytest.param("steps: [{name: a, crew: b, review: person}]", "steps.0.review: ", id="review"),
        pytest.param("steps: [{name: a, crew: 7}]", "steps.0.crew: ", id="a-number-as-crew"),
        pytest.param("steps: [a]", "steps.0: ", id="no-step"),
        pytest.param("inputs: {a: {type: text}}\nsteps: [{name: a, crew: b}]", "inputs.a.type: ", id="type"),
        pytest.param("steps: [{name: a, crew: b, inputs: {on: 2026-01-01}}]", "Quote the value", id="date"),
    ],
)
def test_a_mistake_is_reported_by_step_and_field(text: str, said: str):
    with pytest.raises(ConfigurationError) as caught:
        read_pipeline(text, "x.yaml")
    assert said in str(caught.value)


def pipeline_of(*steps: dict[str, Any], **more: Any) -> PipelineDefinition:
    return PipelineDefinition.model_validate({"name": "p", "steps": steps, **more})


def test_the_values_of_a_run():
    inputs = {"topic": None, "tone": {"default": "dry"}, "length": {"required": False}}
    pipeline = pipeline_of({"name": "a", "crew": "a"}, inputs=inputs)
    assert pipeline.values({"topic": "tea"}) == {"topic": "tea", "tone": "dry"}
    assert pipeline.values({"topic": "tea", "tone": None, "length": 3}) == {"topic": "tea", "tone": "dry", "length": 3}
    with pytest.raises(ConfigurationError, match=r"Pipeline 'p' lacks the inputs topic\. Nothing was started\."):
        pipeline.values({"tone": "warm"})
    with pytest.raises(ConfigurationError, match=r"does not take the inputs topik \(did you mean topic\?\); it takes"):
        pipeline.values({"topik": "tea"})


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("{{ key }}", False),
        (" {{ inputs['my key'] }} ", False),
        ("{{ (key) }}", False),
        (None, False),
        ("hunter2", True),
        ("Bearer {{ key }}", True),
        ("{{ 'hunter2' }}", True),
        ({"login": ["hunter2"]}, True),
        (12345678, True),
    ],
)
def test_a_definition_holds_no_secret_value(value: Any, stored: bool):
    pipeline = pipeline_of({"name": "a", "crew": "a", "inputs": {"api key": value}})
    problems = pipeline.stored_secrets({"a": ["api key"]})
    assert bool(problems) is stored
    assert "hunter2" not in str(problems)
    if stored:
        assert "step 'a', input 'api key'" in problems[0]
        assert "write '{{ api_key }}'" in problems[0]


ECHO = script({"output": "on {{ text }}"}, inputs=["text"])
LOGIN = script({"name": "log in", "output": "logged in with {{ password }}"}, inputs=["password"])
SaveCrew = Callable[..., tuple[str, CrewServer]]


@pytest.fixture
def save(prefect_api: PrefectServer, instant_polling: None, crew_server: CrewServerFactory) -> SaveCrew:
    def saved(spec: Any = ECHO, **fields: Any) -> tuple[str, CrewServer]:
        server, name = crew_server(spec), f"crew-{uuid.uuid4().hex[:8]}"
        block: Any = server.crew(**fields)
        block.save(name, _sync=True)
        return name, server

    return saved


async def run_as_a_worker(**parameters: Any) -> Any:
    """Run a flow run in this process, as a worker of a pool of the type `crew` does."""
    flow = cast("Any", run_deployed_pipeline)
    async with get_client() as client:
        flow_run = await client.create_flow_run(flow, parameters=parameters)
        flow_run = await client.read_flow_run(flow_run.id)  # with its parameters as they are stored
    state = await run_flow_async(flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    return flow_run.id, state


async def test_a_pipeline_runs_from_plain_values(save: SaveCrew, seen: Seen):
    crew, server = save()
    steps = [
        {"name": "research", "crew": crew, "inputs": {"text": "{{ topic }}"}},
        {"name": "write", "crew": crew, "inputs": {"text": "{{ research.output }} for {{ audience }}"}},
    ]
    inputs = {"topic": None, "audience": {"default": "everyone"}}
    pipeline = {"name": f"report-{uuid.uuid4().hex[:8]}", "inputs": inputs, "steps": steps}
    run_id, state = await run_as_a_worker(pipeline=pipeline, inputs={"topic": "tea"})
    assert (await state.result())["write"].output == "on on tea for everyone"
    assert server.kickoffs == 2
    assert seen.flow_run(run_id)["name"] == f"{pipeline['name']} · tea"


async def test_a_step_may_have_a_wait_of_its_own(save: SaveCrew):
    slow, server = save(script({"seconds": 60, "output": "late"}, inputs=["text"]))
    step = {"name": "slow", "crew": slow, "inputs": {"text": "y"}, "wait": {"timeout": 0.3}}
    with pytest.raises(PipelineFailedError, match=r"0\.3"):
        await run_deployed_pipeline({"name": "p", "steps": [step]})
    assert server.kickoffs == 1


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "secret-to-the-crew"])
async def test_a_secret_comes_from_a_block_unstored(prefect_api: PrefectServer, save: SaveCrew, declared: bool):
    secret, block = f"hunter-{uuid.uuid4().hex}", f"login-{uuid.uuid4().hex[:8]}"
    await cast("Any", Secret)(value=secret).save(block)
    login, server = save(LOGIN, secret_inputs=[] if declared else ["password"])
    echo, second = save()
    pipeline = {
        "name": "p",
        "inputs": {"login": {"secret": declared}},
        "steps": [
            {"name": "a", "crew": login, "inputs": {"password": "{{ login }}"}},
            {"name": "b", "crew": echo, "inputs": {"text": "{{ a.output }}"}},
        ],
    }
    _, state = await run_as_a_worker(pipeline=pipeline, inputs={"login": block})
    assert state.is_completed(), state
    assert [run.inputs for run in server.runs] == [{"password": secret}]
    assert [run.inputs for run in second.runs] == [{"text": f"logged in with {secret}"}]
    kept = await asyncio.to_thread(stored_texts, prefect_api)
    assert block in kept
    assert secret not in kept


async def test_a_secret_without_a_block_is_refused(save: SaveCrew):
    login, server = save(LOGIN, secret_inputs=["password"])
    secret = f"hunter-{uuid.uuid4().hex}"
    steps = [{"name": "a", "crew": login, "inputs": {"password": "{{ login }}"}}]
    with pytest.raises(ConfigurationError, match=r"'login' is secret.*Nothing was started") as caught:
        await run_deployed_pipeline({"name": "p", "inputs": {"login": None}, "steps": steps}, {"login": secret})
    assert secret not in str(caught.value)
    stored = "step 'a', input 'password': a deployment would store this secret in plain text"
    with pytest.raises(ConfigurationError, match=stored):
        await run_deployed_pipeline({"name": "p", "steps": [{**steps[0], "inputs": {"password": "abc"}}]})
    with pytest.raises(ConfigurationError, match="lacks the inputs login"):
        await run_deployed_pipeline({"name": "p", "inputs": {"login": None}, "steps": steps})
    assert server.kickoffs == 0
