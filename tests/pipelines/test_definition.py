"""A pipeline as plain values: what a file may hold, what is said of one that cannot run, which inputs it asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefect_crew.exceptions import ConfigurationError
from prefect_crew.pipelines.definition import PipelineDefinition, PipelineInput, read_pipeline

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
    assert (pipeline.name, list(pipeline.inputs)) == ("report", ["topic", "audience"])
    research, write = pipeline.crew_steps()
    assert (research.name, research.crew, research.inputs) == ("research", "research", {"topic": "{{ topic }}"})
    assert (write.after, write.review) == ("research", "form")
    assert write.wait is not None
    assert write.wait.timeout == 600


def test_a_file_without_a_name_has_its_own():
    text = "steps: [{name: a, crew: b}]"
    assert read_pipeline(text, "flows/weekly.report.yaml").name == "weekly.report"
    assert read_pipeline(json.dumps({"steps": [{"name": "a", "crew": "b"}]}), "daily.json").name == "daily"


def test_inputs_of_which_nothing_is_said():
    pipeline = read_pipeline("inputs: {topic: , tone: }\nsteps: [{name: a, crew: b}]", "x.yaml")
    assert pipeline.inputs == {"topic": PipelineInput(), "tone": PipelineInput()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("steps: [", "x.yaml is neither YAML nor JSON: ", id="no-yaml"),
        pytest.param("- a", "x.yaml holds no pipeline: expected a mapping with `steps`", id="no-mapping"),
        pytest.param("name: x", "x.yaml is not a pipeline that can run: steps: it is missing.", id="no-steps"),
        pytest.param("steps: []", "steps: ", id="empty"),
        pytest.param("steps: [{name: a}]", "step 'a'.crew: it is missing", id="no-crew"),
        pytest.param("steps: [{crew: a}]", "step 1.name: it is missing", id="no-name"),
        pytest.param(
            "steps: [{name: a, crew: b, inptus: {}}]",
            "step 'a'.inptus: there is no such field",
            id="unknown-field",
        ),
        pytest.param("step: []\nsteps: [{name: a, crew: b}]", "step: there is no such field", id="on-top"),
        pytest.param("steps: [{name: a, crew: b, wait: {timeout: -1}}]", "step 'a'.wait.timeout: ", id="wait"),
        pytest.param("steps: [{name: a, crew: b, review: person}]", "step 'a'.review: ", id="review"),
        pytest.param("steps: [{name: a, crew: 7}]", "step 'a'.crew: ", id="a-number-as-crew"),
        pytest.param("steps: [a]", "step 1: ", id="no-step"),
        pytest.param("inputs: {a: {type: text}}\nsteps: [{name: a, crew: b}]", "inputs.a.type: ", id="type"),
        pytest.param("steps: [{name: a, crew: b, inputs: {on: 2026-01-01}}]", "Put such a value in quotes", id="date"),
    ],
)
def test_a_mistake_is_reported_by_step_and_field(text: str, said: str):
    with pytest.raises(ConfigurationError) as caught:
        read_pipeline(text, "x.yaml")
    assert said in str(caught.value)


def pipeline_of(*steps: dict[str, Any], **more: Any) -> PipelineDefinition:
    return PipelineDefinition.model_validate({"name": "p", "steps": steps, **more})


def test_the_values_of_a_run():
    pipeline = pipeline_of(
        {"name": "a", "crew": "a"},
        inputs={"topic": None, "tone": {"default": "dry"}, "length": {"required": False}},
    )
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
        ({"login": "{{ (key) }}"}, False),
        (None, False),
        ("hunter2", True),
        ("Bearer {{ key }}", True),
        ("{{ 'hunter2' }}", True),
        ({"login": ["hunter2"]}, True),
        (12345678, True),
    ],
)
def test_the_value_of_a_secret_input_has_no_place_in_a_definition(value: Any, stored: bool):
    pipeline = pipeline_of({"name": "a", "crew": "a", "inputs": {"api key": value}})
    problems = pipeline.stored_secrets({"a": ["api key"]})
    assert bool(problems) is stored
    assert "hunter2" not in str(problems)
    if stored:
        assert "step 'a', input 'api key'" in problems[0]
        assert "write '{{ api_key }}'" in problems[0]
