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
from prefect_crew.templates import compiled, names_in, render, uses_in

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
        pytest.param("{{ topic }}", "tea", id="an-input"),
        pytest.param("{{ research.output }}", "found", id="output"),
        pytest.param("{{ research.data.title }}", "Tiles", id="part-of-data"),
        pytest.param("{{ research.data.list[1] }}", "2", id="item-of-data"),
        pytest.param("{{ research.data }}", '{"title":"Tiles","list":[1,2]}', id="data-as-json"),
        pytest.param("{{ research.tasks[0].output }}", "first", id="a-task"),
        pytest.param("{{ row.__typename }} {{ row._id }}", "Lead 7", id="a-part-with-a-line-before-it"),
        pytest.param("{{ trip }} {{ yes }} {{ nothing }}", '{"city":"Porto"} true null', id="values-as-json"),
        pytest.param("{% for i in range(3) %}{{ i }}{% endfor %}", "012", id="what-jinja-brings"),
        pytest.param("{{ topic | upper }}\n", "TEA\n", id="filters-and-the-last-line-break"),
        pytest.param("{{ '{{ topic }}' }}", "{{ topic }}", id="once-only"),
        pytest.param("no braces", "no braces", id="plain"),
        pytest.param("{{ topic.upper() }} {{ '%s' % topic }} {{ topic[:1] }}", "TEA tea t", id="methods-of-texts"),
        pytest.param("{{ research.data.get('x', 7) }} {{ research.data.list.index(2) }}", "7 1", id="of-collections"),
        pytest.param(
            "{% for k, v in row.items() %}{{ k }}{{ loop.cycle(1, 2) }}{% endfor %}", "__typename1_id2", id="loop"
        ),
        pytest.param("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(topic) }}", "<tea>", id="a-macro"),
        pytest.param("{{ day.strftime('%Y') }} {{ day.year }}", "2026 2026", id="a-date"),
        pytest.param("{% set n = namespace(x=1) %}{{ n.x }} {{ dict(a=1).a }}", "1 1", id="jinjas-own"),
        pytest.param(
            "{{ research.kickoff_id }} {{ research.usage }} {{ research.state }}", "1 null completed", id="rest"
        ),
    ],
)
def test_a_template_is_filled(template: str, text: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "yes": True, "nothing": None}
    values["day"] = datetime(2026, 1, 2, tzinfo=UTC)
    values["row"] = {"__typename": "Lead", "_id": 7}
    assert render(template, values) == text


