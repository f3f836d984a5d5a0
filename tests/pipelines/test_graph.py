"""The graph of a pipeline: what needs what, what is wrong, what each step's inputs become. Without Prefect's server."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew import ConfigurationError, CrewStep
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.client.models import CrewInput, CrewResult
from prefect_crew.pipelines.graph import Pipeline
from prefect_crew.states import CrewState

CREW = crew_of(DeployedCrew(url="https://crew.example", token=SecretStr("token")))


def graph(*steps: CrewStep, **inputs: Any) -> Pipeline:
    return Pipeline(steps, inputs)


@pytest.mark.parametrize(
    ("step", "needs"),
    [
        pytest.param(CrewStep("c", "crew", {"x": "{{ a.output }} {{ steps['b b'].output }}"}), {"a", "b b"}, id="text"),
        pytest.param(CrewStep("c", "crew", {"x": ["{{ a.output }}", {"y": "{{ t }}"}]}), {"a"}, id="nested"),
        pytest.param(CrewStep("c", "crew", {}, after="b b"), {"b b"}, id="after-a-single-name"),
        pytest.param(CrewStep("c", "crew", {"x": lambda _: 1}, after=["a", "b b"]), {"a", "b b"}, id="function"),
        pytest.param(CrewStep("c", "crew"), set[str](), id="nothing"),
    ],
)
def test_needs(step: CrewStep, needs: set[str]):
    made = graph(CrewStep("a", "crew", {}), CrewStep("b b", "crew", {}), step, t="tea")
    assert made.problems == []
    assert made.needs["c"] == needs


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param([], ["has no steps"], id="no-steps"),
        pytest.param([CrewStep("a", "c"), CrewStep("a", "c")], ["two steps are named 'a'"], id="twice"),
        pytest.param([CrewStep("t", "c")], ["'t' has the name of an input"], id="an-inputs-name"),
        pytest.param([CrewStep("steps", "c")], ["'steps' has the name of an input, or a reserved one"], id="reserved"),
        pytest.param([CrewStep("a/b", "c")], ["without slashes"], id="a-slash"),
        pytest.param([CrewStep("a{b}", "c")], ["and braces"], id="a-brace"),
        pytest.param([CrewStep(" ", "c")], ["cannot be named ' '"], id="blank"),
        pytest.param([CrewStep("a", "c", after=["b"])], ["comes after 'b', which is not a step"], id="after-nothing"),
        pytest.param([CrewStep("a", "c", {"x": "{{ u }}"})], ["input 'x': 'u' is no step"], id="an-unknown-name"),
        pytest.param([CrewStep("a", "c", {"x": ["{{ u }}"]})], ["input 'x': 'u' is no step"], id="within-a-list"),
        pytest.param([CrewStep("a", "c", {"x": "{{ steps.u.output }}"})], ["'u' is no step"], id="an-unknown-step"),
        pytest.param([CrewStep("a", "c", {"x": "{{ t"})], ["input 'x'", "is not a template"], id="no-template"),
        pytest.param([CrewStep("a", "c", {"x": "{{ a.output }}"})], ["in a circle: a -> a"], id="itself"),
        pytest.param(
            [CrewStep("a", "c", {"x": "{{ b.output }}"}), CrewStep("b", "c", after=["a"]), CrewStep("d", "c")],
            ["the steps depend on each other in a circle"],
            id="a-circle",
        ),
        pytest.param(
            [CrewStep("a", "c", {}), CrewStep("b", "c", {"x": "{{ a.outptu }}"})],
            ["a step has no 'outptu'"],
            id="an-unknown-attribute",
        ),
        pytest.param(
            [CrewStep("a", "c", after=["b"]), CrewStep("b", "c", {"x": "{{ u }}"}, after=["a"]), CrewStep("b", "c")],
            ["two steps are named 'b'", "'u' is no step"],
            id="several-at-once",
        ),
    ],
)
def test_problems(steps: list[CrewStep], expected: list[str]):
    problems = "; ".join(graph(*steps, t="tea").problems)
    assert [part for part in expected if part not in problems] == []


def test_unknown_and_missing_inputs_of_each_step():
    made = graph(
        CrewStep("a", "c", {"x": 1, "y": 1, "way": 2}),
        CrewStep("b", "c", {"x": 1, "size": 2, "crewai_trigger_payload": "{}"}),
        CrewStep("d", "c"),
        CrewStep("e", "c", {"anything": 1}),
        CrewStep("f", "c", {"x": 1, "y": 1, "size": 2}),
        CrewStep("g", "c", {"x": 1, "y": lambda _: 2}),
        z=1,
    )
    expected = (CrewInput(name="x"), CrewInput(name="y"), CrewInput(name="ways", required=False))
    made.crews = dict.fromkeys("abdfg", replace(CREW, expected_inputs=expected)) | {"e": CREW}
    made.crews["f"] = replace(made.crews["a"], allow_extra_inputs=True)
    made.check_inputs()
    assert sorted(made.problems) == [
        "step 'a' gives the unknown inputs way (did you mean ways?); its crew takes x, y, ways",
        "step 'b' gives the unknown inputs size; its crew takes x, y, ways",
        "step 'b' lacks the inputs y of its crew",
        "step 'd' lacks the inputs x, y of its crew",
    ]


def filled(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the inputs of a step after "a", in a pipeline with the input t="tea" and the results "A" and "B"."""
    step = CrewStep("c", "crew", inputs, after=["a"])
    pipeline = graph(CrewStep("a", "crew", {}), CrewStep("b", "crew", {}), step, t="tea")
    assert pipeline.problems == []
    results = {name: CrewResult(kickoff_id=name, state=CrewState.COMPLETED, output=name.upper()) for name in "ab"}
    return pipeline.inputs_of(step, results)


