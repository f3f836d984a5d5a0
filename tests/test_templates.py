"""Templates: a sandbox, strict about names, whatever the values hold."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
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
COLLECTIONS = frozenset({"inputs", "steps"})


class Trip(BaseModel):
    city: str


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ topic }}", "tea"),
        ("{{ research.output }} {{ research.data.title }} {{ research.data.list[1] }}", "found Tiles 2"),
        ("{{ research.data }}", '{"title":"Tiles","list":[1,2]}'),
        ("{{ research.tasks[0].output }}", "first"),
        ("{{ row.__typename }} {{ row._id }}", "Lead 7"),
        ("{{ trip }} {{ yes }} {{ nothing }}", '{"city":"Porto"} true null'),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("{{ topic | upper }}\n", "TEA\n"),
        ("{{ '{{ topic }}' }}", "{{ topic }}"),
        ("no braces", "no braces"),
        ("{{ topic.upper() }} {{ '%s' % topic }} {{ topic[:1] }}", "TEA tea t"),
        ("{{ research.data.get('x', 7) }} {{ research.data.list.index(2) }}", "7 1"),
        ("{% for k, v in row.items() %}{{ k }}{{ loop.cycle(1, 2) }}{% endfor %}", "__typename1_id2"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(topic) }}", "<tea>"),
        ("{{ day.strftime('%Y') }} {{ day.year }}", "2026 2026"),
        ("{% set n = namespace(x=1) %}{{ n.x }} {{ dict(a=1).a }}", "1 1"),
        ("{{ research.kickoff_id }} {{ research.usage }} {{ research.state }}", "1 null completed"),
    ],
)
def test_a_template_is_filled(template: str, text: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "yes": True, "nothing": None}
    values["day"] = datetime(2026, 1, 2, tzinfo=UTC)
    values["row"] = {"__typename": "Lead", "_id": 7}
    assert compiled(template)(values) == text


HIDDEN = CrewResult(
    kickoff_id="1",
    output="found",
    tasks=[TaskResult(name="t", output="first", raw={"prompt": "unread"})],
    raw={"body": "unread"},
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ research }}",
        "{{ research.tasks }} {{ research.tasks[0] }}",
        "{{ steps }} {{ {'a': [research]} }}",
        "{{ given }} {{ given[0]['a'] }}",
        "{% for part in research.items() %}{{ part }}{% endfor %}",
        "{{ research | list }} {{ dict(research) }} {{ research.tasks | map('list') | list }}",
        "{{ research | string }} {{ research | pprint }} {{ '%s' % research }}",
    ],
)
def test_a_whole_result_shows_documented_fields(template: str):
    values = {"research": HIDDEN, "steps": {"research": HIDDEN}, "given": [{"a": HIDDEN}]}
    text = compiled(template)(values)
    assert "first" in text
    assert "raw" not in text
    assert "unread" not in text


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% if 0 %}{{ topic | nofilter }}{% endif %}", "there is no filter 'nofilter'"),
        ("{% if topic is notest %}{% endif %}", "there is no test 'notest'"),
        ("{{ ''.__class__ }}", "'__class__' is not allowed in a template"),
        ("{% include 'x' %}", "includes another template"),
        ("{% extends 'x' %}", "includes another template"),
        ("{% import 'x' as x %}", "includes another template"),
        ("{% from 'x' import y %}", "includes another template"),
        ("{{ topic", "is not a template"),
    ],
)
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


@pytest.mark.parametrize(
    "template",
    [
        "{{ research.data.items }}",
        "{{ topic.title }}",
        "{{ research.__class__ }}",
        "{{ research.__class__.__mro__[1].__subclasses__() }}",
        "{{ topic.__len__() }}",
        "{{ research['__class__'] }}",
        "{{ research | attr('__class__') }}",
        "{{ '{0.__class__}'.format(research) }}",
        "{{ research.data.update({'title': 1}) }}",
        "{{ research.tasks.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ topic + 1 }}",
        "{{ research.parse_raw('c' ~ module ~ '\\ncalled\\n(Vx\\ntR.', proto='pickle', allow_pickle=True) }}",
        "{{ research.parse_file(path) }}",
        "{{ research['parse_file'](path) }}",
        "{{ (research | attr('parse_file'))(path) }}",
        "{{ research.tasks[0].model_validate_json('{}') }}",
        "{{ [research] | map(attribute='parse_file') | first }}",
        "{{ trip.model_construct() }}",
        "{{ research.model_dump() }}",
        "{{ research.raw }}",
        "{{ path.read_text() }}",
        "{{ call('x') }}",
        "{{ called('x') }}",
        "{{ ''.maketrans('a', 'b') }}",
        "{{ topik }}",
        "{{ research.outptu }}",
        "{{ research.data.nothing.at.all }}",
        "{{ research.tasks[7].output }}",
    ],
)
def test_a_forbidden_or_missing_name_is_an_error(template: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "path": Path(__file__), "call": called}
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
