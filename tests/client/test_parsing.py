"""Every known variant of every answer becomes its model, and no other body breaks the client or makes a success."""

import asyncio
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from prefect_crew import exceptions
from prefect_crew.client import TokenUsage, _parsing
from prefect_crew.client._parsing import parse_retry_after, tokens_of, waiting_output
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.exceptions import CrewAPIError, InvalidInputsError, ResponseFormatError
from prefect_crew.states import CrewState
from support.corpus import body_of, cases
from support.transports import ask

ANSWERS = ("inputs", "kickoff", "status", "resume", "stop")
TABLES = {table: cases(table) for table in (*ANSWERS, "error")}


def in_tables(*tables: str) -> pytest.MarkDecorator:
    pairs = [pytest.param(table, name, id=f"{table}/{name}") for table in tables for name in TABLES[table]]
    return pytest.mark.parametrize(("table", "name"), pairs)


def plain(model: Any) -> Any:
    """Return a model as the JSON that the corpus writes: fields at their defaults and raw bodies left out."""
    if isinstance(model, list):
        return [plain(item) for item in model]
    if not isinstance(model, BaseModel):
        return model
    fields = model.model_dump(mode="json", exclude_defaults=True, exclude={"raw": True})
    if "tasks" in fields:
        fields["tasks"] = [{key: value for key, value in task.items() if key != "raw"} for task in fields["tasks"]]
    return fields


@in_tables(*ANSWERS)
async def test_an_answer_becomes_its_model(table: str, name: str):
    case = TABLES[table][name]
    asked = ask(table, body_of(case), case.get("status_code", 200))
    if "raises" in case:
        with pytest.raises(getattr(exceptions, case["raises"])) as caught:
            await asked
        assert len(str(caught.value)) < 1000
        return
    found = await asked
    if "generate" in case:
        assert found.output == json.loads(body_of(case))["result"]
        found = found.model_copy(update={"output": None})
    assert plain(found) == case["expected"]
    if "body" in case and hasattr(found, "raw"):
        assert found.raw == case["body"]
    if table == "status":
        assert pickle.loads(pickle.dumps(found)) == found
        if found.state is CrewState.COMPLETED:
            result = found.result().model_dump()
            shared = {key: value for key, value in found.model_dump().items() if key in result}
            assert result == shared | {"output": found.output or "", "cost": None, "idempotency_key": None}
        else:
            assert found.output is None
            assert found.data is None
            with pytest.raises(exceptions.ConfigurationError, match=f"is {found.state}, not completed"):
                found.result()


@in_tables("error")
async def test_an_error_says_what_its_body_says(table: str, name: str):
    case = TABLES[table][name]
    with pytest.raises(InvalidInputsError) as caught:
        await ask("kickoff", body_of(case), 422, case.get("headers"))
    found = {key: getattr(caught.value, key) for key in ("message", "missing_inputs", "retry_after")}
    assert {key: value for key, value in found.items() if value or value == 0} == case["expected"]


# Single rules


def as_body(value: Any) -> bytes:
    return json.dumps(value).encode()


LAST = {"task_id": "draft", "name": "Draft it", "output": "Draft v1"}


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"human_input": {"task_output": "A"}, "last_executed_task": LAST}, "A"),
        ({"current_task": "draft", "last_executed_task": LAST}, "Draft v1"),
        ({"current_task": "Draft it", "last_executed_task": LAST}, "Draft v1"),
        ({"current_task": {"task_id": "draft"}, "last_executed_task": LAST}, "Draft v1"),
        ({"last_executed_task": LAST}, "Draft v1"),
        ({"current_task": "review", "last_executed_task": LAST}, None),
        ({"human_task_id": "review", "last_executed_task": LAST}, None),
        ({"current_task": "draft", "last_executed_task": "draft"}, None),
        ({"current_task": "draft"}, None),
    ],
    ids=str,
)
def test_what_a_person_is_to_review(body: dict[str, Any], shown: str | None):
    assert waiting_output({"state": "PENDING_HUMAN_INPUT", **body}) == shown


@pytest.mark.parametrize("key", ["kickoff_id", "kickoffId", "execution_id", "executionId"])
async def test_a_status_of_another_run_is_refused(key: str):
    body = {"status": "completed", "result": "cats", key: "SOMEONE-ELSES"}
    with pytest.raises(ResponseFormatError, match="Expected the status of this run") as caught:
        await ask("status", as_body(body), run="k1")
    assert caught.value.kickoff_id == "k1"
    for own in ("k1", "K1", 7, None):
        assert (await ask("status", as_body({**body, key: own}), run="7" if own == 7 else "k1")).output == "cats"
    assert (await ask("status", as_body({**body, "id": "k1", "executionId": "k1"}), run="k1")).output == "cats"


