"""From a webhook's body to Prefect's event: by the receiver, and by the template for Prefect Cloud's own webhooks."""

import json
from datetime import UTC, datetime
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.events.schemas.events import Event

from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.receiver.events import MAX_STREAMED, WebhookEvent, read_events
from prefect_crew.webhooks import Hook, WebhookKind
from support.corpus import body_of, cases
from support.deployed import ROOT
from support.webhooks import BODIES, SAID_BY_NOBODY

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def read(kind: WebhookKind, body: Any, *, names: bool = True, **facts: Any) -> list[WebhookEvent]:
    hook = Hook(kind, "an-attempt", NOW, 0, names, **facts)
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
    assert case["expected"] == [
        {"name": event.name, "said": event.facts} | ({"output": event.output} if event.output else {})
        for event in events
    ]


@pytest.mark.parametrize("bad", ["k\n1", "\x1b]0;x\x07", "k\u202e1"])
def test_an_id_with_control_characters_names_no_run(bad: str):
    with pytest.raises(ResponseFormatError):
        read("crew", {"kickoff_id": bad, "result": "x"})


@pytest.mark.parametrize("names", [True, False])
def test_no_control_character_gets_into_an_event(names: bool):
    """PostgreSQL stores no text with a NUL: all events that came to the Prefect server with it would be lost."""
    body = {"kickoff_id": "k-1", "task_id": "t\0", "task_name": "a\0b", "agent": "\x1b[2J"}
    (event,) = read("task", body, names=names)
    assert event.facts == {"kickoff_id": "k-1"} | ({"name": "a�b", "agent": "�[2J"} if names else {})
    streamed = {"id": "e\0", "execution_id": "k\0", "timestamp": "\0", "type": "t", "data": {"task_name": "\0"}}
    (event,) = read("stream", {"events": [streamed]}, names=names)
    assert event.facts == ({"at": "�", "name": "�"} if names else {})
    assert event.kickoff_id is None


@pytest.mark.parametrize("which", BODIES)
def test_without_names_nothing_that_may_be_a_secret_is_read(which: str):
    kind: Any = which.partition("-")[0]
    events = read(kind, BODIES[which], names=False)
    facts = json.dumps([dict(event.facts) for event in events])
    assert [word for word in (*SAID_BY_NOBODY, "Researcher") if word in facts] == []
    for event in events:
        assert event.kickoff_id == event.facts["kickoff_id"] == "k-1"


def test_the_type_of_a_streamed_event_is_a_name():
    types = ["crew_kickoff_completed", "LLM_Call_Started", "prefect.flow-run.Completed\n", "x" * 101, None]
    events = read("stream", {"events": [{"execution_id": "k-1", "type": type_} for type_ in types]})
    names = ["crew_kickoff_completed", "llm_call_started", "other", "other", "other"]
    assert [event.name for event in events] == [f"stream.{name}" for name in names]


@pytest.mark.parametrize("model", ["openai/gpt-4o", "the model that says a secret"])
def test_a_call_of_a_model_tells_its_counts_and_no_text(model: str):
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    data = {"model": model, "usage": usage, "messages": [{"content": "the prompt"}], "response": "the output"}
    (event,) = read("stream", {"events": [{"execution_id": "k-1", "type": "llm_call_completed", "data": data}]})
    assert event.facts == {"kickoff_id": "k-1", **usage} | ({} if " " in model else {"model": model})


def test_a_delivery_to_the_stream_tells_so_much_and_no_more():
    events = [{"execution_id": "k", "type": "llm_stream_chunk", "id": str(n)} for n in range(5000)]
    assert len(read("stream", {"events": events})) == MAX_STREAMED


@pytest.mark.parametrize("names", [True, False])
def test_unknown_ids_and_times_have_to_look_like_such(names: bool):
    def facts_of(text: str, at: str) -> dict[str, Any]:
        (task,) = read("task", {"kickoff_id": text, "task_id": text, "status": "completed"}, names=names)
        event = {"id": text, "execution_id": text, "timestamp": at, "type": "task_failed", "data": {}}
        (streamed,) = read("stream", {"events": [event]}, names=names)
        return {**task.facts, **streamed.facts}

    sentence, at = "log in with hunter22 please", "2026-05-01T12:00:00.5+00:00"
    assert ("hunter22" in str(facts_of(sentence, sentence))) is names
    known = facts_of("ns:run.1_a", at)
    assert [known[name] for name in ("kickoff_id", "task_id", "id", "at")] == [*["ns:run.1_a"] * 3, at]


def test_long_names_are_cut_and_long_ids_left_out():
    body = {"kickoff_id": "k" * 301, "task_id": "t" * 301, "agent": "a\n" * 1000, "status": "done"}
    (event,) = read("task", body)
    assert set(event.facts) == {"state", "agent"}
    assert event.kickoff_id is None
    assert event.facts["agent"] == ("a " * 50)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
keys = st.sampled_from(
    [
        "kickoff_id",
        "execution_id",
        "task_id",
        "agent",
        "meta",
        "status",
        "events",
        "type",
        "data",
        "id",
        "result",
        "thought",
    ]
)
bodies = st.dictionaries(keys, json_values | st.just("k-1") | st.lists(st.dictionaries(keys, json_values)))


@given(st.sampled_from(["task", "step", "crew", "human_input", "stream"]), bodies)
def test_whatever_a_body_holds_its_event_is_small_and_plain(kind: WebhookKind, body: dict[str, Any]):
    try:
        events = read(kind, body)
    except ResponseFormatError:
        return
    for event in events:
        assert len(json.dumps(dict(event.facts), allow_nan=False)) < 12_000
        assert len(event.name) < 120


# Prefect Cloud renders its template as Jinja, with the parsed body, or with the text of a body that is no JSON.

TEMPLATE = jinja2.Environment(autoescape=False).from_string(
    (ROOT / "deployments" / "cloud-webhook.jinja").read_text(encoding="utf-8")
)


def rendered(body: Any) -> Event:
    return Event.model_validate(json.loads(TEMPLATE.render(method="POST", headers={}, body=body)))


@pytest.mark.parametrize("name", CORPUS)
def test_a_body_becomes_an_event_of_cloud(name: str):
    case = CORPUS[name]
    event = rendered(case["body"] if "body" in case else case["text"])
    if not name.startswith("refused"):
        assert event.event.startswith(f"crew.webhook.{case['kind']}")


@pytest.mark.parametrize("which", BODIES)
def test_an_event_of_cloud_names_its_run_and_tells_no_secret(which: str):
    event = rendered(BODIES[which])
    kind = which.partition("-")[0]
    assert event.event == ("crew.webhook.stream.crew_kickoff_started" if kind == "stream" else f"crew.webhook.{kind}")
    assert event.resource.id == "prefect-crew.run.k-1"
    key = BODIES[which].get("meta", {}).get("idempotency_key")
    assert event.resource.get("prefect-crew.idempotency-key") == key
    payload = json.dumps(event.payload)
    assert [word for word in SAID_BY_NOBODY if word in payload] == []


@given(json_values | bodies | st.fixed_dictionaries({"meta": st.fixed_dictionaries({"idempotency_key": json_values})}))
def test_whatever_the_body_cloud_gets_an_event(body: Any):
    assert rendered(body).event.startswith("crew.webhook.")
