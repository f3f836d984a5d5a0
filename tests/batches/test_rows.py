"""Rows as runs: their inputs, their keys, and the reasons why rows cannot be run, before anything is started."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew.batches.rows import BadRow, BadRows, RowPlan
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import ConfigurationError, DatasetError
from support.batches import CREW, row_plan

ANY_INPUT = replace(CREW, allow_extra_inputs=True)
AS_JSON = replace(ANY_INPUT, flow=True)
TOPIC = [CrewInput(name="topic"), CrewInput(name="tone", required=False)]


def plan(data: Any, **options: Any) -> RowPlan:
    options.setdefault("expected", TOPIC)
    return row_plan(data, **options)


def inputs(rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    return [dict(job.inputs.encoded) for job in plan(rows, **options).jobs()]


def keys(rows: list[dict[str, Any]], **options: Any) -> list[str]:
    return [job.key for job in plan(rows, **options).jobs()]


def reasons(rows: list[dict[str, Any]], **options: Any) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in plan(rows, **options).check()[1].rows]


def refusing(text: str) -> Callable[[Mapping[str, Any]], str]:
    """Return a function of a row that refuses it with a text made of its values."""

    def refuse(row: Mapping[str, Any]) -> str:
        raise ValueError(text.format_map(row))

    return refuse


TITLE = {"title": "tea", "mood": "dry", "how much": None}
MAPPING = {
    "topic": "title",
    "tone": "{{ mood }}, {{ row['how much'] }}",
    "count": lambda values: len(values["title"]),
    "language": lambda _: "English",
    "limit": 5,
}
MAPPED = {"topic": "tea", "tone": "dry, ", "count": "3", "language": "English", "limit": "5"}
UNKNOWN = {"topic": "title", "tones": lambda _: "dry"}
ID_ALONE = [CrewInput(name="id")]
WITH_ID = [CrewInput(name="topic"), CrewInput(name="id", required=False)]
TEA_1 = {"topic": "tea", "id": 1}
INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "empty column": ({**TEA_1, "tone": ""}, {}, {"topic": "tea"}),
    "null column": ({**TEA_1, "tone": None}, {}, {"topic": "tea"}),
    "both inputs": ({**TEA_1, "tone": "dry"}, {}, {"topic": "tea", "tone": "dry"}),
    "crew that names no inputs": ({"a": 1, "b": "x", "c": None}, {"expected": []}, {"a": "1", "b": "x"}),
    "mapping": (TITLE, {"inputs": MAPPING, "crew": ANY_INPUT}, MAPPED),
    "mapping as JSON": (TITLE, {"inputs": MAPPING, "crew": AS_JSON}, {**MAPPED, "count": 3, "limit": 5}),
    "extra input": (TITLE, {"inputs": UNKNOWN, "crew": ANY_INPUT}, {"topic": "tea", "tones": "dry"}),
    "any input": (TITLE, {"inputs": UNKNOWN, "expected": []}, {"topic": "tea", "tones": "dry"}),
    # The input `id` comes from no column of its name alone.
    "id": (TEA_1, {"expected": []}, {"topic": "tea"}),
    "optional id": (TEA_1, {"expected": WITH_ID}, {"topic": "tea"}),
    "mapped id": (TEA_1, {"expected": WITH_ID, "inputs": {"topic": "topic", "id": "id"}}, {"topic": "tea", "id": "1"}),
}


@pytest.mark.parametrize("case", INPUTS)
def test_row_becomes_inputs(case: str):
    row, options, encoded = INPUTS[case]
    assert inputs([row], **options) == [encoded]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"inputs": UNKNOWN}, r"tones \(did you mean tone\?\).*the crew takes topic, tone"),
        ({"inputs": {"topic": "{{ a"}}, "is not a template"),
        ({"key": "topic", "crew": replace(CREW, secret_inputs=("topic",))}, "'topic' is a secret input"),
    ],
    ids=["unknown input", "no template", "secret key"],
)
def test_mistake_of_the_options_is_no_fault_of_the_rows(options: dict[str, Any], problem: str):
    with pytest.raises(ConfigurationError, match=problem):
        plan([{"title": "tea"}], **options)


def named(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"topic": "tea", row["name"]: 1}


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "required and empty": ({"topic": "", "tone": "x"}, {}, "has no value for topic"),
    "required and null": ({"topic": None}, {}, "has no value for topic"),
    "required and not there": ({"tone": "dry"}, {}, "has no value for topic"),
    "required id": (TEA_1, {"expected": ID_ALONE}, "has no value for id; id never comes from a column by its name"),
    "no input at all": ({"titel": "tea"}, {}, "has the name of an input of the crew (tone, topic)"),
    "unknown input": ({"name": "colour"}, {"inputs": named}, "unknown inputs colour; the crew takes topic, tone"),
    "NaN": ({"topic": float("nan")}, {}, "Input 'topic' holds a number that is not finite"),
    "half a character": ({"topic": "\ud800"}, {}, "lone surrogate"),
    "bytes": ({"topic": b"x"}, {}, "bytes, which cannot be sent"),
    "column": ({"a": "x"}, {"inputs": {"topic": "b"}}, "needs column b, which the row does not have"),
    "near": ({"note": "x"}, {"inputs": {"topic": "noet"}}, "column noet (did you mean note?), which"),
    "empty column": ({"a": ""}, {"inputs": {"topic": "a"}}, "has no value for topic"),
    "template": ({"a": "x"}, {"inputs": {"topic": "{{ b }}"}}, "needs column b, which the row does not have"),
    "empty template": ({"a": None}, {"inputs": {"topic": " {{ a }} "}}, "has no value for topic"),
    "attribute": ({"a": 1}, {"inputs": {"topic": "{{ a.b.c }}"}}, "cannot be filled"),
    "function": ({"a": None}, {"inputs": lambda row: {"topic": row["a"].strip()}}, "AttributeError"),
    "nothing": ({"a": 0}, {"inputs": lambda row: None, "expected": []}, "the function of the inputs returned None"),
    "raising": ({"a": 0}, {"inputs": {"topic": lambda row: 1 / row["a"]}}, "ZeroDivisionError"),
    "no key column": ({"topic": "x"}, {"key": "id"}, "there is no column 'id', which is the key"),
    "empty key": ({"topic": "x", "id": " "}, {"key": "id"}, "its key is empty"),
    "long key": ({"topic": "x", "id": "k" * 201}, {"key": "id"}, "201 characters, the limit is 200"),
    "NUL in the key": ({"topic": "x", "id": "a\0b"}, {"key": "id"}, "a control character or half a character"),
    "half a key": ({"topic": "x", "id": "\ud800"}, {"key": "id"}, "a control character or half a character"),
    "key function": ({"topic": "x"}, {"key": lambda row: row["id"]}, "KeyError: 'id'"),
}


@pytest.mark.parametrize("case", REASONS)
def test_bad_row_has_a_reason(case: str):
    row, options, reason = REASONS[case]
    [(line, text)] = reasons([row], **options)
    assert line == 1
    assert reason in text
    assert not text.endswith("."), "it becomes a part of a sentence"


def test_message_about_many_bad_rows_has_an_end():
    rows = [{"topic": "" if number % 2 else "tea"} for number in range(100)]
    total, bad = plan(rows).check()
    assert total == 50
    assert bad.count == 50
    assert len(bad.rows) == 50
    error = bad.error("leads.csv", alone=False)
    assert error.rows[0] == BadRow(2, "has no value for topic")
    assert str(error).startswith(
        "leads.csv: 50 rows cannot be run: lines 2, 4, 6, 8, 10, 12, 14, 16, 18, 20 and 40 more: has no value for "
        "topic. Correct them, or skip them with on_bad_row='skip' (--on-bad-row skip)."
    )
    many = [BadRow(number, f"reason {number}") for number in range(1000)]
    error = BadRows(5000, many).error("leads.csv", alone=False)
    assert "line 19: reason 19; and 4,980 more rows. Correct" in str(error)


def test_equal_rows_differ_by_their_number_of_occurrence():
    first, second, third = keys([{"topic": "tea"}, {"topic": "coffee"}, {"topic": "tea"}])
    assert first.removesuffix("-1") == third.removesuffix("-2")
    assert second.endswith("-1")
    assert len({first, second, third}) == 3


def test_keys_come_from_the_row_and_are_there_once():
    rows = [{"topic": "tea", "id": 7}, {"topic": "coffee", "id": "🙂" * 200}]  # as long as a key may be
    assert keys(rows, key="id") == keys(rows, key=lambda row: row["id"]) == ["7", "🙂" * 200]
    assert reasons([*rows, rows[0]], key="id") == [(3, "has the key '7' of line 1 again")]


@pytest.mark.parametrize(
    ("rows", "keys"),
    [("0:2", ["a", "b"]), ("2:4", ["d"]), ("3:", ["d", "e"]), (":1", ["a"]), ("4:99", ["e"])],
)
def test_range_of_rows_is_checked_and_run_alone(rows: str, keys: list[str]):
    data = [{"id": key, "topic": "" if key == "c" else "tea"} for key in "abcde"]
    part = plan(data, key="id", rows=rows)
    assert [job.key for job in part.jobs()] == keys
    total, bad = part.check()
    assert (total, bad.count) == (len(keys), int(rows == "2:4"))


def test_range_without_rows_is_an_error():
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
        bad = reasons([{"topic": "tea", "code": "hunter22"}], inputs=inputs, crew=HIDES)
        assert bad == [(1, f"who has {MASK}?")]
    assert reasons([{"code": SecretStr("hunter22")}], inputs=revealed, crew=HIDES) == [(1, f"who has {MASK}?")]


DEEP = reduce(lambda inner, _: [inner], range(3_000), list[Any]())


@pytest.mark.parametrize("value", [b"\xff\xd8", DEEP, {("a", 1): 2}], ids=["bytes", "deep", "keys that are tuples"])
def test_values_that_are_no_json_make_no_reason_of_their_own(value: Any):
    for crew in (ANY_INPUT, HIDES):
        [(line, reason)] = reasons(
            [{"topic": topic, "other": value} for topic in ("tea", "")], crew=crew, inputs={"topic": "topic"}
        )
        assert line == 2
        assert reason.startswith(("has no value for topic", "ConfigurationError, and secrets cannot be looked for"))


def test_a_reason_with_half_a_character_can_be_stored():
    bad = reasons([{"text": "é \ud83d"}], inputs={"topic": refusing("no topic in {text}")})
    assert bad == [(1, "no topic in é \\ud83d")]


def test_a_number_of_pandas_stays_itself_where_another_row_has_none():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    for ids in ([1, 2], [1, 2, None]):
        frame = pandas.DataFrame({"id": ids, "topic": "tea"})
        assert [job.key for job in plan(frame, key="id").jobs()] == ["1", "2"]
        sessions = [job.inputs.session for job in plan(frame, session="id", crew=replace(CREW, flow=True)).jobs()]
        assert sessions == ["1", "2", None][: len(ids)]
        jobs = plan(frame.convert_dtypes(), inputs={"topic": "id"}).jobs()
        assert [job.inputs.encoded["topic"] for job in jobs] == ["1", "2"]
    assert keys([{"topic": "tea", "id": number} for number in (1.5, float("inf"))], key="id") == ["1.5", "inf"]


def test_rows_that_only_a_secret_input_tells_apart_differ_by_their_order():
    rows = [{"topic": "tea", "code": code} for code in ("one", "two")]
    first, second = keys(rows, inputs={"topic": "topic", "pin": "code"}, crew=HIDES)
    assert first.removesuffix("-1") == second.removesuffix("-2")


def test_a_key_that_holds_a_secret_input_is_refused():
    rows = [{"topic": "tea", "code": "hunter22"}]
    given = {"topic": "topic", "pin": "code"}
    [(_, reason)] = reasons(rows, inputs=given, key=lambda row: f"of {row['code']}", crew=HIDES)
    assert reason == "its key holds a secret input, but logs and artifacts show keys"
    assert keys(rows, inputs={"topic": "topic", "tone": lambda row: SecretStr(row["code"])}, key="code") == []
