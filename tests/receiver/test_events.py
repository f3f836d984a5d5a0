from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.receiver.events import MAX_STREAMED, WebhookEvent, read_events
from prefect_crew.webhooks import Hook, WebhookKind
from support.corpus import body_of, cases
from support.webhooks import BODIES, SAID_BY_NOBODY

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def read(kind: WebhookKind, body: Any, *, names: bool = True, **facts: Any) -> list[WebhookEvent]:
    hook = Hook(kind, "city/lisbon", NOW, 1, names, **facts)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_events(hook, raw)


CORPUS = cases("webhook")


@pytest.mark.parametrize("name", CORPUS)
def test_a_body_becomes_its_events(name: str):
    case = CORPUS[name]
    if "raises" in case:
        with pytest.raises(ResponseFormatError) as caught:
            read(case["kind"], body_of(case))
        assert len(str(caught.value)) < 1000
        return
    events = read(case["kind"], body_of(case))
    found = [{"name": one.name, "said": one.said} | ({"output": one.output} if one.output else {}) for one in events]
    assert found == case["expected"]


@pytest.mark.parametrize("bad", ["k\n1", "\x1b]0;x\x07", "k\u202e1"])
def test_an_id_with_control_characters_names_no_run(bad: str):
    with pytest.raises(ResponseFormatError):
        read("crew", {"kickoff_id": bad, "result": "x"})


@pytest.mark.parametrize("names", [pytest.param(True, id="names"), pytest.param(False, id="no-names")])
@pytest.mark.parametrize("which", BODIES)
def test_only_what_cannot_be_a_secret_is_read(which: str, names: bool):
    pieces = read(which.partition("-")[0], BODIES[which], names=names)  # pyright: ignore[reportArgumentType]
    said = json.dumps([dict(one.said) for one in pieces])
    assert [word for word in SAID_BY_NOBODY if word in said] == []
    assert ("Researcher" in said) <= names
    assert all(one.kickoff_id == one.said["kickoff_id"] == "k-1" for one in pieces)
    assert all(one.hook.idempotency_key == "city/lisbon" for one in pieces)


@pytest.mark.parametrize(
    ("type_", "name"),
    [
        pytest.param("crew_kickoff_completed", "crew_kickoff_completed", id="end"),
        pytest.param("LLM_Call_Started", "llm_call_started", id="case"),
        pytest.param("prefect.flow-run.Completed\n", "other", id="odd"),
        pytest.param("x" * 101, "other", id="long"),
        pytest.param(None, "other", id="none"),
    ],
)
def test_the_type_of_a_streamed_event_is_part_of_a_name_and_no_more(type_: str | None, name: str):
    (event,) = read("stream", {"events": [{"execution_id": "k-1", "type": type_}]})
    assert event.name == f"stream.{name}"


def test_a_delivery_to_the_stream_tells_so_much_and_no_more():
    events = [{"execution_id": "k", "type": "llm_stream_chunk", "id": str(n)} for n in range(5000)]
    assert len(read("stream", {"events": events})) == MAX_STREAMED


@pytest.mark.parametrize("names", [True, False])
def test_where_values_are_not_known_ids_and_times_look_like_such_or_are_left_out(names: bool):
    sentence = "log in with hunter22 please"
    (task,) = read("task", {"kickoff_id": sentence, "task_id": sentence, "status": "completed"}, names=names)
    (event,) = read(
        "stream",
        {
            "events": [
                {"id": sentence, "execution_id": sentence, "timestamp": sentence, "type": "task_failed", "data": {}}
            ]
        },
        names=names,
    )
    assert ("hunter22" in str(task.said) + str(event.said)) is names
    (task,) = read("task", {"kickoff_id": "run-1", "task_id": "ns:task.1_a"}, names=names)
    assert (task.said["kickoff_id"], task.said["task_id"]) == ("run-1", "ns:task.1_a")
    at = {"id": "e-1", "execution_id": "r-1", "timestamp": "2026-05-01T12:00:00.5+00:00", "type": "x", "data": {}}
    (event,) = read("stream", {"events": [at]}, names=names)
    assert (event.said["id"], event.said["at"]) == ("e-1", "2026-05-01T12:00:00.5+00:00")


def test_long_names_are_cut_and_long_ids_left_out():
    body = {"kickoff_id": "k" * 301, "task_id": "t" * 301, "agent": "a\n" * 1000, "status": "done"}
    (event,) = read("task", body)
    assert set(event.said) == {"state", "agent"}
    assert event.kickoff_id is None
    assert len(event.said["agent"]) <= 100
    assert "\n" not in event.said["agent"]


def test_the_same_delivery_has_the_same_id_and_another_round_another():
    question = BODIES["human_input-first"]
    (one,), (again,), (later,) = (
        read("human_input", question),
        read("human_input", question),
        read("human_input", question, round=1),
    )
    assert one.id == again.id != later.id
    (other,) = read("human_input", {**question, "task_id": "research"})
    assert other.id != one.id


def test_an_event_that_comes_again_in_another_batch_has_the_same_id():
    event = BODIES["stream"]["events"][0]
    (alone,) = read("stream", {"events": [event]})
    assert alone.id == read("stream", BODIES["stream"])[0].id


def test_the_idempotency_key_that_the_body_claims_is_kept_apart():
    (event,) = read("crew", {**BODIES["crew-first"], "meta": {"idempotency_key": "another"}})
    assert (event.hook.idempotency_key, event.said_key) == ("city/lisbon", "another")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
keys = st.sampled_from(
    ["kickoff_id", "execution_id", "task_id", "agent", "meta", "status", "events", "type", "data", "id", "result"]
)


@given(
    st.sampled_from(["task", "step", "crew", "human_input", "stream"]),
    st.dictionaries(keys, json_values | st.just("k-1") | st.lists(st.dictionaries(keys, json_values))),
)
def test_whatever_a_body_holds_its_event_is_small_and_plain(kind: WebhookKind, body: dict[str, Any]):
    try:
        pieces = read(kind, body)
    except ResponseFormatError:
        return
    for event in pieces:
        assert len(json.dumps(dict(event.said), allow_nan=False)) < 12_000
        assert len(event.name) < 120