def test_templates_and_functions_see_inputs_and_earlier_steps():
    template = "{{ t }} {{ inputs.t }} {{ a.output }}"
    assert filled({"x": template, "n": 7, "l": ["{{ a.output }}", 1]}) == {"x": "tea tea A", "n": 7, "l": ["A", 1]}
    assert filled({"x": lambda context: context["a"].output.lower() + context.inputs["t"]}) == {"x": "atea"}
    assert filled({"x": lambda context: list(context.results)}) == {"x": ["a"]}


def shorten(context: Any) -> Any:
    return context["a"].output[99]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (shorten, r"shorten\(\) gave no input: IndexError: .*\. Nothing was started"),
        (lambda context: context["b"], r"Step 'b' is not known here\. Name the step in `after`"),
        ("{% set n = 'b' %}{{ steps[n].output }}", "cannot be filled: 'dict object' has no attribute 'b'"),
    ],
    ids=["function that raises", "function of a later step", "template of a later step"],
)
def test_input_that_cannot_be_filled_is_named(source: Any, problem: str):
    with pytest.raises(ConfigurationError, match=problem):
        filled({"x": source})


def test_inputs_default_to_those_the_crew_knows():
    made = graph(CrewStep("a", "crew"), topic="tea", other=1)
    assert made.inputs_of(made.steps[0], {}) == {"topic": "tea", "other": 1}
    made.crews = {"a": replace(CREW, expected_inputs=(CrewInput(name="topic"),))}
    assert made.inputs_of(made.steps[0], {}) == {"topic": "tea"}


def test_steps_come_after_those_that_they_need():
    pipeline = graph(
        CrewStep("e", "crew", {}),
        CrewStep("d", "crew", {"x": "{{ c.output }}"}, after=["b"]),
        CrewStep("c", "crew", {"x": "{{ a.output }}"}),
        CrewStep("b", "crew", {}, after="a"),
        CrewStep("a", "crew", {}),
    )
    assert pipeline.problems == []
    assert sorted(pipeline.order) == ["a", "b", "c", "d", "e"]
    assert pipeline.before == {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a", "b", "c"}, "e": set()}
    for number, name in enumerate(pipeline.order):
        assert pipeline.before[name] <= set(pipeline.order[:number])