HIDDEN = CrewResult(
    kickoff_id="1",
    output="found",
    tasks=[TaskResult(name="t", output="first", raw={"prompt": "unread"})],
    raw={"body": "unread"},
)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ research }}", id="printed"),
        pytest.param("{{ research.tasks }} {{ research.tasks[0] }}", id="its-tasks"),
        pytest.param("{{ steps }} {{ {'a': [research]} }}", id="within-a-collection"),
        pytest.param("{{ given }} {{ given[0]['a'] }}", id="given-as-an-input"),
        pytest.param("{% for part in research.items() %}{{ part }}{% endfor %}", id="iterated"),
        pytest.param(
            "{{ research | list }} {{ dict(research) }} {{ research.tasks | map('list') | list }}", id="listed"
        ),
        pytest.param("{{ research | string }} {{ research | pprint }} {{ '%s' % research }}", id="as-python-writes-it"),
    ],
)
def test_a_whole_result_shows_no_more_than_its_documented_fields(template: str):
    values = {"research": HIDDEN, "steps": {"research": HIDDEN}, "given": [{"a": HIDDEN}]}
    text = render(template, values)
    assert "first" in text
    assert "raw" not in text
    assert "unread" not in text


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        pytest.param("{{ topic | nofilter }}", "there is no filter 'nofilter'", id="filter"),
        pytest.param("{% if 0 %}{{ topic | nofilter }}{% endif %}", "there is no filter 'nofilter'", id="not-reached"),
        pytest.param("{% if topic is notest %}{% endif %}", "there is no test 'notest'", id="test"),
        pytest.param("{{ ''.__class__ }}", "'__class__' is not allowed in a template", id="sandbox"),
        pytest.param("{% include 'x' %}", "asks for another template", id="include"),
        pytest.param("{% extends 'x' %}", "asks for another template", id="extends"),
        pytest.param("{% import 'x' as x %}", "asks for another template", id="import"),
        pytest.param("{% from 'x' import y %}", "asks for another template", id="from"),
        pytest.param("{{ topic", "is not a template", id="syntax"),
    ],
)
def test_what_can_never_be_filled_is_known_before_there_are_values(template: str, problem: str):
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
        pytest.param("{{ research.__class__ }}", id="class"),
        pytest.param("{{ research.__class__.__mro__[1].__subclasses__() }}", id="subclasses"),
        pytest.param("{{ topic.__len__() }}", id="method"),
        pytest.param("{{ research['__class__'] }}", id="by-item"),
        pytest.param("{{ research | attr('__class__') }}", id="by-filter"),
        pytest.param("{{ '{0.__class__}'.format(research) }}", id="by-format"),
        pytest.param("{{ research.data.update({'title': 1}) }}", id="a-change"),
        pytest.param("{{ research.tasks.append(1) }}", id="another-change"),
        pytest.param("{% for i in range(10 ** 9) %}{% endfor %}", id="a-long-range"),
        pytest.param("{{ topic + 1 }}", id="an-error-of-python"),
        pytest.param("{{ research.parse_raw('{}') }}", id="a-classmethod"),
        pytest.param(
            "{{ research.parse_raw('c' ~ module ~ '\\ncalled\\n(Vx\ntR.', proto='pickle', allow_pickle=True) }}",
            id="a-pickle",
        ),
        pytest.param("{{ research.parse_file(path) }}", id="a-file"),
        pytest.param("{{ research['parse_file'](path) }}", id="a-file-by-item"),
        pytest.param("{{ (research | attr('parse_file'))(path) }}", id="a-file-by-filter"),
        pytest.param("{{ research.tasks[0].model_validate_json('{}') }}", id="of-a-task"),
        pytest.param("{{ [research] | map(attribute='parse_file') | first }}", id="by-map"),
        pytest.param("{{ trip.model_construct() }}", id="of-another-model"),
        pytest.param("{{ research.model_dump() }}", id="a-method-of-the-model"),
        pytest.param("{{ research.raw }}", id="what-is-not-for-templates"),
        pytest.param("{{ path.read_text() }}", id="a-path"),
        pytest.param("{{ call('x') }}", id="a-function"),
        pytest.param("{{ called('x') }}", id="an-object-that-is-called"),
        pytest.param("{{ ''.maketrans('a', 'b') }}", id="a-method-of-a-type"),
        pytest.param("{{ topik }}", id="an-unknown-name"),
        pytest.param("{{ research.outptu }}", id="an-unknown-attribute"),
        pytest.param("{{ research.data.nothing.at.all }}", id="an-unknown-part"),
        pytest.param("{{ research.tasks[7].output }}", id="an-unknown-task"),
    ],
)
def test_what_is_not_there_or_not_allowed_is_an_error(template: str):
    values = {"topic": "tea", "research": RESULT, "trip": Trip(city="Porto"), "path": Path(__file__), "call": called}
    with pytest.raises(ConfigurationError, match="cannot be filled"):
        render(template, {**values, "called": Called(), "module": __name__})
    assert CALLED == []
    assert RESULT.data == {"title": "Tiles", "list": [1, 2]}


@given(st.text())
def test_values_are_never_templates(text: str):
    assert render("{{ topic }}", {"topic": text}) == text


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ a }} {{ b.output }}", {"a", "b"}),
        ("{{ steps['a b'].output }}", {"a b"}),
        ("{{ steps.a.output }} {{ inputs.topic }}", {"a", "topic"}),
        ("{% for name, step in steps.items() %}{{ name }}{% endfor %}", set[str]()),
        ("{% set a = 1 %}{{ a }}", set[str]()),
        ("plain", set[str]()),
    ],
)
def test_names_are_found(template: str, names: set[str]):
    assert names_in(template, collections=COLLECTIONS) == names


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ a.output }} {{ a.data.title }}", {"a": {"output", "data"}}),
        ("{{ steps['a'].tasks[0].output }}", {"a": {"tasks"}}),
        ("{{ steps.a.output }} {{ inputs.t }}", {"a": {"output"}, "t": set[str]()}),
        ("{{ inputs[name] }}", {"name": set[str](), "inputs": set[str]()}),
        ("{{ steps | length }} {{ inputs.items() }}", {"steps": set[str](), "inputs": set[str]()}),
    ],
)
def test_what_is_read_of_a_name_is_found(template: str, found: dict[str, set[str]]):
    assert uses_in(template, collections=COLLECTIONS) == found
