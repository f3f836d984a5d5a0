"""Rows as runs: their inputs, their keys, and all that is wrong with them, before anything is started."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew.batches.rows import BadRow, RowPlan
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import BadRowsError, ConfigurationError, DatasetError
from support.batches import CREW, row_plan

ANY_INPUT = replace(CREW, allow_extra_inputs=True)
TOPIC = [CrewInput(name="topic"), CrewInput(name="tone", required=False)]


def plan(data: Any, **options: Any) -> RowPlan:
    options.setdefault("expected", TOPIC)
    return row_plan(data, **options)


def inputs(rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    return [dict(job.inputs.encoded) for job in plan(rows, **options).jobs()]


def keys(rows: list[dict[str, Any]], **options: Any) -> list[str]:
    return [job.key for job in plan(rows, **options).jobs()]


def reasons(rows: list[dict[str, Any]], **options: Any) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in plan(rows, **options).check().bad]


def refusing(text: str) -> Callable[[Mapping[str, Any]], str]:
    """Return a function of a row that refuses it with a text made of its values."""

    def refuse(row: Mapping[str, Any]) -> str:
        raise ValueError(text.format_map(row))

    return refuse


def test_columns_of_the_crews_names_become_inputs_and_empty_ones_are_missing():
    rows = [{"topic": "tea", "tone": "", "id": 1}, {"topic": "coffee", "tone": "dry"}, {"topic": "milk", "tone": None}]
    assert inputs(rows) == [{"topic": "tea"}, {"topic": "coffee", "tone": "dry"}, {"topic": "milk"}]


def test_all_columns_become_inputs_of_a_crew_that_names_none():
    assert inputs([{"a": 1, "b": "x", "c": None}], expected=[]) == [{"a": "1", "b": "x"}]


def test_inputs_by_mapping():
    given = {
        "topic": "title",
        "tone": "{{ mood }}, {{ row['how much'] }}",
        "count": lambda values: len(values["title"]),
        "language": lambda _: "English",
        "limit": 5,
    }
    row = {"title": "tea", "mood": "dry", "how much": None}
    assert inputs([row], inputs=given, crew=ANY_INPUT) == [
        {"topic": "tea", "tone": "dry, ", "count": "3", "language": "English", "limit": "5"}
    ]
    assert inputs([row], inputs=given, crew=replace(ANY_INPUT, inputs_as_json=True))[0]["limit"] == 5


def test_the_input_id_comes_from_no_column_of_its_name_alone():
    topic, row = CrewInput(name="topic"), {"topic": "tea", "id": 1}
    for expected in ([], [topic, CrewInput(name="id", required=False)]):
        assert inputs([row], expected=expected) == [{"topic": "tea"}]
        mapped = inputs([row], expected=expected, inputs={"topic": "topic", "id": "id"})
        assert mapped == [{"topic": "tea", "id": "1"}]
    for required in ([topic, CrewInput(name="id")], [CrewInput(name="id")]):
        [(_, reason)] = reasons([row], expected=required)
        assert reason.startswith("has no value for id;")
        assert "never comes from a column by its name" in reason


def test_an_unknown_input_of_a_mapping_is_reported_once_unless_extra_ones_are_allowed():
    given = {"topic": "title", "tones": lambda _: "dry"}
    with pytest.raises(ConfigurationError, match=r"tones \(did you mean tone\?\).*the crew takes topic, tone"):
        plan([{"title": "tea"}], inputs=given)
    assert inputs([{"title": "tea"}], inputs=given, crew=ANY_INPUT) == [{"topic": "tea", "tones": "dry"}]
    assert inputs([{"title": "tea"}], inputs=given, expected=[]) == [{"topic": "tea", "tones": "dry"}]


def test_an_unknown_input_of_a_function_is_reported_with_its_row():
    def of(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"topic": "tea", values["name"]: 1}

    rows = [{"name": "tone"}, {"name": "colour"}, {"name": "crewai_trigger_payload"}]
    [(line, reason)] = reasons(rows, inputs=of)
    assert (line, reason) == (2, "gives the unknown inputs colour; the crew takes topic, tone")


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        pytest.param({"topic": "", "tone": "x"}, {}, "has no value for topic", id="required and empty"),
        pytest.param({"topic": None}, {}, "has no value for topic", id="required and null"),
        pytest.param({"tone": "dry"}, {}, "has no value for topic", id="required and not there"),
        pytest.param({"titel": "tea"}, {}, "has the name of an input of the crew (tone, topic)", id="no input at all"),
        pytest.param({"topic": float("nan")}, {}, "Input 'topic' holds a number that is not finite", id="NaN"),
        pytest.param({"topic": "\ud800"}, {}, "lone surrogate", id="half a character"),
        pytest.param({"topic": b"x"}, {}, "bytes, which cannot be sent", id="bytes"),
        pytest.param(
            {"a": "x"}, {"inputs": {"topic": "b"}}, "needs column b, which the row does not have", id="column"
        ),
        pytest.param(
            {"note": "x"}, {"inputs": {"topic": "noet"}}, "column noet (did you mean note?), which", id="near"
        ),
        pytest.param({"a": ""}, {"inputs": {"topic": "a"}}, "has no value for topic", id="empty column"),
        pytest.param({"a": "x"}, {"inputs": {"topic": "{{ b }}"}}, "uses b: the row has no such column", id="template"),
        pytest.param({"a": None}, {"inputs": {"topic": " {{ a }} "}}, "has no value for topic", id="empty template"),
        pytest.param({"a": 1}, {"inputs": {"topic": "{{ a.b.c }}"}}, "cannot be filled", id="attribute"),
        pytest.param({"a": None}, {"inputs": lambda row: {"topic": row["a"].strip()}}, "AttributeError", id="function"),
        pytest.param({"a": 0}, {"inputs": {"topic": lambda row: 1 / row["a"]}}, "ZeroDivisionError", id="raising"),
        pytest.param({"topic": "x"}, {"key": "id"}, "there is no column 'id', which is the key", id="no key column"),
        pytest.param({"topic": "x", "id": " "}, {"key": "id"}, "its key is empty", id="empty key"),
        pytest.param({"topic": "x", "id": "k" * 201}, {"key": "id"}, "201 characters, the limit is 200", id="long key"),
        pytest.param({"topic": "x", "id": "a\0b"}, {"key": "id"}, "that no ledger can keep", id="NUL in the key"),
        pytest.param({"topic": "x", "id": "\ud800"}, {"key": "id"}, "that no ledger can keep", id="half a key"),
        pytest.param({"topic": "x", "id": 2.0**53}, {"key": "id"}, "its key is a float, which is not ex", id="rounded"),
        pytest.param({"topic": "x"}, {"key": lambda row: row["id"]}, "KeyError: 'id'", id="key function"),
    ],
)
def test_a_row_that_cannot_be_run_says_why(row: dict[str, Any], options: dict[str, Any], reason: str):
    [(line, found)] = reasons([row], **options)
    assert not found.endswith("."), "it becomes a part of a sentence"
    assert line == 1
    assert reason in found


def test_all_bad_rows_are_reported_at_once_and_the_message_has_an_end():
    rows = [{"topic": "" if number % 2 else "tea"} for number in range(100)]
    checked = plan(rows).check()
    assert (checked.total, checked.bad_count, len(checked.bad)) == (50, 50, 50)
    error = BadRowsError(checked.bad, checked.bad_count, source="leads.csv")
    assert error.rows[0] == BadRow(2, "has no value for topic")
    assert str(error).startswith(
        "leads.csv: 50 rows cannot be run: lines 2, 4, 6, 8, 10, 12, 14, 16, 18, 20 and 40 more: has no value for "
        "topic. Correct them, or skip them with on_bad_row='skip'."
    )
    many = [BadRow(number, f"reason {number}") for number in range(1000)]
    assert "line 19: reason 19; and 4,980 more rows. Correct" in str(BadRowsError(many, 5000, source="leads.csv"))


def test_a_template_that_is_none_is_no_fault_of_the_rows():
    with pytest.raises(ConfigurationError, match="is not a template"):
        plan([{"a": 1}], inputs={"topic": "{{ a"})


def test_equal_rows_differ_by_their_number_of_occurrence():
    first, second, third = keys([{"topic": "tea"}, {"topic": "coffee"}, {"topic": "tea"}])
    assert first.removesuffix("-1") == third.removesuffix("-2")
    assert second.endswith("-1")
    assert len({first, second, third}) == 3


def test_keys_come_from_the_row_and_are_there_once():
    rows = [{"topic": "tea", "id": 7}, {"topic": "coffee", "id": "ü 🙂"}]
    assert keys(rows, key="id") == keys(rows, key=lambda row: row["id"]) == ["7", "ü 🙂"]
    assert reasons([*rows, rows[0]], key="id") == [(3, "has the key '7' of line 1 again")]


def test_the_fingerprint_is_that_of_the_rows_whatever_their_order():
    rows = [{"topic": f"topic {number}"} for number in range(50)]
    mark = plan(rows).check().fingerprint
    assert plan(rows[::-1]).check().fingerprint == mark
    assert plan(rows[1:]).check().fingerprint != mark
    assert plan([*rows[1:], {"topic": "another"}]).check().fingerprint != mark
    assert plan([*rows, rows[0]]).check().fingerprint != mark


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        pytest.param("0:2", ["a", "b"], id="the first"),
        pytest.param("2:4", ["d"], id="one of them cannot be run"),
        pytest.param("3:", ["d", "e"], id="to the end"),
        pytest.param(":1", ["a"], id="from the beginning"),
        pytest.param("4:99", ["e"], id="beyond the end"),
    ],
)
def test_a_range_of_rows_is_checked_and_run_alone(rows: str, keys: list[str]):
    data = [{"id": key, "topic": "" if key == "c" else "tea"} for key in "abcde"]
    made = plan(data, key="id", rows=rows)
    assert [job.key for job in made.jobs()] == keys
    assert (made.check().total, made.check().bad_count) == (len(keys), int(rows == "2:4"))


def test_a_range_without_rows_is_an_error():
    with pytest.raises(DatasetError, match="has no rows from row 3 on"):
        plan([{"topic": "tea"}], rows="3:").check()


HIDES = replace(CREW, secret_inputs=("pin",), allow_extra_inputs=True)


def test_no_reason_of_a_bad_row_has_a_secret_input():
    refuse = refusing("who has {code}?")

    def revealed(row: Any) -> Any:
        return refuse({"code": row["code"].get_secret_value()})

    # Among them the secret column of a template, refused where another input is made.
    ways = [{"topic": "topic", "pin": refuse}, {"pin": "{{ code }}", "topic": refuse}, refuse]
    for inputs in ways:
        found = reasons([{"topic": "tea", "code": "hunter22"}], inputs=inputs, crew=HIDES)
        assert found == [(1, f"who has {MASK}?")]
    assert reasons([{"code": SecretStr("hunter22")}], inputs=revealed, crew=HIDES) == [(1, f"who has {MASK}?")]


def test_a_bad_row_has_no_secret_input_also_where_another_column_repeats_it():
    file = io.BytesIO()
    rows = [{"topic": 7, "code": "hunter22", "note": "of hunter22"}]
    plan(rows, inputs={"topic": "topic", "pin": "code", "tone": "none"}, crew=HIDES).check(file)
    assert json.loads(file.getvalue())["row"] == {"topic": 7, "code": MASK, "note": f"of {MASK}"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(b"\xff\xd8", {"photo": "_9g="}), ("half \ud83d", None)],
    ids=["bytes", "half a character"],
)
def test_a_bad_row_that_is_no_json_is_written_with_its_reason(value: Any, shown: Any):
    def refuse(row: Mapping[str, Any]) -> str:
        raise ValueError(f"no topic in {str(row['photo'])[:6]}")

    file = io.BytesIO()
    checked = plan([{"photo": value}, {"photo": "x"}], inputs={"topic": refuse}).check(file)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["row"] for line in lines] == [shown, {"photo": "x"}]
    assert [(line["line"], line["reason"]) for line in lines] == [(bad.line, bad.reason) for bad in checked.bad]


DEEP = reduce(lambda inner, _: [inner], range(3_000), list[Any]())


@pytest.mark.parametrize("value", [DEEP, {("a", 1): 2}], ids=["nested deeply", "keys that are tuples"])
def test_a_bad_row_of_strange_values_ends_nothing(value: Any):
    file = io.BytesIO()
    checked = plan([{"topic": topic, "other": value} for topic in ("tea", "")]).check(file)
    [line] = map(json.loads, file.getvalue().splitlines())
    assert (checked.total, checked.bad_count, line["line"], line["row"]) == (1, 1, 2, None)
    assert line["reason"] == checked.bad[0].reason


def test_a_reason_with_half_a_character_can_be_stored():
    file = io.BytesIO()
    plan([{"text": "é \ud83d"}], inputs={"topic": refusing("no topic in {text}")}).check(file)
    assert json.loads(file.getvalue()) == {"line": 1, "reason": "no topic in é \\ud83d", "row": None}


def test_a_number_of_pandas_stays_itself_where_another_row_has_none():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    for ids in ([1, 2], [1, 2, None]):
        frame = pandas.DataFrame({"id": ids, "topic": "tea"})
        assert [job.key for job in plan(frame, key="id").jobs()] == ["1", "2"]
        sessions = [job.inputs.session for job in plan(frame, session="id").jobs()]
        assert sessions == ["1", "2", None][: len(ids)]
        jobs = plan(frame.convert_dtypes(), inputs={"topic": "id"}).jobs()
        assert [job.inputs.encoded["topic"] for job in jobs] == ["1", "2"]
    assert keys([{"topic": "tea", "id": number} for number in (1.5, float("inf"))], key="id") == ["1.5", "inf"]


def test_rows_that_only_a_secret_input_tells_apart_need_a_key():
    rows = [{"topic": "tea", "id": number, "code": code} for number, code in enumerate(("one", "two"))]
    options: dict[str, Any] = {"inputs": {"topic": "topic", "pin": "code"}, "crew": HIDES}
    with pytest.raises(DatasetError, match=r"line 2: equals an earlier row but for its secret inputs\. Give the rows"):
        plan(rows, **options).check()
    assert keys(rows, key="id", **options) == ["0", "1"]
    with pytest.raises(DatasetError, match="line 2: equals"):
        plan([rows[0], {"topic": "tea", "code": None}], **options).check()
    assert reasons([row | {"code": "one"} for row in rows], **options) == []


def test_a_fresh_token_of_the_second_reading_loses_no_equal_row():
    tokens = iter(["old", "old", "old", "new"])
    options: dict[str, Any] = {"inputs": {"topic": "topic", "pin": lambda _: next(tokens)}, "crew": HIDES}
    equal = plan([{"topic": "tea"}] * 2, **options)
    assert equal.check().total == 2
    assert [job.inputs.encoded["pin"] for job in equal.jobs()] == ["old", "new"]


def test_a_key_that_holds_a_secret_input_is_refused():
    rows = [{"topic": "tea", "code": "hunter22"}]
    given = {"topic": "topic", "pin": "code"}
    [(_, reason)] = reasons(rows, inputs=given, key=lambda row: f"of {row['code']}", crew=HIDES)
    assert reason == "its key holds a secret input, but logs, artifacts and the ledger show keys"
    assert keys(rows, inputs={"topic": "topic", "tone": lambda row: SecretStr(row["code"])}, key="code") == []
    with pytest.raises(ConfigurationError, match="'topic' is a secret input"):
        plan([{"topic": "tea"}], key="topic", crew=replace(CREW, secret_inputs=("topic",)))
