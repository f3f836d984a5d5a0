"""From a webhook's body to Prefect's event: by the receiver, and by the template for Prefect Cloud's own webhooks."""

import json
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.events.schemas.events import Event

from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.receiver.events import MAX_STREAMED, WebhookEvent, read_events
from support.corpus import body_of, cases
from support.deployed import ROOT
from support.webhooks import BODIES, SAID_BY_NOBODY

CORPUS = cases("webhook")
KINDS = ("crew", "human_input", "stream")


def read(kind: str, body: Any) -> list[WebhookEvent]:
    return read_events(kind, body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize("name", [name for name, case in CORPUS.items() if case["kind"] in KINDS])
def test_a_body_becomes_its_events(name: str):
    case = CORPUS[name]
    if "raises" in case:
        with pytest.raises(ResponseFormatError) as caught:
            read(case["kind"], body_of(case))
        assert len(str(caught.value)) < 1000
        return
    events = [asdict(event) for event in read(case["kind"], body_of(case))]
    for event in events:
        event["kind"] = event["kind"].removeprefix("webhook.")
        event["usage"] = event["usage"] and event["usage"].model_dump(exclude_none=True)
    assert case["expected"] == [{name: value for name, value in event.items() if value is not None} for event in events]


@pytest.mark.parametrize("bad", ["k\n1", "\x1b]0;x\x07", "k\u202e1"])
def test_an_id_with_control_characters_names_no_run(bad: str):
    with pytest.raises(ResponseFormatError):
        read("crew", {"kickoff_id": bad, "result": "x"})


def test_only_ends_are_read_from_a_stream_and_so_many():
    types = ["crew_kickoff_failed", "LLM_Call_Started", "Flow_Finished", "x" * 101, None]
    events = read("stream", {"events": [{"execution_id": "k-1", "type": type_} for type_ in types]})
    assert [event.kind for event in events] == ["webhook.stream.crew_kickoff_failed", "webhook.stream.flow_finished"]
    many = [{"execution_id": "k", "type": "flow_finished", "id": str(n)} for n in range(5000)]
    assert len(read("stream", {"events": many})) == MAX_STREAMED


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


@given(st.sampled_from(KINDS), bodies)
def test_whatever_a_body_holds_it_is_read_or_refused(kind: str, body: dict[str, Any]):
    with suppress(ResponseFormatError):
        assert len(read(kind, body)) <= MAX_STREAMED


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
