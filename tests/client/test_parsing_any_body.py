"""No body whatsoever makes a parser raise anything but ResponseFormatError, or become a success that it is not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_crew.client._parsing import (
    parse_error,
    parse_inputs,
    parse_kickoff,
    parse_resume,
    parse_status,
    parse_stop,
    parse_webhook,
)
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.states import CrewState

PARSERS = {
    "inputs": parse_inputs,
    "kickoff": parse_kickoff,
    "status": lambda body: parse_status(body, "k"),
    "resume": parse_resume,
    "stop": lambda body: parse_stop(body, "k"),
    "stop-400": lambda body: parse_stop(body, "k", 400),
    "stop-404": lambda body: parse_stop(body, "k", 404),
    **{
        f"webhook-{kind}": lambda body, kind=kind: parse_webhook(kind, body)
        for kind in ("task", "step", "crew", "human_input", "stream")
    },
}

KNOWN_KEYS = """
    state status message result output raw json_dict pydantic tasks tasks_output task_outputs result_json output_json
    last_executed_task task_id name task_name agent role execution_time description progress completed_tasks
    total_tasks percentage current_task last_step error error_message detail details missing_inputs loc msg type
    token_usage total_tokens kickoff_id kickoffId execution_id id inputs required events meta human_input
    task_output prompt thought content tool step_type timestamp data
"""
KEYS = st.sampled_from(KNOWN_KEYS.split())
STATES = ["SUCCESS", "FAILED", "STARTED", "PAUSED", "REVOKED", "NOT FOUND", "HYDRATING", "completed"]
WORDS = st.sampled_from([*STATES, '{"a": 1}', "```\n[", "["])
# Text with lone surrogates too: a JSON body that is decoded already may hold them.
TEXT = st.one_of(WORDS, st.text(st.characters(exclude_categories=())), st.text(max_size=3))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just(10**400))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(KEYS, TEXT), inner, max_size=6)),
    max_leaves=25,
)
# A dozen parsers each: a hundred examples of every test would only slow all other tests down.
FEW = settings(max_examples=40)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=8)


def check(found: Any) -> None:
    """What came out can be shown and sent on."""
    repr(found).encode()
    if hasattr(found, "model_dump"):
        text = found.model_dump(exclude={"raw", "data", "meta", "tasks", "events"})
        json.dumps(text, ensure_ascii=False).encode()


@pytest.mark.parametrize("parser", PARSERS)
@FEW
@given(body=st.one_of(VALUES, OBJECTS))
def test_decoded_bodies(parser: str, body: Any):
    try:
        check(PARSERS[parser](body))
    except ResponseFormatError as error:
        str(error).encode()


@pytest.mark.parametrize("parser", PARSERS)
@FEW
@given(body=st.one_of(st.binary(), st.text()))
@example(body=b"\xff\xfe")
@example(body=b"\x00\x00\x00{")
@example(body="\ud800")
@example(body='"\\ud800"')
@example(body='{"kickoff_id": "\\udfff"}')
@example(body="[" * 100_000)
@example(body='{"a":' * 100_000)
@example(body='{"inputs":' + "[" * 900 + "]" * 900 + "}")
@example(body="9" * 10_000)
@example(body="-1e99999")
@example(body="NaN")
def test_undecoded_bodies(parser: str, body: bytes | str):
    try:
        check(PARSERS[parser](body))
    except ResponseFormatError as error:
        str(error).encode()


@pytest.mark.parametrize("parser", PARSERS)
@FEW
@given(body=OBJECTS)
def test_written_objects(parser: str, body: Any):
    try:
        text = json.dumps(body)
    except ValueError:  # the int of 5,000 digits: written by a server that is not Python
        return
    try:
        check(PARSERS[parser](text.encode()))
    except ResponseFormatError as error:
        str(error).encode()


@pytest.mark.parametrize(
    "odd",
    [object(), {1, 2}, {1: 2}, {("a",): 1}, range(3), 1j, b"", bytearray(b"{}")],
    ids=lambda odd: type(odd).__name__,
)
@pytest.mark.parametrize("parser", PARSERS)
def test_what_is_no_json_at_all(parser: str, odd: Any):
    try:
        check(PARSERS[parser](odd))
    except ResponseFormatError as error:
        str(error).encode()


def cyclic() -> dict[str, Any]:
    body: dict[str, Any] = {"state": "SUCCESS", "status": "FAILED", "kickoff_id": "k", "inputs": []}
    body["result"] = body["error"] = body["output"] = body
    body["inputs"].append(body)
    return body


def enormous() -> dict[str, Any]:
    number = 10**5000  # has no text: Python refuses to write it
    body = dict.fromkeys(("kickoff_id", "execution_time", "progress", "result", "error", "task_id"), number)
    return {**body, "state": "SUCCESS", "status": "FAILED", "inputs": [number], "token_usage": {"total_tokens": number}}


@pytest.mark.parametrize("make", [cyclic, enormous])
@pytest.mark.parametrize("state", ["SUCCESS", "FAILED", "RUNNING"])
@pytest.mark.parametrize("parser", PARSERS)
def test_a_body_that_cannot_be_written(parser: str, state: str, make: Any):
    try:
        PARSERS[parser]({**make(), "state": state})
    except ResponseFormatError as error:
        str(error).encode()


@given(OBJECTS)
def test_only_a_known_word_of_success_completes(body: dict[str, Any]):
    try:
        found = parse_status(body, "k")
    except ResponseFormatError:
        return
    word = "".join(character for character in found.raw_state or "" if character not in " \t\n-_").casefold()
    if word in {"success", "completed"}:  # unless the same body says that it failed or was stopped
        assert found.state in (CrewState.COMPLETED, CrewState.FAILED, CrewState.STOPPED)
    else:
        assert found.state is not CrewState.COMPLETED
    if found.state is not CrewState.COMPLETED:
        assert (found.output, found.data) == (None, None)
    if found.state not in (CrewState.FAILED, CrewState.STOPPED):
        assert found.error is None


@given(st.integers(100, 599), st.dictionaries(TEXT, TEXT), st.one_of(st.binary(), TEXT, OBJECTS.map(repr)))
def test_error_facts_of_anything(status: int, headers: dict[str, str], text: bytes | str):
    facts = parse_error(status, headers, text)
    repr(facts._replace(raw=None)).encode()


@given(st.one_of(TEXT, st.floats().map(str), st.integers().map(str)))
def test_retry_after_is_none_or_a_time_to_wait(value: str):
    seconds = parse_error(429, {"Retry-After": value}, "").retry_after
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))