@pytest.mark.parametrize("bad", ["k\n1", "\x1b]0;x\x07", "k\x9b1", "k\u202e1", "k\u20281", "\u200bk", "k\t1"])
async def test_an_id_with_control_characters_is_none(bad: str):
    with pytest.raises(ResponseFormatError) as caught:
        await ask("kickoff", as_body({"kickoff_id": bad}))
    assert kickoff_fate(caught.value) is KickoffFate.UNCERTAIN
    assert await ask("kickoff", as_body({"kickoff_id": "run 1; é/'\"$(x)"})) == "run 1; é/'\"$(x)"


@pytest.mark.parametrize("levels", [100, 101, 500])
@pytest.mark.parametrize("is_nested", [False, True], ids=["as-it-is", "as-text"])
async def test_a_deep_structure_is_only_text(is_nested: bool, levels: int):
    text = "[" * levels + "]" * levels
    body = {"state": "SUCCESS", "result": text if is_nested else json.loads(text)}
    status = await ask("status", as_body(body))
    assert status.output == text
    assert (status.data is None) == (levels > 100)
    assert status.model_dump_json(exclude={"raw"})


@pytest.mark.parametrize("is_nested", [False, True], ids=["as-it-is", "as-text"])
async def test_a_body_of_very_many_lists_is_refused(is_nested: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_parsing, "MAX_CONTAINERS", 1_000)
    lists = [[] for _ in range(1_000)]
    body = as_body({"state": "SUCCESS", "result": json.dumps(lists) if is_nested else lists})
    with pytest.raises(ResponseFormatError):
        await ask("status", body)
    assert (await ask("status", body.replace(b"[], ", b"", 10))).state is CrewState.COMPLETED


# Any body

PARTS = """
    state status message result output raw json_dict pydantic tasks tasks_output task_outputs result_json output_json
    last_executed_task task_id name task_name agent role execution_time description progress completed_tasks
    total_tasks percentage current_task last_step error error_message detail details missing_inputs loc msg type
    token_usage total_tokens kickoff_id kickoffId execution_id id inputs required events meta human_input
    task_output prompt thought content tool step_type timestamp data
"""
TEXT = st.one_of(
    st.sampled_from(
        ["SUCCESS", "FAILED", "STARTED", "PAUSED", "REVOKED", "NOT FOUND", "HYDRATING", '{"a": 1}', "```\n["]
    ),
    st.text(st.characters(exclude_categories=())),  # lone surrogates too: JSON may hold them, escaped
    st.text(max_size=3),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just(10**400))
NAMES = st.sampled_from(PARTS.split())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXT), inner, max_size=6)),
    max_leaves=25,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=8)
BODIES = st.one_of(VALUES.map(as_body), OBJECTS.map(as_body), st.binary(), st.text().map(str.encode))


@pytest.mark.parametrize(
    ("table", "status_code"), [*((table, 200) for table in ANSWERS), ("stop", 400), ("stop", 404), ("kickoff", 422)]
)
@settings(max_examples=60)
@given(body=BODIES)
@example(body=b"\xff\xfe")
@example(body=b"\x00\x00\x00{")
@example(body=b'"\\ud800"')
@example(body=b'{"kickoff_id": "\\udfff"}')
@example(body=b"[" * 100_000)
@example(body=b'{"a":' * 100_000)
@example(body=b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}")
@example(body=b"9" * 10_000)
@example(body=b'{"state":"SUCCESS","execution_time":' + b"9" * 5_000 + b"}")
@example(body=b"-1e99999")
@example(body=b"NaN")
def test_any_body_is_read_or_refused(table: str, status_code: int, body: bytes):
    try:
        found = asyncio.run(ask(table, body, status_code))
    except (ResponseFormatError, CrewAPIError) as error:
        str(error).encode()
        return
    repr(found).encode()
    if isinstance(found, BaseModel):
        json.dumps(found.model_dump(exclude={"raw", "data", "tasks"}), ensure_ascii=False).encode()


@given(OBJECTS)
def test_only_a_known_word_of_success_completes(body: dict[str, Any]):
    try:
        found = asyncio.run(ask("status", as_body(body)))
    except ResponseFormatError:
        return
    if (found.raw_state or "").strip(" \t\n-_").casefold() == "success":  # unless it says that it failed or was stopped
        assert found.state in (CrewState.COMPLETED, CrewState.FAILED, CrewState.STOPPED)
    else:
        assert found.state is not CrewState.COMPLETED
    if found.state is not CrewState.COMPLETED:
        assert found.output is None
        assert found.data is None
    if found.state not in (CrewState.FAILED, CrewState.STOPPED):
        assert found.error is None


@given(st.one_of(TEXT, st.floats().map(str), st.integers().map(str)))
def test_retry_after_is_none_or_a_time_to_wait(value: str):
    seconds = parse_retry_after(value)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


@pytest.mark.parametrize("count", [10**12 + 1, 2**63 - 1024, 10**30, -1, "NaN", "inf", "many", None, [1], True])
def test_an_impossible_count_is_not_reported(count: Any):
    """Two of 2**63 - 1024 would overflow the sum of a batch in the crew database, which then could not be read."""
    assert tokens_of({"total_tokens": count}) is None
    assert tokens_of({"total_tokens": count, "prompt_tokens": 5}) == TokenUsage(prompt_tokens=5)
