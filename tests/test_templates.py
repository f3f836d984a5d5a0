"""Templates: a sandbox, strict about names, whatever the values hold."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from prefect_crew import ConfigurationError
from prefect_crew.client.models import CrewResult, TaskResult
from prefect_crew.states import CrewState
from prefect_crew.templates import compiled, names_in, uses_in

RESULT = CrewResult(
    kickoff_id="1",
    state=CrewState.COMPLETED,
    output="found",
    data={"title": "Tiles", "list": [1, 2]},
    tasks=[TaskResult(name="t", output="first")],
)
CASES = yaml.safe_load((Path(__file__).parent / "golden" / "templates.yaml").read_text(encoding="utf-8"))
COLLECTIONS = frozenset({"inputs", "steps"})


class Trip(BaseModel):
    city: str


@pytest.mark.parametrize(("template", "text"), CASES["filled"])
def test_a_template_is_filled(template: str, text: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "yes": True, "nothing": None}
    values["day"] = datetime(2026, 1, 2, tzinfo=UTC)
    values["row"] = {"__typename": "Lead", "_id": 7}
    assert compiled(template)(values) == text


UNREAD = TaskResult(name="t", output="first", raw={"prompt": "unread"})
HIDDEN = CrewResult(kickoff_id="1", output="found", tasks=[UNREAD], raw={"body": "unread"})


@pytest.mark.parametrize("template", CASES["whole results"])
def test_a_whole_result_shows_documented_fields(template: str):
    values = {"research": HIDDEN, "steps": {"research": HIDDEN}, "given": [{"a": HIDDEN}]}
    text = compiled(template)(values)
    assert "first" in text
    assert "raw" not in text
    assert "unread" not in text


@pytest.mark.parametrize(("template", "problem"), CASES["bad"])
def test_a_bad_template_is_known_before_its_values(template: str, problem: str):
    for look in (lambda: names_in(template), lambda: compiled(template)):
        with pytest.raises(ConfigurationError, match=problem):
            look()


CALLED: list[Any] = []


def called(word: str) -> None:
    CALLED.append(word)


class Called:
    def __call__(self, word: str) -> None:
        CALLED.append(word)


@pytest.mark.parametrize("template", CASES["forbidden or missing"])
def test_a_forbidden_or_missing_name_is_an_error(template: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "path": Path(__file__), "call": called}
    values["nothing"] = None
    with pytest.raises(ConfigurationError, match="cannot be filled"):
        compiled(template)({**values, "called": Called(), "module": __name__})
    assert CALLED == []
    assert RESULT.data == {"title": "Tiles", "list": [1, 2]}


@given(st.text())
def test_values_are_never_templates(text: str):
    assert compiled("{{ topic }}")({"topic": text}) == text


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ a.output }} {{ a.data.title }} {{ b }}", {"a": {"output", "data"}, "b": set[str]()}),
        ("{{ steps['a b'].tasks[0].output }}", {"a b": {"tasks"}}),
        ("{{ steps.a.output }} {{ inputs.t }}", {"a": {"output"}, "t": set[str]()}),
        ("{{ inputs[name] }}", {"name": set[str](), "inputs": set[str]()}),
        ("{{ steps | length }} {{ inputs.items() }}", {"steps": set[str](), "inputs": set[str]()}),
        ("{% for name, step in steps.items() %}{{ name }}{% endfor %}", {"steps": set[str]()}),
        ("{% set a = 1 %}{{ a }} plain", dict[str, set[str]]()),
    ],
)
def test_names_and_their_uses_are_found(template: str, found: dict[str, set[str]]):
    assert uses_in(template, collections=COLLECTIONS) == found
    assert names_in(template, collections=COLLECTIONS) == set(found) - COLLECTIONS
